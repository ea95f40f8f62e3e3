"""What a verdict is, and how the runs of a study are paired."""

from dataclasses import dataclass
from typing import Any

from comoving.lab.statistics import Paired, finite, quantile

YES, NO, UNKNOWN = "yes", "no", "not enough evidence"
ANSWERS = (YES, NO, UNKNOWN)
SEEDS = 3
"""Fewer pairs than this never give an answer by statistics."""
SIGNIFICANT = 0.05

Results = dict[str, Any]
Arm = dict[str, Any]
Run = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One answer.

    Attributes:
        criterion: what is asked; the key of its rule in :data:`comoving.lab.verdicts.RULES`, a colon, and the detail.
        arm: of which arm (or arms).
        answer: "yes", "no" or "not enough evidence".
        figures: the numbers behind it; None where a number does not exist.
        text: one line for readers.

    Raises:
        ValueError: any other answer.
    """

    criterion: str
    arm: str
    answer: str
    figures: dict[str, Any]
    text: str

    def __post_init__(self) -> None:
        if self.answer not in ANSWERS:
            raise ValueError(f"answer = {self.answer!r} is none of {', '.join(ANSWERS)}")


def arms(results: Results, *roles: str) -> list[Arm]:
    """The arms with one of ``roles``, all without any."""
    return [arm for arm in results.get("arms") or [] if not roles or arm.get("role") in roles]


def baseline_of(results: Results, arm: Arm) -> Arm | None:
    """The baseline of the same task."""
    return next((b for b in arms(results, "baseline") if b.get("task") == arm.get("task")), None)


def runs(arm: Arm | None) -> dict[int, Run]:
    """The runs of an arm by their seed: those that took place, to whatever end."""
    found = [run for run in (arm or {}).get("runs") or [] if run and "seed" in run]
    return {int(run["seed"]): run for run in found if run.get("status") in ("finished", "diverged")}


def seeds(results: Results, *of: Arm | None) -> list[int]:
    """The seeds the study was to have, and any others there are."""
    return sorted({*range(int(results.get("seeds") or 0)), *(seed for arm in of for seed in runs(arm))})


def final(run: Run | None) -> float | None:
    """The value on test data at the end of a run that finished."""
    return finite(run.get("final")) if run is not None and run.get("status") == "finished" else None


def validated(run: Run | None) -> float | None:
    """The last value of a finished run's curve, from which the targets on that curve are counted."""
    curve = (run.get("curve") or []) if run is not None and run.get("status") == "finished" else []
    return finite(curve[-1].get("value")) if curve else None


def diverged(arm: Arm | None) -> list[int]:
    """Seeds whose run diverged."""
    return [seed for seed, run in runs(arm).items() if run.get("status") == "diverged"]


def gap_sign(results: Results) -> int:
    """1 where larger is better, else -1."""
    return 1 if results["metric"]["goal"] == "max" else -1


def missing(results: Results, arm: Arm, baseline: Arm | None) -> list[str]:
    """Words for every run of the two that is not there or did not finish."""
    said: list[str] = []
    for who in (arm,) if baseline is None or baseline is arm else (arm, baseline):
        found, bad = runs(who), diverged(who)
        wanted = seeds(results, arm, baseline)
        absent = [s for s in wanted if s not in found]
        other = [s for s in wanted if s in found and s not in bad and final(found[s]) is None]
        errors = [run.get("error") for run in who.get("runs") or [] if run and run.get("seed") in absent]
        reasons = dict.fromkeys(str(error) for error in [who.get("error"), *errors] if error)
        reason = f" ({'; '.join(reasons)})" if reasons else ""
        if not found:
            said.append(f"{who['name']} has no run{reason}")
            continue
        if bad:
            said.append(f"{who['name']} diverged in {len(bad)} of {len(wanted)} seeds ({listing(bad)})")
        if absent:
            said.append(f"{who['name']} lacks seed {listing(absent)}{reason}")
        if other:
            said.append(f"{who['name']} did not finish seed {listing(other)}")
    return said


def listing(numbers: list[int]) -> str:
    """1, 2, 3."""
    return ", ".join(str(number) for number in numbers)


def few(count: int) -> str:
    """Why so few pairs give no answer."""
    return f"{count} complete pair{'' if count == 1 else 's'}, at least {SEEDS} are needed"


def caution(test: Paired) -> str:
    """How little three seeds are."""
    if test.count != SEEDS:
        return f"{test.count} seeds"
    return f"only 3 seeds (2 degrees of freedom: the interval is {quantile(2):.2f} standard errors to each side)"


def undefined(test: Paired) -> str | None:
    """Why a test has no interval; None if it has one."""
    if test.count < SEEDS:
        return few(test.count)
    if test.low is None:
        return f"the difference is the same in all {test.count} seeds, so that its error is unknown"
    return None


def probability(p: float | None) -> str:
    """A p with two figures, none of them false."""
    if p is None:
        return "p undefined"
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def sentence(*parts: str) -> str:
    """The parts that are there, joined."""
    return "; ".join(part for part in parts if part)
