"""Verdicts of a study, computed from its runs, paired over seeds; "not enough evidence" wherever that is the case."""

from comoving.lab.verdicts import ablation, finals, mechanism, speed, stability, stable
from comoving.lab.verdicts.ablation import coincide, follow_up
from comoving.lab.verdicts.base import ANSWERS, NO, UNKNOWN, YES, Results, Verdict

__all__ = ["ANSWERS", "NO", "RULES", "UNKNOWN", "YES", "Verdict", "coincide", "follow_up", "judge", "rule"]

RULES = {
    "speed": speed.RULE,
    "final": finals.RULE,
    "stability": stability.RULE,
    "mechanism": mechanism.RULE,
    "directions": stable.RULE,
    "ablation": ablation.RULE,
    "controls": ablation.CONTROLS_RULE,
}
"""What the word before the colon in a criterion asks, and when it is answered how."""


def rule(verdict: Verdict) -> str:
    """The rule of :data:`RULES` a verdict was made by."""
    return RULES[verdict.criterion.partition(":")[0]]


def judge(results: Results) -> list[Verdict]:
    """All verdicts on a study, in the order of :data:`RULES`.

    Works on whatever is there: runs that are missing or diverged are said in the text and never dropped in silence. The
    answers are one by one at a level of 5%; nothing corrects for how many there are.

    Args:
        results: what ``results.json`` of a study holds.

    Raises:
        ValueError: no arms or no metric in ``results``.
        ImportError: scipy is missing (extra ``lab``).
    """
    if not results.get("arms") or "metric" not in results:
        raise ValueError("results of a study need arms and a metric; is this its results.json?")
    found = [*speed.speeds(results), *finals.finals(results), *stability.stabilities(results)]
    found += [*mechanism.mechanisms(results), *stable.directions(results)]
    return found + [*ablation.widenings(results), *ablation.controls(results)]
