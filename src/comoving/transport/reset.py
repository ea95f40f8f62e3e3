"""Moments that start again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..clock import Clock
from ..frames import Overlap
from ..slots import Kind, Slot
from .base import Slotless, State, anew


@dataclass(frozen=True)
class Reset(Slotless):
    """All moments start again at zero, bases at the identity, and the step count of the bias correction at zero."""

    resizes = restarts = True
    projects = False
    batched: ClassVar[bool] = True

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """Zeros in the new shape, and t = 0 in place."""
        clock.t.zero_()
        kept = [slot for slot in rule if slot.kind is not Kind.CACHE]
        return {slot.name: anew(slot, state[slot.name], overlap, clock.rows) for slot in kept}
