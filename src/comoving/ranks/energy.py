"""Ranks by captured energy."""

from dataclasses import dataclass

from ..frames.base import Ranks
from ..validate import check_float
from .base import Notches, Reading


@dataclass(frozen=True)
class Energy(Notches):
    """Each mode captures between ``low`` and ``high`` of the gradient's energy; nothing changes in between.

    The share is |U_n^H g|^2 / |g|^2 of the newest gradient at a refresh, in the frame that was in use. Below ``low`` a
    mode grows by one notch; it shrinks, at once, to the lowest rank at which its directions of most momentum still
    capture ``high``. Since high > low, neither change calls for the other.

    Args:
        low: in [0, 1).
        high: in (low, 1].
        minimum, maximum, step: see :class:`comoving.ranks.base.Notches`.
    """

    low: float = 0.5
    high: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("low", self.low, 0.0, 1.0, open_high=True)
        check_float("high", self.high, self.low, 1.0, open_low=True)

    def wanted(
        self, reading: Reading, ranks: Ranks, base: Ranks, shape: tuple[int, ...], tick: int, notches: int
    ) -> Ranks:
        """By the reading alone."""
        return self.within(reading, ranks, shape, 1 - self.low, 1 - self.high)
