"""What the engine asks of a finder."""

from typing import Protocol

from ..frames import ModeFrame
from .operand import Operand


class Finder(Protocol):
    """Finds a frame for an operand; a frozen dataclass of hyper-parameters, without tensors.

    ``momentum`` is rho in the operand rho F m/c1 + (1 - rho) g~ that the engine builds: the share of what is looked at
    that comes from the first moment instead of the newest gradient.
    """

    @property
    def momentum(self) -> float:
        """rho, in [0, 1)."""
        ...

    def find(self, operand: Operand, start: ModeFrame, warm: bool) -> ModeFrame:
        """A frame with start's ranks.

        Args:
            operand: what the frame should capture.
            start: an orthonormal frame of the wanted ranks: the last one (padded or cut where ranks have changed), or a
                seeded random one.
            warm: whether start carries information, that is, stems from an earlier refresh.

        Returns:
            An orthonormal frame with start's ranks. Where the operand is zero or rank-deficient, the directions that it
            leaves open are taken from start or completed to an orthonormal set; never NaN for finite input.
        """
        ...
