"""Ranks by relative error."""

from dataclasses import dataclass

from ..frames.base import Ranks
from ..validate import check_float
from .base import Notches, Reading


@dataclass(frozen=True)
class Tolerance(Notches):
    """The smallest ranks whose relative error |g - F F^H g| / |g| = sqrt(1 - captured) stays at or below ``error``.

    Each of N compressed modes may leave error^2 / N of the energy outside, which bounds the error of the whole frame. A
    mode above that grows by one notch at a refresh; it shrinks, at once, to the lowest rank at which it is still below
    (margin error)^2 / N.

    Args:
        error: in (0, 1); shares are measured in the gradient's precision, so that below 1e-3 float32 says little.
        margin: hysteresis, in (0, 1): the share of ``error`` that a shrunk frame may make.
        minimum, maximum, step: see :class:`comoving.ranks.base.Notches`.
    """

    error: float = 0.3
    margin: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("error", self.error, 0.0, 1.0, open_low=True, open_high=True)
        check_float("margin", self.margin, 0.0, 1.0, open_low=True, open_high=True)

    def wanted(
        self, reading: Reading, ranks: Ranks, base: Ranks, shape: tuple[int, ...], tick: int, notches: int
    ) -> Ranks:
        """By the reading alone."""
        share = self.error**2 / sum(r is not None for r in ranks)
        return self.within(reading, ranks, shape, share, self.margin**2 * share)
