"""When a run reaches a target, and whether it exploded."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comoving.lab.statistics import finite
from comoving.race.runner import SPIKE_WINDOW, spikes

SHARES = (0.8, 0.9, 0.95)
"""Of what the baseline has gained at the end, in its own run of the same seed."""

Curve = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Crossing:
    """Where a held-out curve is first at its target or better.

    Attributes:
        step: between two evaluations by a straight line.
        seconds: the same of training time; None where no times were kept.
    """

    step: float
    seconds: float | None


@dataclass(frozen=True)
class Explosions:
    """What went wrong in one run.

    Attributes:
        diverged: the run ended so, or its loss or held-out value was not finite.
        left: the median of the last 20 training losses exceeds that of the first 20.
        spikes: steps whose training loss stands out of the 20 before it (:func:`comoving.race.runner.spikes`).
    """

    diverged: bool
    left: bool
    spikes: list[int]


def share_target(metric: dict[str, Any], final: float, share: float) -> float:
    """Origin + share * (final - origin), where the origin is the value of knowing nothing.

    Raises:
        ValueError: a share outside of (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} is not in (0, 1]")
    return metric["origin"] + share * (final - metric["origin"])


def labels(metric: dict[str, Any]) -> list[str]:
    """Names of all targets: the shares as percentages of the baseline's final, then the absolute ones with a unit."""
    return [*(share_label(share) for share in SHARES), *(absolute_label(metric, v) for v in metric.get("absolute", []))]


def share_label(share: float) -> str:
    """For example "90%"."""
    return f"{100 * share:g}%"


def absolute_label(metric: dict[str, Any], value: float) -> str:
    """For example "90 accuracy in %"."""
    return f"{value:g} {metric['name']}"


def targets(metric: dict[str, Any], final: float | None) -> dict[str, float | None]:
    """The value of each of :func:`labels` for the seed whose baseline ends at ``final``.

    A share of a final that is missing, or no better than the origin, is None.
    """
    gained = None if final is None else (final - metric["origin"]) * (1 if metric["goal"] == "max" else -1)
    known = final is not None and gained is not None and gained > 0
    found: dict[str, float | None] = {
        share_label(share): share_target(metric, final, share) if known and final is not None else None
        for share in SHARES
    }
    return found | {absolute_label(metric, value): float(value) for value in metric.get("absolute", [])}


def crossing(curve: Curve, target: float, goal: str) -> Crossing | None:
    """The first point of the curve, linear between evaluations, at ``target`` or better.

    Args:
        curve: evaluations with ``step``, ``value`` and (optionally) ``seconds``, in the order of their steps.
        target: a held-out value.
        goal: "max" if larger is better, "min" if smaller is.

    Returns:
        None if it is never reached before the end, or before the first value that is not finite.

    Raises:
        ValueError: any other goal, or a target that is not finite.
    """
    if goal not in ("max", "min"):
        raise ValueError(f'goal = {goal!r} is neither "max" nor "min"')
    if not math.isfinite(target):
        raise ValueError(f"target = {target} is not finite")
    sign = 1 if goal == "max" else -1
    before: tuple[float, float, float | None] | None = None
    for point in curve:
        value = finite(point.get("value"))
        if value is None:
            return None
        here = (value, float(point["step"]), finite(point.get("seconds")))
        if sign * (value - target) >= 0:
            if before is None:
                return Crossing(here[1], here[2])
            part = (target - before[0]) / (value - before[0])
            seconds = None if here[2] is None or before[2] is None else before[2] + part * (here[2] - before[2])
            return Crossing(before[1] + part * (here[1] - before[1]), seconds)
        before = here
    return None


def explosions(run: dict[str, Any]) -> Explosions:
    """What went wrong in a run: see :class:`Explosions`."""
    losses = [finite(loss) for loss in run.get("losses") or []]
    sound: list[float] = []
    for loss in losses:
        if loss is None:
            break
        sound.append(loss)
    values = [finite(point.get("value")) for point in run.get("curve") or []]
    diverged = run.get("status") == "diverged" or len(sound) < len(losses) or None in values
    window = SPIKE_WINDOW
    left = len(sound) >= 2 * window and statistics.median(sound[-window:]) > statistics.median(sound[:window])
    return Explosions(diverged, left, spikes(sound))
