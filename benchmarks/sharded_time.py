"""Step time of sharded parameters against parameters half as large in one process.

python benchmarks/sharded_time.py --out benchmarks/results/sharded_time_cpu.json

The matrices of LLaMA-60M at rank 1/4, cut along their rows over two processes (gloo, a core each, one thread), beside
two processes that talk to nobody and have as many rows each for themselves; where whole matrices are dealt out (Muon),
half of the layers each. That is the same arithmetic, and the same load of the machine: both kinds run in pairs, one
step of the one and one of the other in turn. From a sharded step the time inside of collectives is taken off, which is
measured by a clock around each of them: a process that waits for the other one waits there. Figures are of both
processes' medians the larger one, and of their means, refreshes included.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import comoving
import gloo
from comoving.race.host import machine, versions

RECIPES = ("comoving-adamw", "galore", "ldadam", "muon", "adamw")
LAYER = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
SHAPES = LAYER * 8
COLLECTIVES = ("all_reduce", "all_gather", "all_to_all_single", "broadcast")


class Clock:
    """Seconds inside of collectives, and of waiting for those that were not waited for at once."""

    seconds = 0.0

    def watch(self) -> None:
        """Put a clock around each of them."""
        for name in COLLECTIVES:
            setattr(dist, name, self._timed(getattr(dist, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            work = call(*args, **options)
            self.seconds += time.perf_counter() - begin
            return None if work is None else Waiting(self, work)

        return timed


class Waiting:
    """A collective that is under way."""

    def __init__(self, clock: Clock, work: Any) -> None:
        self._clock, self._work = clock, work

    def wait(self) -> None:
        """Until it is done."""
        begin = time.perf_counter()
        self._work.wait()
        self._clock.seconds += time.perf_counter() - begin


def drawn(seed: int, whole: bool = False) -> list[Tensor]:
    """Rows of this process, or half of the matrices, whole."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES[: len(SHAPES) // 2] if whole else [(m // 2, n) for m, n in SHAPES]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def measure(rank: int, recipe: str, steps: int) -> dict[str, list[float]]:
    """Seconds of both kinds in turn, and of communication, in one of the two processes; without the first step."""
    mesh, clock = init_device_mesh("cpu", (2,)), Clock()

    def sharded(x: Tensor) -> DTensor:
        return DTensor.from_local(x, mesh, [Shard(0)], run_check=False)

    dealt = recipe == "muon"
    alone = [nn.Parameter(x) for x in drawn(rank, dealt)]
    shared = [nn.Parameter(sharded(x)) for x in drawn(rank)]
    side = {} if recipe in {"muon", "adamw"} else {"side": "right"}
    optimizers = [
        comoving.build(recipe, [(f"layers.{i}.weight", p) for i, p in enumerate(params)], 1e-3, rank=0.25, **side)
        for params in (alone, shared)
    ]
    clock.watch()
    found: dict[str, list[float]] = {"alone": [], "sharded": [], "communication": []}
    for step in range(steps):
        for p, g in zip(alone, drawn(100 + 2 * step + rank, dealt), strict=True):
            p.grad = g
        for p, g in zip(shared, drawn(100 + 2 * step + rank), strict=True):
            p.grad = sharded(g)
        for kind in (
            ("alone", "sharded") if step % 2 else ("sharded", "alone")
        ):  # the second one finds gradients in cache
            dist.barrier()
            begin, inside = time.perf_counter(), clock.seconds
            optimizers[kind == "sharded"].step()
            found[kind].append(time.perf_counter() - begin)
            if kind == "sharded":
                found["communication"].append(clock.seconds - inside)
    return {name: times[1:] for name, times in found.items()}


def figures(recipe: str, steps: int) -> dict[str, float | str]:
    """Of one recipe: milliseconds and ratios."""
    ranks = gloo.run(2, measure, recipe, steps)
    line: dict[str, float | str] = {"recipe": recipe}
    for name, over in (("median", median), ("mean", mean)):
        alone = max(over(r["alone"]) for r in ranks)
        sharded = max(over(r["sharded"]) for r in ranks)
        own = max(over([a - b for a, b in zip(r["sharded"], r["communication"], strict=True)]) for r in ranks)
        line |= {f"{name} alone ms": 1e3 * alone, f"{name} sharded ms": 1e3 * sharded, f"{name} ratio": own / alone}
    return line


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    arguments = parser.parse_args()
    lines = [figures(recipe, arguments.steps) for recipe in arguments.recipes.split(",")]
    for line in lines:
        shown = "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else str(v) for k, v in line.items())
        sys.stdout.write(shown + "\n")
    if arguments.out is not None:
        record = {
            "command": " ".join(["python", *sys.argv]), "machine": machine("cpu", 2), "versions": versions(),
            "shapes": "LLaMA-60M", "steps": arguments.steps - 1, "table": lines,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
