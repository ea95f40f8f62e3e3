"""Signs of interpolated momentum."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..clock import Clock
from ..linalg import lerp, lerp_, sgn_
from ..slots import Kind, Slot
from ..validate import check_float
from .adam import FIRST
from .passing import hand_over, taken


@dataclass(frozen=True)
class Lion:
    """Lion (arXiv 2302.06675): a single moment, and steps of one size.

    d = sgn( b1 m + (1 - b1) z )        sgn(c) = c/|c|, 0 at 0: the phase of a complex number
    m <- b2 m + (1 - b2) z              after it

    Args:
        b1: of the interpolation, in [0, 1); None for the group's first.
        b2: of the momentum, in [0, 1); None for the group's second.
    """

    b1: float | None = None
    b2: float | None = None

    momentum = FIRST
    definite = False
    corrected = True
    linear = True
    elementwise: ClassVar[bool] = True
    timeless: ClassVar[bool] = True
    replays = True
    replaces: ClassVar[bool] = False
    total: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            value = getattr(self, name)
            if value is not None:
                check_float(name, value, 0.0, 1.0, open_high=True)

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m."""
        return (Slot(FIRST, Kind.LINEAR),)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b2, 1 - b2)."""
        b2 = clock.beta2 if self.b2 is None else self.b2
        return b2, 1 - b2

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """m, in place, after the interpolation."""
        b1 = clock.beta1 if self.b1 is None else self.b1
        m = state[FIRST]
        hand_over(state, lerp(m, z, 1 - b1))
        lerp_(m, z, self.recursion(clock)[1])

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor; eps does not count."""
        return sgn_(taken(state))
