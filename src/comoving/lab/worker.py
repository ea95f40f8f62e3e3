"""The process of one run: JSON settings on standard input, JSON lines of progress out, the record to a file."""

import json
import sys
from pathlib import Path

import torch

from comoving.directions.sinks import JSONLines, Sink, TensorBoard, WandB
from comoving.lab.train import LabRun, train
from comoving.race.files import write_json
from comoving.race.processes import Reporter


def sinks(run: LabRun, file: Path) -> tuple[Sink, ...]:
    """Where else the spectra go."""
    name, found = file.stem, list[Sink]()
    if "jsonl" in run.log:
        found.append(JSONLines(Path(run.log["jsonl"]) / f"{name}.jsonl"))
    if "tensorboard" in run.log:
        found.append(TensorBoard(Path(run.log["tensorboard"]) / name))
    if "wandb" in run.log:
        found.append(WandB(run.log["wandb"], file.parent.parent / "wandb", name=name))
    return tuple(found)


def main(target: Path) -> None:
    """Train what standard input asks for and write the record to ``target``."""
    torch.set_num_threads(1)
    fields = json.load(sys.stdin)
    run = LabRun.of(fields)
    record = train(
        run,
        progress=Reporter(run.config.steps),
        checkpoint=target.with_suffix(".pt"),
        sinks=sinks(run, target),
    )
    write_json(target, {"settings": fields, **record})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
