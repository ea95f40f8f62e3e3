"""What the engine asks of a rule."""

from typing import Protocol

from torch import Tensor

from ..slots import Slot
from ..transport import Clock


class Rule(Protocol):
    """Turns the projected gradient into a direction; a frozen dataclass of hyper-parameters, without tensors."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The moments that the rule keeps."""
        ...

    @property
    def momentum(self) -> str:
        """The LINEAR slot that finders and error feedback look at."""
        ...

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(a, b) of the momentum's recursion m <- a m + b z; both are what error feedback needs to know of the rule."""
        ...

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """Take z, the projected gradient, into the moments, in place; the clock already counts this step."""
        ...

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """The direction in the core, with entries of about unit size; a new tensor of z's shape and dtype."""
        ...
