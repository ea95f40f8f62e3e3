"""Speed: does an arm reach its baseline's targets in at least 10% less training."""

import math
from dataclasses import dataclass, field
from typing import Any

from comoving.lab.statistics import Paired, paired
from comoving.lab.times import crossing, labels, share_label, targets
from comoving.lab.verdicts.base import (
    NO,
    SEEDS,
    SIGNIFICANT,
    UNKNOWN,
    YES,
    Arm,
    Results,
    Verdict,
    arms,
    baseline_of,
    caution,
    diverged,
    few,
    listing,
    missing,
    probability,
    runs,
    seeds,
    sentence,
    undefined,
    validated,
)

SAVING = 0.1
MAIN = share_label(0.9)
"""The target that decides."""

RULE = (
    "For each seed the training steps until the held-out curve is at the target, linear between evaluations, are "
    "divided by the baseline's in the same seed; a paired t test is made of the logarithms. Yes: the mean saves at "
    "least 10% and p < 0.05 for any saving. No: the 95% interval excludes a saving of 10%, or the arm never reaches, "
    "in any seed, what its baseline always reaches. Else, or with fewer than 3 pairs, for a yes with a diverged run, "
    "with a seed that does not arrive, or with a target that is reached before the directions are used: not enough "
    "evidence. The answer at 90% of the baseline's final counts; the other targets, and the same in seconds, are "
    "there to compare."
)


@dataclass
class Times:
    """Times of an arm over those of another, over the seeds.

    Attributes:
        label: the target's name.
        unit: "steps" or "seconds".
        ratios: seed -> time of the arm over time of the other.
        bounds: seed -> a number the ratio exceeds, where only the arm never arrives.
        unreached: seeds in which the other never arrives (or has no target, as its run is missing or diverged).
        trivial: seeds with a time of zero or without one.
        early: seeds in which the arm arrives before anything is done to it.
        test: of the logarithms.
    """

    label: str
    unit: str
    ratios: dict[int, float] = field(default_factory=dict[int, float])
    bounds: dict[int, float] = field(default_factory=dict[int, float])
    unreached: list[int] = field(default_factory=list[int])
    trivial: list[int] = field(default_factory=list[int])
    early: list[int] = field(default_factory=list[int])
    test: Paired = field(default_factory=lambda: paired([], []))

    def saving(self) -> tuple[float, float, float] | None:
        """Mean, lower and upper end of the saving, as shares; None without an interval."""
        if self.test.mean is None or self.test.low is None or self.test.high is None:
            return None
        return (1 - math.exp(self.test.mean), 1 - math.exp(self.test.high), 1 - math.exp(self.test.low))


def times(results: Results, arm: Arm, label: str = MAIN, unit: str = "steps", other: Arm | None = None) -> Times:
    """The times of ``arm`` to the target ``label`` over those of ``other`` (its baseline).

    The target of a seed comes from the baseline's own curve of that seed. What a run reached before it diverged counts.

    Raises:
        ValueError: a label that is no target of the study.
    """
    if label not in labels(results["metric"]):
        raise ValueError(f"target {label!r} is none of {', '.join(labels(results['metric']))}")
    baseline = baseline_of(results, arm)
    other = baseline if other is None else other
    found = Times(label, unit)
    own, its, base = runs(arm), runs(other), runs(baseline)
    # What is done to an arm from this step on cannot have been of use before.
    begin = arm.get("begin")
    for seed in seeds(results, arm, other):
        target = targets(results["metric"], validated(base.get(seed)))[label]
        if target is None or seed not in its or seed not in own:
            if seed in own:
                found.unreached.append(seed)
            continue
        there = crossing(its[seed].get("curve") or [], target, results["metric"]["goal"])
        here = crossing(own[seed].get("curve") or [], target, results["metric"]["goal"])
        if there is None:
            found.unreached.append(seed)
            continue
        before = there.step if unit == "steps" else there.seconds
        if here is None:
            last = [
                point["step"] if unit == "steps" else point.get("seconds") for point in own[seed].get("curve") or []
            ]
            if before and last and last[-1]:
                found.bounds[seed] = last[-1] / before
            else:
                found.bounds[seed] = 1.0
            continue
        after = here.step if unit == "steps" else here.seconds
        if not before or not after:
            found.trivial.append(seed)
            continue
        if begin is not None and here.step <= begin:
            found.early.append(seed)
        found.ratios[seed] = after / before
    found.test = paired([math.log(r) for r in found.ratios.values()], [0.0] * len(found.ratios))
    return found


def describe(found: Times) -> str:
    """The saving and its interval in words."""
    saving = found.saving()
    if saving is None:
        if not found.ratios:
            return ""
        return f"time ratios {', '.join(f'{r:.3f}' for r in found.ratios.values())}"
    middle, low, high = (1 - saving[i] for i in (0, 2, 1))
    interval = f"(95% CI {low:.3f} to {high:.3f}), {probability(found.test.p)}"
    return f"{middle:.3f} of the baseline's {found.unit} to {found.label} {interval}"


def obstacle(found: Times) -> str | None:
    """Why no mean of these times means anything; None if nothing is in the way."""
    if found.early:
        return f"{found.label} is reached before the directions are used, in seed {listing(found.early)}"
    if found.unreached and found.ratios:
        return f"the baseline does not reach {found.label} in seed {listing(found.unreached)}: others would be chosen"
    if found.trivial:
        return f"{found.label} is reached at the start (or no time was kept), in seed {listing(found.trivial)}"
    if found.bounds:
        return f"does not reach {found.label} in seed {listing(list(found.bounds))}: no mean time exists"
    return undefined(found.test)


def decide(found: Times, bad: list[int]) -> tuple[str, str]:
    """The answer by :data:`RULE` and why it is not another."""
    if found.bounds and not found.ratios and len(found.bounds) >= SEEDS and not found.trivial:
        return NO, f"in none of {len(found.bounds)} seeds does it reach {found.label}, which the baseline reaches"
    why = obstacle(found)
    if why is not None or found.test.mean is None or found.test.low is None or found.test.p is None:
        return UNKNOWN, why or few(found.test.count)
    if found.test.mean <= math.log(1 - SAVING) and found.test.p < SIGNIFICANT:
        return (UNKNOWN, f"{len(bad)} diverged: no yes") if bad else (YES, "")
    if found.test.low > math.log(1 - SAVING):
        return NO, "a saving of 10% is excluded"
    return UNKNOWN, "neither a saving of 10% nor its absence is shown"


def faster(results: Results, arm: Arm, other: Arm) -> bool | None:
    """Whether ``arm`` reaches 90% significantly sooner than ``other``; None if that cannot be tested."""
    found = times(results, arm, other=other)
    mean, p = found.test.mean, found.test.p
    if obstacle(found) is not None or diverged(arm) or mean is None or p is None:
        return None
    return mean < 0 and p < SIGNIFICANT


def speed(results: Results, arm: Arm, label: str = MAIN, unit: str = "steps") -> Verdict:
    """The verdict on one arm, target and unit."""
    detail = "" if (label, unit) == (MAIN, "steps") else f": {label} in {unit}"
    baseline = baseline_of(results, arm)
    if baseline is None:
        return Verdict(f"speed{detail}", arm["name"], UNKNOWN, {}, "there is no baseline to compare with")
    found = times(results, arm, label, unit)
    answer, why = decide(found, diverged(arm))
    saving = found.saving()
    figures: dict[str, Any] = {
        "target": label,
        "unit": unit,
        "saving": None if saving is None else saving[0],
        "low": None if saving is None else saving[1],
        "high": None if saving is None else saving[2],
        "p": found.test.p,
        "pairs": found.test.count,
        "ratios": list(found.ratios.values()),
        "never": len(found.bounds),
        "diverged": len(diverged(arm)),
    }
    unreached = f"the baseline does not reach {label} in seed {listing(found.unreached)}" if found.unreached else ""
    care = caution(found.test) if saving is not None and found.test.count >= SEEDS else ""
    text = sentence(describe(found), why, unreached, *missing(results, arm, baseline), care)
    return Verdict(f"speed{detail}", arm["name"], answer, figures, text)


def speeds(results: Results) -> list[Verdict]:
    """Of every treatment and control: 90% in steps first, then in seconds, then the other targets."""
    found: list[Verdict] = []
    others = [label for label in labels(results["metric"]) if label != MAIN]
    for arm in arms(results, "treatment", "control"):
        found += [speed(results, arm), speed(results, arm, MAIN, "seconds")]
        found += [speed(results, arm, label) for label in others]
    return found
