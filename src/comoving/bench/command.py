"""``comoving bench subspace`` as a function: run the sections, write the files, print the tables."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from comoving.bench import clock, report, subspace
from comoving.bench.contenders import contenders, sampled
from comoving.bench.gradients import from_training, train_tensor, turning
from comoving.files import check_folder, write_bytes, write_json, write_text
from comoving.race.extras import require

NOTE = (
    "Times are processor time on one thread, medians, contenders in turn; only ratios within a run mean anything. Load "
    "on the machine changes them too, through caches and memory: expect 10 to 30% from run to run."
)


@dataclass(frozen=True)
class Settings:
    """How much of everything a run does."""

    warmup: int = 80
    steps: int = 25
    wide: bool = True
    every: int = 4
    repeats: int = 2
    orders: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    rounds: int = 7
    train_size: int = 64
    train_rounds: int = 3
    stream_size: int = 32
    stream_steps: int = 200
    recompute_every: int = 4
    rank: int = 16


FULL = Settings()
QUICK = Settings(
    warmup=2, steps=9, wide=False, repeats=1, orders=(3, 4, 5, 6), rounds=2, train_size=24, train_rounds=2,
    stream_size=24, stream_steps=30, recompute_every=2,
)  # fmt: skip


@contextmanager
def one_thread() -> Generator[None]:
    """Torch on one thread, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(settings: Settings, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """All sections."""
    started, machine = time.monotonic(), clock.machine()
    found: dict[str, Any] = {
        "command": command,
        "note": NOTE,
        "versions": clock.versions(),
        "machine": machine,
        "settings": asdict(settings),
        "streams": [],
        "rates": [],
    }
    say("gradients from short trainings of lm and fno")
    streams = from_training(settings.warmup, settings.steps, settings.wide)
    for stream in streams:
        say(f"finders on {stream.name}")
        found["streams"] += subspace.follow(stream, contenders(), settings.every, settings.repeats)
        if len(stream.shape) > 2 and sampled():
            found["rates"] += subspace.follow(stream, sampled(), settings.every, settings.repeats)
    say("cost against order")
    rows = subspace.cost_of_order(settings.orders, rounds=settings.rounds)
    found["orders"] = {"rows": rows, "summary": subspace.order_summary(rows)}
    found["trains"] = []
    for noise in (0.0, 1e-3):
        size, rank = settings.train_size, settings.rank
        name = f"{size}^4 of rank {rank}, {f'noise {noise:g}' if noise else 'exact'}"
        say(f"tensor trains of {name}")
        x = train_tensor(size, 4, rank, noise, 0)
        found["trains"] += [{"tensor": name} | r for r in subspace.decompositions(x, rank, settings.train_rounds)]
    say(f"increments along {settings.stream_steps} gradients")
    gradients = turning(settings.stream_size, 4, settings.rank, settings.stream_steps)
    found["increments"] = subspace.increments(gradients, settings.rank, settings.recompute_every)
    found["targets"] = report.targets(found)
    machine["load_at_end"] = clock.machine()["load"]
    found["wall_seconds"] = time.monotonic() - started
    return found


def execute(out: Path, quick: bool, command: str) -> int:
    """Measure; write ``subspace.json``, ``subspace.md`` and two pictures to ``out``; print the tables.

    Returns:
        Exit status 0.

    Raises:
        ImportError: for a package that is missing; the message names the extra that brings it.
    """
    rich_console = require("rich.console", "cli")
    # Missed here rather than after minutes of measuring.
    for module, extra in (("matplotlib.figure", "cli"), ("transformers", "hf"), ("neuralop.models", "pde")):
        require(module, extra)
    check_folder(out)
    console = rich_console.Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    with one_thread():
        found = measure(QUICK if quick else FULL, command, say)
    write_json(out / "subspace.json", found)
    write_text(out / "subspace.md", report.markdown(found))
    write_bytes(out / "subspace-accuracy.png", report.accuracy(found))
    write_bytes(out / "subspace-order.png", report.order(found))
    report.show(found, rich_console.Console(width=None if sys.stdout.isatty() else 170))
    console.print(f"written to {out}", markup=False, highlight=False)
    return 0
