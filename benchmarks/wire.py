"""What crosses a network: bytes, modelled times, and losses.

    python benchmarks/wire.py bytes --out benchmarks/results/wire_bytes.json
    python benchmarks/wire.py local --out benchmarks/results/wire_local.json
    python benchmarks/wire.py model --out benchmarks/results/wire_model.json
    python benchmarks/wire.py race --out benchmarks/results/wire_race.json

"bytes" plans what compress() sends of LLaMA-1B's matrices, beside plain DistributedDataParallel, and counts in two
processes what is really sent of two of them. "model" draws step times against bandwidth and ranks. "race" trains a
small language model with four processes at equal bytes. "local" sets momentum and feedback of local steps against each
other. Each has a --help.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import wire_bytes
import wire_local
import wire_model
import wire_race
from comoving.race.host import machine, versions

STUDIES = {"bytes": wire_bytes, "local": wire_local, "model": wire_model, "race": wire_race}


def main() -> None:
    """Run one of them, and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_subparsers(dest="study", required=True)
    for name, study in STUDIES.items():
        own = chosen.add_parser(name, description=study.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        study.arguments(own)
        own.add_argument("--out", type=Path, default=Path(f"benchmarks/results/wire_{name}.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = STUDIES[given.study].run(given)
    assumed = {name: value for name, value in vars(given).items() if name not in {"study", "out"}}
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine("cpu", getattr(given, "processes", 1)),
        "versions": {name: v for name, v in versions().items() if name in {"python", "torch", "comoving"}},
        "arguments": assumed,
        **found,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
