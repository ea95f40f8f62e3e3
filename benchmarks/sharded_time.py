"""Step time of sharded parameters against parameters half as large in one process.

python benchmarks/sharded_time.py --out benchmarks/results/sharded_time_cpu.json

The matrices of LLaMA-60M at rank 1/4, cut along their rows over two processes (gloo, a core each, one thread), beside
two processes that talk to nobody and have as many rows each for themselves: the same arithmetic, and the same load of
the machine, since both kinds run in pairs, one step of the one and one of the other in turn. From a sharded step the
time inside of collectives is taken off, which is measured by a clock around each of them: a process that waits for the
other one waits there. Figures are of both processes' medians the larger one, and the mean with refreshes.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import comoving

RECIPES = ("comoving", "galore", "ldadam", "muon", "adamw")
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
            if work is not None:
                work.wait = self._timed(work.wait)
            return work

        return timed


def drawn(shapes: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """Rows of this process."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m // 2, n, generator=generator) for m, n in shapes]


def measure(rank: int, folder: str, recipe: str, steps: int) -> None:
    """Time both kinds in turn, in one of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mesh, clock = init_device_mesh("cpu", (2,)), Clock()

    def sharded(x: Tensor) -> DTensor:
        return DTensor.from_local(x, mesh, [Shard(0)], run_check=False)

    alone = [nn.Parameter(x) for x in drawn(SHAPES, rank)]
    shared = [nn.Parameter(sharded(x)) for x in drawn(SHAPES, rank)]
    side = {} if recipe in {"muon", "adamw"} else {"side": "right"}
    optimizers = [
        comoving.build(recipe, [(f"layers.{i}.weight", p) for i, p in enumerate(params)], 1e-3, rank=0.25, **side)
        for params in (alone, shared)
    ]
    clock.watch()
    found: dict[str, list[float]] = {"alone": [], "sharded": [], "communication": []}
    for step in range(steps):
        for p, q, g in zip(alone, shared, drawn(SHAPES, 100 + 2 * step + rank), strict=True):
            p.grad, q.grad = g, sharded(g)
        for kind in (
            ("alone", "sharded") if step % 2 else ("sharded", "alone")
        ):  # the second one finds gradients in cache
            dist.barrier()
            begin, inside = time.perf_counter(), clock.seconds
            optimizers[kind == "sharded"].step()
            found[kind].append(time.perf_counter() - begin)
            if kind == "sharded":
                found["communication"].append(clock.seconds - inside)
    Path(folder, f"{rank}.json").write_text(json.dumps({name: times[1:] for name, times in found.items()}))
    dist.barrier()
    dist.destroy_process_group()


def figures(recipe: str, steps: int) -> dict[str, float | str]:
    """Of one recipe: milliseconds and ratios."""
    with TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, recipe, steps), nprocs=2)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
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
            "command": "python " + " ".join(sys.argv), "torch": torch.__version__, "machine": platform.processor(),
            "processes": 2, "shapes": "LLaMA-60M", "steps": arguments.steps - 1, "table": lines,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
