"""The average of gradients, and nothing else."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..clock import Clock
from ..linalg import lerp
from ..slots import Kind, Slot
from ..validate import check_choice
from .adam import FIRST
from .passing import hand_over, taken


@dataclass(frozen=True)
class Momentum:
    """m <- b1 m + (1 - b1) z, and m is the direction; or b1 m + (1 - b1) z, of the new m, with ``nesterov``.

    It has the size of the gradients: entries of unit size are up to what preconditions them, as in Flora
    (arXiv 2402.03293), where Adafactor does.

    With ``nesterov`` that is 1 - b1 times what torch's SGD with Nesterov's momentum steps by, since that sums gradients
    where this averages them.

    Args:
        corrected: divide the direction by the sum of its weights, as Adam does, where plain averages start small. That
            is 1 - b1^t, and with ``nesterov`` 1 - b1^(t+1).
        nesterov: look ahead by one average of the same gradient.
    """

    momentum = FIRST
    definite = False
    linear = True
    elementwise: ClassVar[bool] = True
    timeless: ClassVar[bool] = True
    replays = True
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    corrected: bool = False
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_choice("corrected", self.corrected, (True, False))
        check_choice("nesterov", self.nesterov, (True, False))

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m."""
        return (Slot(FIRST, Kind.LINEAR),)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b1, 1 - b1)."""
        return clock.beta1, 1 - clock.beta1

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """The average."""
        state[FIRST] = lerp(state[FIRST], z, 1 - clock.beta1)
        if self.nesterov:
            hand_over(state, z)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """m, or what looks ahead of it; a new tensor."""
        if not self.nesterov:
            return state[FIRST] / clock.weight1 if self.corrected else state[FIRST].clone()
        ahead = lerp(state[FIRST], taken(state), 1 - clock.beta1)
        return ahead / (clock.beta1 * clock.weight1 + 1 - clock.beta1) if self.corrected else ahead
