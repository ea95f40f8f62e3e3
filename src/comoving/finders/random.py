"""A new random frame at each refresh."""

from dataclasses import dataclass

from ..frames import SeededFrame
from .base import Memory, Memoryless, check_start
from .operand import Operand


@dataclass(frozen=True)
class RandomProjection(Memoryless):
    """A random orthonormal frame, drawn anew at each refresh from a seed that the last one determines.

    For frames of :class:`comoving.frames.Seeded`. It looks neither at the gradient nor at the momentum: rho is 0.
    """

    fills = (SeededFrame,)
    batched = True
    alone = True  # what is drawn is drawn row by row, and costs least where it is staggered
    joint = True
    ahead = 0

    @property
    def inertia(self) -> float:
        """0: nothing is looked at."""
        return 0.0

    def find(self, operand: Operand, start: SeededFrame, warm: bool, memory: Memory) -> SeededFrame:
        """The frame after ``start``; ``start`` itself, just drawn, where it is the first."""
        check_start(self, start)
        return start.next() if warm else start
