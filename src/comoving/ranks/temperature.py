"""Ranks by a schedule that validation can hold back."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

from ..frames.base import Ranks
from ..validate import check_choice, check_float, check_int
from .base import Notches, Reading, Record, heard


@dataclass(frozen=True)
class Temperature(Notches):
    """Ranks start high and end low: the factor of the layout's ranks goes from ``start`` to ``end``.

    cosine       end + (start - end) (1 + cos(pi t / steps)) / 2
    exponential  start (end / start)^(t / steps)

    at step t, from 0, and ``end`` after ``steps``; the product is rounded up to an admissible rank. Whenever
    ``patience`` validation losses in a row, see :meth:`comoving.LowRankOptimizer.report_validation`, have not gone
    below the best one, ranks rise by one notch over the schedule, never beyond where they started.

    Args:
        start: >= 1.
        end: in (0, 1].
        steps: >= 1.
        curve: "cosine" or "exponential".
        patience: reports, >= 1.
        minimum, maximum, step: see :class:`comoving.ranks.base.Notches`.
    """

    start: float = 2.0
    end: float = 0.5
    steps: int = 10_000
    curve: Literal["cosine", "exponential"] = "cosine"
    patience: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("start", self.start, 1.0)
        check_float("end", self.end, 0.0, 1.0, open_low=True)
        check_int("steps", self.steps, 1)
        check_choice("curve", self.curve, ("cosine", "exponential"))
        check_int("patience", self.patience, 1)

    def factor(self, tick: int) -> float:
        """Of the layout's ranks, at a step."""
        done = min(tick / self.steps, 1.0)
        if self.curve == "cosine":
            return self.end + (self.start - self.end) * (1 + cos(pi * done)) / 2
        return self.start * (self.end / self.start) ** done

    def initial(self, base: Ranks, shape: tuple[int, ...]) -> Ranks:
        """At step 0."""
        return self._at(base, shape, 0, 0)

    def wanted(
        self, reading: Reading, ranks: Ranks, base: Ranks, shape: tuple[int, ...], tick: int, notches: int
    ) -> Ranks:
        """By the schedule alone; the reading decides which directions go."""
        return self._at(base, shape, tick, notches)

    def heard(self, record: Record, loss: float) -> Record:
        """One notch more after ``patience`` reports without improvement."""
        record = heard(record, loss)
        return record if record.stale < self.patience else record._replace(stale=0, notches=record.notches + 1)

    def _at(self, base: Ranks, shape: tuple[int, ...], tick: int, notches: int) -> Ranks:
        return tuple(
            None
            if r is None
            else self.at_least(
                d, min(self.factor(tick) * r + notches * (self.step if d > self.step else 1), self.start * r)
            )
            for r, d in zip(base, shape, strict=True)
        )
