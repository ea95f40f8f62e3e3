"""Successive halving: many candidates for few steps, the better half for twice as many, and so on.

Jamieson and Talwalkar, arXiv 1502.07943. Nothing here trains: :mod:`comoving.race.tuning` does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH = 8.0
"""Candidates lie within this factor of the default rate, and of a ratio of 1, in both directions."""
MARGIN = 0.25
"""A candidate whose validation exceeds the best one's by this share of it is given up."""
# The generalized golden ratio of two dimensions (Roberts' sequence): its multiples fill the square evenly.
_PLASTIC = 1.32471795724474602596


@dataclass(frozen=True)
class Candidate:
    """Tuned values: the peak rate of hidden weights, and the rate of everything else over it."""

    rate: float
    ratio: float = 1.0


@dataclass(frozen=True)
class Rung:
    """So many candidates are trained up to so many steps."""

    candidates: int
    steps: int


def ladder(trials: int, steps: int, rungs: int) -> list[Rung]:
    """The rungs: halves of the candidates at doubled steps, ``steps`` at the last one.

    Raises:
        ValueError: no trials or rungs, or fewer steps than the first rung needs for one.
    """
    if trials < 1 or rungs < 1:
        raise ValueError(f"there are {trials} candidates and {rungs} rungs; there must be at least 1 of each")
    if steps < 2 ** (rungs - 1):
        raise ValueError(f"{steps} steps cannot be halved {rungs - 1} times: give fewer rungs or more steps")
    return [Rung(max(1, trials >> i), steps >> (rungs - 1 - i)) for i in range(rungs)]


def candidates(rate: float, trials: int, width: float = WIDTH) -> list[Candidate]:
    """The default (``rate``, 1), and others spread evenly over both values' logarithms.

    The same factors for every contender: all have as many trials, as far from their own default.
    """
    found = [Candidate(rate)]
    for i in range(1, trials):
        places = ((0.5 + i / _PLASTIC**power) % 1.0 for power in (1, 2))
        factors = [width ** (2 * place - 1) for place in places]
        found.append(Candidate(float(f"{rate * factors[0]:.4g}"), float(f"{factors[1]:.3g}")))
    return found


def survivors(
    values: Mapping[Candidate, float | None], count: int, margin: float = MARGIN
) -> tuple[list[Candidate], list[Candidate]]:
    """Who goes on, best first, and who is given up.

    Args:
        values: validation of each candidate, lower is better; None (or not finite) for one that diverged or failed.
        count: at most so many go on.
        margin: nobody goes on who is worse than the best by more than this share of the best's value.
    """
    sound = {candidate: value for candidate, value in values.items() if value is not None and math.isfinite(value)}
    ordered = sorted(sound, key=lambda candidate: sound[candidate])  # stable: among equals the earlier one
    if not ordered:
        return [], list(values)
    best = sound[ordered[0]]
    going = [candidate for candidate in ordered[:count] if sound[candidate] <= best + margin * abs(best)]
    return going, [candidate for candidate in values if candidate not in going]


def allowance(rungs: Sequence[Rung], seeds: int, resumed: bool = True) -> int:
    """Steps that a contender may train in all: every rung in full, and the last one's candidates for all seeds.

    Args:
        rungs: of :func:`ladder`.
        seeds: of the last rung; the first one's runs have gone through the rungs before it.
        resumed: each rung goes on from where the one before it ended.
    """
    before = [0, *(rung.steps for rung in rungs[:-1])]
    once = sum(rung.candidates * (rung.steps - (b if resumed else 0)) for rung, b in zip(rungs, before, strict=True))
    return once + (seeds - 1) * rungs[-1].candidates * rungs[-1].steps
