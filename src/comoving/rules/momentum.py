"""The average of gradients, and nothing else."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..clock import Clock
from ..linalg import lerp
from ..slots import Kind, Slot
from ..validate import check_choice
from .adam import FIRST


@dataclass(frozen=True)
class Momentum:
    """m <- b1 m + (1 - b1) z, and m is the direction.

    It has the size of the gradients: entries of unit size are up to what preconditions them, as in Flora
    (arXiv 2402.03293), where Adafactor does.

    Args:
        corrected: divide m by 1 - b1^t, as Adam does, where plain averages start small.
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

    def __post_init__(self) -> None:
        check_choice("corrected", self.corrected, (True, False))

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m."""
        return (Slot(FIRST, Kind.LINEAR),)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b1, 1 - b1)."""
        return clock.beta1, 1 - clock.beta1

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """The average."""
        state[FIRST] = lerp(state[FIRST], z, 1 - clock.beta1)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """m, or m / (1 - b1^t), a new tensor."""
        return state[FIRST] / clock.weight1 if self.corrected else state[FIRST].clone()
