"""Stability: explosions, spikes, and where the largest singular value goes."""

import math
from dataclasses import dataclass

from comoving.lab.statistics import Paired, finite, paired
from comoving.lab.times import explosions
from comoving.lab.verdicts.base import (
    NO,
    SEEDS,
    UNKNOWN,
    YES,
    Arm,
    Results,
    Run,
    Verdict,
    arms,
    baseline_of,
    few,
    listing,
    missing,
    runs,
    seeds,
    sentence,
)

GROWTH = 2.0
"""Times the baseline's sigma_max at the end."""

RULE = (
    "Three things are counted against the baseline's run of the same seed. Explosions: runs that diverge, or whose "
    "training loss leaves (the median of its last 20 exceeds that of its first 20), while the baseline's does not. "
    "Spikes: training losses more than 25% and five deviations above the median of the 20 before. sigma_max, the "
    "largest over all layers read: its ratio to the baseline's at the end, and its largest rise between two readings "
    "in units of the baseline's at the end. No: any explosion; or the 95% interval of the paired difference of spikes "
    "lies above 0, of the ratio above 2, or of the rise minus the baseline's above 1. Yes, with at least 3 pairs: no "
    "explosion, no more spikes in all than the baseline, and neither sigma_max's mean ratio exceeds 2 nor its mean "
    "rise the baseline's by 1. Without readings of sigma_max the rest decides, and the text says so. Else: not enough "
    "evidence."
)


@dataclass(frozen=True)
class Path:
    """sigma_max of a run, the largest over layers.

    Attributes:
        end: at its last reading.
        rise: the largest increase between two readings; 0 if it only falls.
    """

    end: float
    rise: float


def largest(run: Run) -> list[tuple[int, float]]:
    """The largest sigma_max over all layers at each step at which any was read."""
    at: dict[int, float] = {}
    for key, readings in (run.get("spectra") or {}).items():
        # Not of the gradient or the momentum: those keys have one part more.
        name, _, what = key.rpartition("/")
        if what != "sigma_max" or name.endswith(("/grad", "/momentum", "/update")):
            continue
        for step, value in readings:
            number = finite(value)
            if number is not None:
                at[step] = max(at.get(step, 0.0), number)
    return sorted(at.items())


def path(run: Run | None) -> Path | None:
    """None where sigma_max was not read."""
    readings = [] if run is None else [value for _, value in largest(run)]
    if not readings:
        return None
    rises = [b - a for a, b in zip(readings, readings[1:], strict=False)]
    return Path(readings[-1], max([0.0, *rises]))


def above(test: Paired, limit: float) -> bool:
    """Whether the whole interval lies above."""
    return test.count >= SEEDS and test.low is not None and test.low > limit


def verdict(results: Results, arm: Arm) -> Verdict:
    """The verdict on one arm."""
    baseline = baseline_of(results, arm)
    if baseline is None:
        return Verdict("stability", arm["name"], UNKNOWN, {}, "there is no baseline to compare with")
    own, base = runs(arm), runs(baseline)
    told = {seed for seed, run in own.items() if run.get("losses") or run["status"] == "diverged"}
    both = [seed for seed in seeds(results, arm, baseline) if seed in told and base.get(seed, {}).get("losses")]
    here, there = {s: explosions(own[s]) for s in both}, {s: explosions(base[s]) for s in both}
    blown = [s for s in both if here[s].diverged and not there[s].diverged]
    gone = [s for s in both if here[s].left and not here[s].diverged and not there[s].left]
    # A run that ends early has fewer steps in which to have spikes.
    whole = [s for s in both if not here[s].diverged and not there[s].diverged]
    spikes = [len(here[s].spikes) for s in whole], [len(there[s].spikes) for s in whole]
    excess = paired(*spikes)
    paths = [(path(own[s]), path(base[s])) for s in whole]
    known = [(a, b) for a, b in paths if a is not None and b is not None and a.end > 0 and b.end > 0]
    ratio = paired([math.log(a.end) for a, _ in known], [math.log(b.end) for _, b in known])
    rise = paired([a.rise / b.end for a, b in known], [b.rise / b.end for _, b in known])
    times = None if ratio.mean is None else math.exp(ratio.mean)
    figures = {
        "diverged": len(blown),
        "left": len(gone),
        "spikes": sum(spikes[0]),
        "spikes of the baseline": sum(spikes[1]),
        "sigma_max ratio": times,
        "sigma_max ratio low": None if ratio.low is None else math.exp(ratio.low),
        "sigma_max ratio high": None if ratio.high is None else math.exp(ratio.high),
        "largest rise": max((a.rise / b.end for a, b in known), default=None),
        "pairs": len(both),
    }
    calm = f"no explosion in {len(both)} runs" if both and not (blown or gone) else ""
    words = [
        f"diverged in seed {listing(blown)} where the baseline did not" if blown else calm,
        f"the training loss leaves in seed {listing(gone)}" if gone else "",
        f"{sum(spikes[0])} spikes, the baseline {sum(spikes[1])}" if whole else "",
        "sigma_max was not read"
        if times is None
        else f"sigma_max ends at {times:.2f} of the baseline's, largest rise {figures['largest rise']:.2f} of it"
        + ("" if len(known) == len(whole) else f" (known of {len(known)} of {len(whole)} pairs)"),
        *missing(results, arm, baseline),
    ]
    grown = above(ratio, math.log(GROWTH)) or above(rise, 1.0)
    if blown or gone or above(excess, 0.0) or grown:
        answer = NO
    elif len(whole) < SEEDS:
        answer, words = UNKNOWN, [*words, few(len(whole))]
    elif sum(spikes[0]) > sum(spikes[1]) or (times or 0.0) > GROWTH or (rise.mean or 0.0) > 1:
        answer, words = UNKNOWN, [*words, "more than the baseline, but not significantly"]
    else:
        answer = YES
    return Verdict("stability", arm["name"], answer, figures, sentence(*words))


def stabilities(results: Results) -> list[Verdict]:
    """Of every treatment and control."""
    return [verdict(results, arm) for arm in arms(results, "treatment", "control")]
