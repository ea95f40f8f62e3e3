"""docs/examples/elastic.py, of which one process is killed once, in the middle of a step."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import elastic

torch.set_num_threads(1)
folder = Path(sys.argv[1])
dist.init_process_group("gloo")


def after(step):
    if step == 16 and dist.get_rank() == 1 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


loss = elastic.train(folder, after)
if dist.get_rank() == 0:
    (folder / "loss").write_text(repr(loss))
dist.destroy_process_group()
