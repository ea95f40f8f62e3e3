"""Final: is an arm at the end as good as its baseline, within the metric's tolerance."""

from comoving.lab.statistics import paired
from comoving.lab.verdicts.base import (
    NO,
    SEEDS,
    UNKNOWN,
    YES,
    Arm,
    Results,
    Verdict,
    arms,
    baseline_of,
    caution,
    diverged,
    final,
    gap_sign,
    missing,
    runs,
    seeds,
    sentence,
    undefined,
)

RULE = (
    "Final held-out values minus the baseline's of the same seed, counted so that positive is better. Yes: the worse "
    "end of the 95% interval of the paired t test is no more than the tolerance below. No: the better end is further "
    "below than the tolerance, or the arm diverges in every seed (at least 3) in which the baseline finishes. Else, "
    "with fewer than 3 pairs, or for a yes with a diverged run: not enough evidence."
)


def verdict(results: Results, arm: Arm) -> Verdict:
    """The verdict on one arm."""
    baseline, metric = baseline_of(results, arm), results["metric"]
    tolerance, unit = float(metric["tolerance"]), metric.get("unit", "")
    if baseline is None:
        return Verdict("final", arm["name"], UNKNOWN, {}, "there is no baseline to compare with")
    own, base = runs(arm), runs(baseline)
    wanted = seeds(results, arm, baseline)
    sign = gap_sign(results)
    first = [final(own.get(s)) for s in wanted]
    second = [final(base.get(s)) for s in wanted]
    test = paired([None if v is None else sign * v for v in first], [None if v is None else sign * v for v in second])
    bad = diverged(arm)
    figures = {
        "difference": test.mean,
        "low": test.low,
        "high": test.high,
        "p": test.p,
        "tolerance": tolerance,
        "pairs": test.count,
        "diverged": len(bad),
    }
    absent = missing(results, arm, baseline)
    lost = [seed for seed in bad if final(base.get(seed)) is not None]
    if len(lost) >= SEEDS and test.count == 0:
        return Verdict("final", arm["name"], NO, figures, sentence("it never gets to an end", *absent))
    why = undefined(test)
    if why is not None or test.mean is None or test.low is None or test.high is None:
        shown = "" if test.mean is None else f"{test.mean:+.3g} {unit}"
        return Verdict("final", arm["name"], UNKNOWN, figures, sentence(shown, why or "", *absent))
    said = f"{test.mean:+.3g} {unit} (95% CI {test.low:+.3g} to {test.high:+.3g}), tolerance {tolerance:g} {unit}"
    answer, note = UNKNOWN, "the interval holds both more and less than the tolerance"
    if test.low >= -tolerance:
        answer, note = (UNKNOWN, f"within it, but {len(bad)} diverged: no yes") if bad else (YES, "")
    elif test.high < -tolerance:
        answer, note = NO, ""
    return Verdict("final", arm["name"], answer, figures, sentence(said, note, *absent, caution(test)))


def finals(results: Results) -> list[Verdict]:
    """Of every treatment and control."""
    return [verdict(results, arm) for arm in arms(results, "treatment", "control")]
