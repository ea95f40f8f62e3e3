"""Many cases, in several processes."""

import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from .cases import draw
from .check import FAILURES, KINDS, Outcome, examine

__all__ = ["report", "run"]

_CHUNK = 25


def run(seed: int, indices: Sequence[int], jobs: int = 1, recipes: Sequence[str] = ()) -> Iterator[Outcome]:
    """The outcome of each case, in order.

    Args:
        seed: of all cases.
        indices: of the cases.
        jobs: processes, each of one thread; 1 runs them here.
        recipes: as for :func:`comoving.fuzz.cases.draw`.
    """
    chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
    if jobs == 1:
        for chunk in chunks:
            yield from _examined(seed, chunk, recipes)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_single) as pool:
        count = len(chunks)
        for outcomes in pool.map(_examined, [seed] * count, chunks, [recipes] * count):
            yield from outcomes


def _single() -> None:
    torch.set_num_threads(1)


def _examined(seed: int, indices: Sequence[int], recipes: Sequence[str]) -> list[Outcome]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [examine(draw(seed, index, recipes)) for index in indices]
    finally:
        torch.set_num_threads(threads)


def report(outcomes: Iterable[Outcome], total: int) -> int:
    """Write progress to standard error, failures and counts to standard output; returns how many cases failed."""
    counts: Counter[str] = Counter()
    largest: dict[str, Outcome] = {}
    started = time.monotonic()
    for done, outcome in enumerate(outcomes, 1):
        counts[outcome.kind] += 1
        name = outcome.case.recipe or "composition"
        if name not in largest or outcome.share > largest[name].share:
            largest[name] = outcome
        if outcome.failed:
            sys.stdout.write(f"{outcome}\n")
            sys.stdout.flush()
        if done % 50 == 0 or done == total:
            rate = done / max(time.monotonic() - started, 1e-9)
            failed = sum(counts[kind] for kind in FAILURES)
            sys.stderr.write(f"\r{done} of {total} cases, {failed} failed, {rate:.0f} a second")
            sys.stderr.flush()
    sys.stderr.write("\n")
    sys.stdout.write(", ".join(f"{kind} {counts[kind]}" for kind in KINDS if counts[kind]) + "\n")
    top = sorted(largest.items(), key=lambda pair: -pair[1].share)[:5]
    near = ", ".join(f"{name} {outcome.share:.2f}" for name, outcome in top if outcome.share > 0)
    sys.stdout.write(f"largest steps over their bounds: {near or 'none'}\n")
    return sum(counts[kind] for kind in FAILURES)
