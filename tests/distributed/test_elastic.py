"""A process that is killed in the middle of a run: torchrun starts all of them again, from the last checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from distributed.processes import run

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def _undisturbed(rank, folder):
    sys.path.insert(0, str(EXAMPLES))
    import elastic  # noqa: PLC0415

    return elastic.train(Path(folder))


def test_a_killed_process_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = run(2, _undisturbed, str(whole))[0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    script = Path(__file__).with_name("killed_rank.py")
    # Without, processes that gloo starts again find the addresses of those before them (torch 2.13).
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    subprocess.run([*torchrun, str(script), str(broken)], check=True, capture_output=True, timeout=120, env=environment)
    assert (broken / "killed").exists()
    assert {path.name for path in broken.iterdir()} >= {"10", "20", "30", "40", "newest", "loss"}
    torch.testing.assert_close(float((broken / "loss").read_text()), expected, rtol=1e-6, atol=0)
