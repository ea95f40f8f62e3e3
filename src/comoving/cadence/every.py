"""The same interval, always."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..codecs import Spec
from .base import Slots, When


@dataclass(frozen=True)
class Every:
    """A refresh at each step t = phase modulo tau, the group's ``refresh_every``, as GaLore has it (arXiv 2403.03507).

    Where tau is edited the next refresh is at the next such step. It keeps nothing.
    """

    batched: ClassVar[bool] = True
    alone: ClassVar[bool] = False
    compares: ClassVar[tuple[type, ...]] = ()

    def schema(self) -> dict[str, Spec]:
        """None."""
        return {}

    def due(self, slots: Slots, when: When) -> bool:
        """Whether t = phase modulo tau."""
        return when.tick % when.every == when.phase % when.every

    def refreshed(self, slots: Slots, last: Any, new: Any, when: When) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}
