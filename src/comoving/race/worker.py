"""The process of one run: JSON settings on standard input, JSON lines of progress out, the record to a file.

Started by :mod:`comoving.race.sweep` as ``python -m comoving.race.worker FILE``; a process of its own gives each run
its own peak memory, and a crash takes nobody else down.
"""

import json
import sys
import time
from pathlib import Path

import torch

from comoving.race.files import write_json
from comoving.race.runner import train
from comoving.race.settings import RunSettings

PERIOD = 0.2


def main(target: Path) -> None:
    """Train what standard input asks for and write the record to ``target``."""
    torch.set_num_threads(1)
    fields = json.load(sys.stdin)
    if isinstance(fields["rank"], list):
        fields["rank"] = tuple(fields["rank"])
    run = RunSettings(**fields)
    last = 0.0

    def progress(step: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > PERIOD or step == run.steps:
            last = now
            sys.stdout.write(json.dumps({"step": step, "loss": loss}) + "\n")
            sys.stdout.flush()

    record = train(run, progress=progress)
    write_json(target, {"settings": fields, **record})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
