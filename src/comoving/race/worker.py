"""The process of one run: JSON settings on standard input, JSON lines of progress out, the record to a file.

Started by :mod:`comoving.race.sweep` as ``python -m comoving.race.worker FILE``; a process of its own gives each run
its own peak memory, and a crash takes nobody else down.
"""

import json
import logging
import sys
from pathlib import Path

import torch

from comoving.files import write_json
from comoving.race.processes import Relay, Reporter
from comoving.race.runner import train
from comoving.race.settings import RunSettings, kept


def main(target: Path) -> None:
    """Train what standard input asks for and write the record to ``target``."""
    torch.set_num_threads(1)
    logging.getLogger("comoving").addHandler(Relay())
    fields = json.load(sys.stdin)
    if isinstance(fields["rank"], list):
        fields["rank"] = tuple(fields["rank"])
    run = RunSettings(**fields)
    record = train(run, progress=Reporter(run.length), kept=kept(run, target.parent))
    write_json(target, {"settings": fields, **record})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
