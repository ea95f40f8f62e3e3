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

    def reentry(self, clock: Clock) -> float:
        """The factor with which momentum that a new frame loses must re-enter as gradient."""
        ...

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """Take z, the projected gradient, into the moments, in place; the clock already counts this step."""
        ...

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """The direction in the core, with entries of about unit size; a new tensor of z's shape and dtype."""
        ...
