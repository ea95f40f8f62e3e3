"""Phases, by which refreshes are staggered over the parameters, so that no step pays for all."""

from collections.abc import Iterable, Mapping

SMALL = 2**16
"""Up to how many entries what is alike is stepped together. Stacking copies gradients and weights; from here on that
costs more than the operations that it saves: measured on one CPU thread."""
_AT_ONCE = 2**19
"""Entries of small alike units that refresh at the same step: more would be felt as a slow step, and fewer would leave
most of what a batch saves."""


def at_once(entries: int) -> int:
    """How many alike units of this many entries each refresh at the same step."""
    return max(1, _AT_ONCE // max(1, entries)) if entries <= SMALL else 1


def stagger(costs: Iterable[float], every: int, load: Mapping[int, float] | None = None) -> list[int]:
    """A phase in 0 ... every - 1 for each parameter, dearest first, each where the least work is so far.

    Args:
        costs: work of one refresh for each parameter, in any unit.
        every: the refresh period, >= 1.
        load: work already placed, phase -> cost, for parameters that join later.

    Returns:
        Phases in the order of ``costs``. A single parameter gets phase 0.
    """
    costs = list(costs)
    total = {phase: 0.0 for phase in range(every)} | dict(load or {})
    phases = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        phases[i] = min(total, key=lambda phase: (total[phase], phase))
        total[phases[i]] += costs[i]
    return phases
