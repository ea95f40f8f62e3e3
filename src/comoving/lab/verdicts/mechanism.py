"""Mechanism: is an arm the faster, the more of the gradient lies in its directions and the better they are aligned."""

import math
from dataclasses import dataclass

from comoving.lab.statistics import finite, spearman
from comoving.lab.verdicts.base import (
    NO,
    SEEDS,
    SIGNIFICANT,
    UNKNOWN,
    YES,
    Arm,
    Results,
    Run,
    Verdict,
    arms,
    baseline_of,
    diverged,
    probability,
    runs,
    sentence,
)
from comoving.lab.verdicts.speed import times

POINTS = 6
STRONG = 0.5
QUANTITIES = {"energy": "p_t", "alignment": "alignment"}

RULE = (
    "Spearman's correlation, over the runs of all arms with directions, of the run's mean p_t (or alignment), from the "
    "step on from which they are used, with its "
    "speed-up, the logarithm of the baseline's steps to 90% of its final over the run's own. Yes: positive with p < "
    "0.05. No: the 95% interval (Fisher's transform) lies below 0.5, so that a strong correlation is excluded. Else, "
    "with fewer than 6 runs or 3 seeds: not enough evidence. A run that never arrives counts with the steps it had, "
    "which its speed-up is below. Runs of one arm or one seed are not independent, so p is smaller than it should be."
)


@dataclass(frozen=True)
class Point:
    """A run in the scatter: its mean p_t or alignment and its speed-up (log of a ratio of times)."""

    arm: str
    seed: int
    quantity: float
    speedup: float
    bound: bool


def mean_of(run: Run, quantity: str, begin: int = 0) -> float | None:
    """The mean over training from step ``begin`` on, when directions are used; None where nothing was read then."""
    numbers = [finite(value) for step, value in run.get(quantity) or [] if step >= begin]
    sound = [value for value in numbers if value is not None]
    return math.fsum(sound) / len(sound) if sound else None


def directed(results: Results) -> list[Arm]:
    """The arms that use directions and have a baseline; B1 uses none."""
    found = arms(results, "treatment", "control")
    return [arm for arm in found if arm.get("action") != "global" and baseline_of(results, arm) is not None]


def points(results: Results, quantity: str) -> list[Point]:
    """Of every run of a treatment or control that finished, has the quantity, and a baseline that reaches 90%.

    Args:
        results: of a study.
        quantity: "energy" or "alignment".
    """
    found: list[Point] = []
    for arm in directed(results):
        ratios = times(results, arm)
        bad = diverged(arm)
        for seed, run in runs(arm).items():
            value = mean_of(run, quantity, arm.get("begin") or 0)
            ratio = ratios.ratios.get(seed, ratios.bounds.get(seed))
            if value is not None and ratio is not None and seed not in bad:
                found.append(Point(arm["name"], seed, value, -math.log(ratio), seed in ratios.bounds))
    return found


def verdict(results: Results, quantity: str) -> Verdict:
    """The verdict on "energy" or "alignment"."""
    name = QUANTITIES[quantity]
    found = points(results, quantity)
    test = spearman([p.quantity for p in found], [p.speedup for p in found])
    figures = {"correlation": test.value, "p": test.p, "low": test.low, "high": test.high, "runs": len(found)}
    lost = sum(len(diverged(arm)) for arm in directed(results) if any(run.get(quantity) for run in runs(arm).values()))
    bounds = sum(point.bound for point in found)
    spread = len({point.seed for point in found})
    words = [
        f"{lost} diverged runs are not among the points" if lost else "",
        f"{bounds} of them never arrive" if bounds else "",
    ]
    over = f"over {len(found)} runs of {len({p.arm for p in found})} arms"
    answer, said = UNKNOWN, f"{over}, at least {POINTS} are needed"
    if len(found) >= POINTS and spread < SEEDS:
        said = f"{over} with {spread} seed{'' if spread == 1 else 's'}, at least {SEEDS} are needed"
    elif len(found) >= POINTS and (test.value is None or test.p is None or test.high is None):
        said = f"{over}: {name} or the speed-up is the same in all of them"
    elif len(found) >= POINTS and test.value is not None and test.p is not None and test.high is not None:
        said = f"rho = {test.value:+.2f} (95% CI {test.low:+.2f} to {test.high:+.2f}), {probability(test.p)}, {over}"
        if test.value > 0 and test.p < SIGNIFICANT:
            answer = YES
        elif test.high < STRONG:
            answer = NO
    return Verdict(f"mechanism: {name}", "all with directions", answer, figures, sentence(said, *words))


def mechanisms(results: Results) -> list[Verdict]:
    """For p_t and alignment, where the study has arms beside baselines."""
    return [verdict(results, quantity) for quantity in QUANTITIES] if arms(results, "treatment", "control") else []
