"""No search at all."""

from dataclasses import dataclass

from ..frames import PooledFrame
from .base import Memory, Memoryless, check_start
from .operand import Operand


@dataclass(frozen=True)
class Standing(Memoryless):
    """The frame that the layout starts with, at every refresh: for :class:`comoving.frames.Pooled`.

    It looks neither at the gradient nor at the momentum: rho is 0.
    """

    fills = (PooledFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0

    @property
    def inertia(self) -> float:
        """0: nothing is looked at."""
        return 0.0

    def find(self, operand: Operand, start: PooledFrame, warm: bool, memory: Memory) -> PooledFrame:
        """``start``."""
        check_start(self, start)
        return start
