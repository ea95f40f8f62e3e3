"""Adam in the core."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..clock import Clock
from ..linalg import abs_squared, lerp, quotient
from ..slots import Kind, Slot
from ..transport import mass_of

FIRST, SECOND = "moment.first", "moment.second"


@dataclass(frozen=True)
class Adam:
    """Adam (arXiv 1412.6980) with bias correction, real second moments for complex z.

    m <- b1 m + (1 - b1) z
    v <- b2 v + (1 - b2) |z|^2
    d = (m / c1) / (sqrt(v / c2) + eps),     c = 1 - b^t

    Where the transport carries a mass kappa of v, kappa stands in place of c2. m has z's dtype, v is real.
    """

    momentum = FIRST
    definite = False
    corrected = True
    linear = True
    elementwise: ClassVar[bool] = True
    timeless: ClassVar[bool] = True
    replays = True
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m and v."""
        return Slot(FIRST, Kind.LINEAR), Slot(SECOND, Kind.VARIANCE, mean=FIRST)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b1, 1 - b1)."""
        return clock.beta1, 1 - clock.beta1

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """The two averages."""
        state[FIRST] = lerp(state[FIRST], z, 1 - clock.beta1)
        v = state[SECOND] * clock.beta2
        if z.is_complex():
            state[SECOND] = v.add_(abs_squared(z), alpha=1 - clock.beta2)
        else:
            state[SECOND] = v.addcmul_(z, z, value=1 - clock.beta2)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor."""
        mass = state.get(mass_of(SECOND))
        root = (clock.weight2 if mass is None else mass) ** 0.5
        scale = state[SECOND].sqrt().add_(eps * root).mul_(clock.weight1 / root)  # (sqrt(v / c2) + eps) c1
        return quotient(state[FIRST], scale)
