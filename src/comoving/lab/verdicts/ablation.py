"""Ablation: what rank, layers, controls and the full-rank channel change; whether studies 1 and 2 coincide."""

from dataclasses import dataclass
from typing import Any

from comoving.lab.statistics import Paired, paired
from comoving.lab.verdicts import finals, speed
from comoving.lab.verdicts.base import (
    NO,
    UNKNOWN,
    YES,
    Arm,
    Results,
    Verdict,
    arms,
    caution,
    final,
    gap_sign,
    missing,
    runs,
    seeds,
    sentence,
    undefined,
)

RULE = (
    "Study 1 against 2. The gap is final(frozen) - final(zero) in the same seed, counted so that positive means that "
    "the random backbone helps. Widens: the paired difference of the gap at the lower rank (or half the layers) and "
    "the gap at the higher rank (or all layers). Yes: its 95% interval lies above 0. No: it lies below the tolerance. "
    "Else, or with fewer than 3 seeds: not enough evidence. Gap: yes if its interval lies outside the tolerance, no "
    "if inside (the two studies coincide)."
)
CONTROLS_RULE = (
    "Controls do not help (B1: the same increase everywhere, B2: random directions). Yes: the speed verdict of every "
    "control is no, or every treatment reaches 90% of the baseline's final significantly sooner (paired t, p < 0.05) "
    "than every control. No: a control's speed verdict is yes, and not every treatment is sooner than every control. "
    "Else: not enough evidence. Full-rank channel needed (B3: branches only). Yes: some B3 is no in speed or final, "
    "and none is yes in both. No: some B3 is yes in both. Else: not enough evidence."
)


@dataclass(frozen=True)
class Gap:
    """final(frozen) - final(zero) of one rank, set of layers and task, over the seeds."""

    rank: int
    layers: str
    task: str | None
    frozen: Arm
    zero: Arm
    values: list[float | None]
    test: Paired

    @property
    def name(self) -> str:
        """The two arms."""
        return f"{self.frozen['name']} - {self.zero['name']}"


def gaps(results: Results) -> list[Gap]:
    """Of every frozen arm that has its zero counterpart, by task, layers, falling rank."""
    sign = gap_sign(results)
    found: list[Gap] = []
    for frozen in (arm for arm in arms(results, "treatment") if arm.get("backbone") == "frozen"):
        same = [
            arm
            for arm in arms(results, "treatment")
            if arm.get("backbone") == "zero" and all(arm.get(f) == frozen.get(f) for f in ("rank", "layers", "task"))
        ]
        if not same or frozen.get("rank") is None:
            continue
        own, other = runs(frozen), runs(same[0])
        pairs = [(final(own.get(s)), final(other.get(s))) for s in _seeds(results)]
        first = [None if a is None else sign * a for a, _ in pairs]
        second = [None if b is None else sign * b for _, b in pairs]
        values = [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]
        key = (int(frozen["rank"]), frozen.get("layers") or "all", frozen.get("task"))
        found.append(Gap(*key, frozen, same[0], values, paired(first, second)))
    return sorted(found, key=lambda gap: (gap.task or "", gap.layers, -gap.rank))


def _seeds(results: Results) -> list[int]:
    """One list of seeds for the whole study, so that gaps can be paired."""
    return seeds(results, *arms(results))


def _gap_verdict(results: Results, gap: Gap) -> Verdict:
    """Whether frozen and zero differ at all."""
    tolerance, unit = float(results["metric"]["tolerance"]), results["metric"].get("unit", "")
    inside = within(gap.test, tolerance)
    answer = UNKNOWN if inside is None else NO if inside else YES
    return Verdict(
        "ablation: studies 1 and 2 differ", gap.name, answer, _figures(gap.test), _words(results, gap.test, unit, gap)
    )


def _figures(test: Paired) -> dict[str, Any]:
    return {"difference": test.mean, "low": test.low, "high": test.high, "p": test.p, "pairs": test.count}


def _words(results: Results, test: Paired, unit: str, *of: Gap) -> str:
    """The difference, its interval, what is missing."""
    said = "" if test.mean is None else f"{test.mean:+.3g} {unit}"
    if test.low is not None:
        said += f" (95% CI {test.low:+.3g} to {test.high:+.3g})"
    lacking = [words for gap in of for words in missing(results, gap.frozen, gap.zero)]
    return sentence(said, undefined(test) or caution(test), *lacking)


def _widening(results: Results, what: str, small: Gap, large: Gap) -> Verdict:
    """Whether the gap of ``small`` exceeds that of ``large``."""
    tolerance, unit = float(results["metric"]["tolerance"]), results["metric"].get("unit", "")
    test = paired(small.values, large.values)
    answer = UNKNOWN
    if undefined(test) is None and test.low is not None and test.high is not None:
        answer = YES if test.low > 0 else NO if test.high < tolerance else UNKNOWN
    return Verdict(
        f"ablation: {what} widens",
        f"({small.name}) - ({large.name})",
        answer,
        _figures(test),
        _words(results, test, unit, small, large),
    )


def widenings(results: Results) -> list[Verdict]:
    """Of studies 1 and 2 where both are there: the gaps, and whether they widen with lower rank and fewer layers."""
    found = gaps(results)
    verdicts = [_gap_verdict(results, gap) for gap in found]
    for larger, smaller in zip(found, found[1:], strict=False):
        if (larger.task, larger.layers) == (smaller.task, smaller.layers):
            verdicts.append(_widening(results, "lower rank", smaller, larger))
    for half in (gap for gap in found if gap.layers == "half"):
        whole = [g for g in found if g.layers == "all" and (g.rank, g.task) == (half.rank, half.task)]
        verdicts += [_widening(results, "fewer layers", half, gap) for gap in whole]
    return verdicts


def within(test: Paired, tolerance: float) -> bool | None:
    """Whether the interval lies inside -+ tolerance (True) or outside (False); None if neither or too few seeds."""
    if undefined(test) is not None or test.low is None or test.high is None:
        return None
    if -tolerance <= test.low and test.high <= tolerance:
        return True
    return False if test.low > tolerance or test.high < -tolerance else None


def _planned(results: Results) -> list[Gap]:
    """The gaps that were there before any follow-up: all layers, the task itself, the ranks of the configuration."""
    ranks = (results.get("config") or {}).get("ranks")
    found = [gap for gap in gaps(results) if gap.layers == "all" and gap.task is None]
    return [gap for gap in found if ranks is None or gap.rank in ranks]


def coincide(results: Results) -> bool | None:
    """Whether studies 1 and 2 coincide: at every planned rank final(frozen) - final(zero) within the tolerance.

    Returns:
        True if the 95% interval of the paired difference lies inside -+ tolerance at every rank, False if it lies
        outside at some rank, None for not enough evidence (always with fewer than 3 seeds, or no pair of arms).
    """
    tolerance = float(results["metric"]["tolerance"])
    found = [within(gap.test, tolerance) for gap in _planned(results)]
    if False in found:
        return False
    return True if found and None not in found else None


def follow_up(results: Results) -> bool:
    """Whether the follow-ups (lower rank, fewer layers, harder task) are due.

    They are where the studies :func:`coincide`, and where the evidence is not enough but the mean difference is within
    the tolerance at every planned rank: with few seeds the question is open, and the follow-ups are what answers it.
    """
    answer = coincide(results)
    if answer is not None:
        return answer
    means = [gap.test.mean for gap in _planned(results)]
    return bool(means) and all(m is not None and abs(m) <= float(results["metric"]["tolerance"]) for m in means)


def controls(results: Results) -> list[Verdict]:
    """Whether the controls B1 and B2 fail to help, and whether B3 shows that the full-rank channel is needed."""
    named = arms(results, "control")
    usual = [arm for arm in named if arm["name"].startswith(("B1", "B2"))]
    only = [arm for arm in named if arm["name"].startswith("B3")]
    found: list[Verdict] = []
    if usual:
        answers = {arm["name"]: speed.speed(results, arm).answer for arm in usual}
        treatments = arms(results, "treatment")
        pairs = {(t["name"], c["name"]): speed.faster(results, t, c) for t in treatments for c in usual}
        beaten = bool(pairs) and all(pairs.values())
        answer = UNKNOWN
        if beaten or all(a == NO for a in answers.values()):
            answer = YES
        elif YES in answers.values():
            answer = NO
        won = sum(value is True for value in pairs.values())
        text = sentence(
            "speed: " + ", ".join(f"{name} {a}" for name, a in answers.items()),
            f"a treatment is significantly sooner than a control in {won} of {len(pairs)} pairs" if pairs else "",
        )
        figures: dict[str, Any] = {"speed": answers, "sooner": won, "pairs": len(pairs)}
        found.append(Verdict("controls: do not help", ", ".join(answers), answer, figures, text))
    if only:
        both = {arm["name"]: (speed.speed(results, arm).answer, finals.verdict(results, arm).answer) for arm in only}
        answer = UNKNOWN
        if (YES, YES) in both.values():
            answer = NO
        elif any(NO in pair for pair in both.values()):
            answer = YES
        text = ", ".join(f"{name}: speed {a}, final {b}" for name, (a, b) in both.items())
        figures = {"speed": {n: a for n, (a, _) in both.items()}, "final": {n: b for n, (_, b) in both.items()}}
        found.append(Verdict("controls: full-rank channel needed", ", ".join(both), answer, figures, text))
    return found
