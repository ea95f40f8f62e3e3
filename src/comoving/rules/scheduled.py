"""Adam with decay rates that change with time."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..clock import Clock
from ..linalg import abs_squared, lerp
from ..slots import Kind, Slot
from ..validate import check_float
from .adam import FIRST, SECOND


@dataclass(frozen=True)
class Scheduled:
    """The moments of SMMF (arXiv 2412.08894): Adam without bias correction, decay rates by the step t = 1, 2, ...

    b1_t = b1 growth^(t-1),   b2_t = 1 - t^decay
    m <- b1_t m + (1 - b1_t) z
    v <- b2_t v + (1 - b2_t) |z|^2
    d = m / (sqrt(v) + eps)

    b1 is the group's first decay rate; its second does not count. Since b2_1 = 0, all of v is an average of squares.

    Args:
        growth: in (0, 1].
        decay: < 0.
    """

    growth: float = 0.999
    decay: float = -0.5

    momentum = FIRST
    definite = False
    corrected = False
    """Not by the group's decay rates, on which transports that follow the frame would have to rely."""
    linear = True
    elementwise: ClassVar[bool] = True
    timeless: ClassVar[bool] = False
    replays = False
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_float("growth", self.growth, 0.0, 1.0, open_low=True)
        check_float("decay", self.decay, float("-inf"), 0.0, open_high=True)

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m and v."""
        return Slot(FIRST, Kind.LINEAR), Slot(SECOND, Kind.VARIANCE, mean=FIRST)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b1_t, 1 - b1_t) of the coming step."""
        b1 = self._first_decay(clock, clock.tick + 1)
        return b1, 1 - b1

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """The two averages."""
        state[FIRST] = lerp(state[FIRST], z, 1 - self._first_decay(clock, clock.tick))
        intake = clock.t.double().clamp_min(1) ** self.decay  # of v: t starts anew where v does
        state[SECOND] = (state[SECOND] * (1 - intake)).add_(abs_squared(z).mul_(intake))

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor."""
        return state[FIRST] / state[SECOND].sqrt().add_(eps)

    def _first_decay(self, clock: Clock, step: int) -> float:
        return clock.beta1 * self.growth ** (max(step, 1) - 1)
