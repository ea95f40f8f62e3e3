"""What it costs to search frames some steps before they are used (comoving.finders.Delayed).

    python benchmarks/delay.py --steps 300 --seeds 3 --out benchmarks/results/delay.json

Trains the byte language model of the race with frames that are searched at once, and with such that are searched some
steps ahead, from the same weights and with the same batches, all at the recipe's rate; writes final validation losses
(bits a byte) and the ratio, delayed by undelayed, of each seed's.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import comoving
from comoving.finders import Delayed, Exact, Power
from comoving.race.host import machine, versions
from comoving.race.runner import rate_factor, set_rate
from comoving.race.tasks import TASKS

FINDERS = {"comoving-adamw": Power(exact_up_to=32), "galore": Exact(), "ldadam": Power(inertia=0.908, start="exact")}
"""Those of the recipes."""
CASES = ((10, (1, 2, 10)), (1, (1,)), (50, (1,)))
"""Refresh periods, and by how many steps searches are ahead in each."""


def main() -> None:
    """Run all cases of one recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="comoving-adamw", choices=FINDERS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=TASKS["lm"].batch)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--periods", type=int, nargs="+", default=[period for period, _ in CASES])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/delay.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine("cpu", 1),
        "versions": {name: v for name, v in versions().items() if name in {"python", "torch", "comoving"}},
        "arguments": {name: value for name, value in vars(given).items() if name != "out"},
        "task": "lm",
        "cases": [],
    }
    for period, ahead in CASES:
        if period not in given.periods:
            continue
        plain = [_trained(given, period, 0, seed) for seed in range(given.seeds)]
        for by in ahead:
            delayed = [_trained(given, period, by, seed) for seed in range(given.seeds)]
            ratios = [a / b for a, b in zip(delayed, plain, strict=True)]
            case = {"refresh_every": period, "by": by, "undelayed": plain, "delayed": delayed, "ratios": ratios}
            case |= {"mean ratio": mean(ratios), "deviation": stdev(ratios) if len(ratios) > 1 else None}
            report["cases"].append(case)
            print(f"every {period}, by {by}: {case['mean ratio']:.4f} {ratios}", flush=True)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(report, indent=1) + "\n")


def _trained(given: argparse.Namespace, period: int, by: int, seed: int) -> float:
    """The final validation loss of one run."""
    info = TASKS["lm"]
    task, rate, begun = info.load(), info.rates[given.recipe], time.monotonic()
    torch.manual_seed(seed)
    model = task.model()
    options: dict[str, Any] = {}
    if by:
        options["finder"] = Delayed(FINDERS[given.recipe], by)
    optimizer = comoving.build(
        given.recipe, model, lr=rate, rank=info.rank, weight_decay=0.01, seed=seed, refresh_every=period, **options
    )
    batches = torch.Generator().manual_seed(1000 + seed)
    for step in range(given.steps):
        for group in optimizer.param_groups:
            set_rate(group, rate * rate_factor(step, given.steps, given.warmup))
        optimizer.zero_grad()
        task.loss(model, task.batch(given.batch, batches)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        value = float(task.validate(model)["value"])
    print(f"every {period}, by {by}, seed {seed}: {value:.4f} in {time.monotonic() - begun:.0f} s", flush=True)
    return value


if __name__ == "__main__":
    main()
