"""The process of one run: JSON settings on standard input, JSON lines of progress out, the record to a file."""

import json
import logging
import sys
from pathlib import Path

import torch

from comoving.directions.sinks import JSONLines, Sink, TensorBoard, WandB
from comoving.files import write_json
from comoving.lab.train import LabRun, stored, train
from comoving.race.processes import Relay, Reporter


def sinks(run: LabRun, file: Path, step: int) -> tuple[Sink, ...]:
    """Where else the spectra go; what a run that was interrupted has written of later steps is dropped."""
    name, found = file.stem, list[Sink]()
    if "jsonl" in run.log:
        found.append(JSONLines(Path(run.log["jsonl"]) / f"{name}.jsonl", resume_at=step))
    if "tensorboard" in run.log:
        found.append(TensorBoard(Path(run.log["tensorboard"]) / name, resume_at=step))
    if "wandb" in run.log:
        found.append(WandB(run.log["wandb"], file.parent.parent / "wandb", name=name))
    return tuple(found)


def main(target: Path) -> None:
    """Train what standard input asks for and write the record to ``target``."""
    torch.set_num_threads(1)
    logging.getLogger("comoving").addHandler(Relay())
    fields = json.load(sys.stdin)
    run = LabRun.of(fields)
    checkpoint = target.with_suffix(".pt")
    found = stored(checkpoint)
    step = 0 if found is None else found["step"]
    record = train(run, progress=Reporter(run.config.steps), checkpoint=checkpoint, sinks=sinks(run, target, step))
    write_json(target, {"settings": fields, **record})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
