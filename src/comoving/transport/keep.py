"""Moments that stay where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..clock import Clock
from ..frames import Overlap
from ..slots import Slot
from .base import Slotless, State


@dataclass(frozen=True)
class Keep(Slotless):
    """The numbers stay where they are, in coordinates that have changed (GaLore, arXiv 2403.03507)."""

    resizes = projects = restarts = False
    batched: ClassVar[bool] = True

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """The same tensors."""
        return {slot.name: state[slot.name] for slot in rule if slot.name in state}
