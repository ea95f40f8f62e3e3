"""What the engine asks of a rule."""

from typing import ClassVar, Protocol

from torch import Tensor

from ..clock import Clock
from ..slots import Slot


class Rule(Protocol):
    """Turns the projected gradient into a direction; a frozen dataclass of hyper-parameters, without tensors."""

    elementwise: ClassVar[bool]
    """Whether an entry of its direction depends on the same entry of past gradients alone."""
    timeless: ClassVar[bool]
    """Whether it reads no tick of the clock, and decomposes nothing, so that one compiled graph serves all steps."""
    replaces: ClassVar[bool]
    """Whether it puts new tensors into its slots and leaves the old ones as they are; a rule that changes them in place
    is given copies, unless it is ``total`` and its slots are as large as the parameter."""
    total: ClassVar[bool]
    """Whether it is so simple that it cannot fail."""
    batched: ClassVar[bool]
    """Whether it serves the rows of a batch (``Clock.rows``), every one as if it were alone."""

    @property
    def replays(self) -> bool:
        """Whether it calls the same operations with the same numbers at every step, and never waits for the device.

        The clock's weights are no such numbers: where a step is recorded they are tensors. Only then can a CUDA graph
        of one step be replayed for others; see :meth:`comoving.LowRankOptimizer.capture`.
        """
        ...

    @property
    def definite(self) -> bool:
        """Whether its covariances must stay positive semi-definite, as they do not where a codec rounds them."""
        ...

    @property
    def corrected(self) -> bool:
        """Whether it makes up for averages that begin at zero; where it does not, no transport of variances may."""
        ...

    @property
    def linear(self) -> bool:
        """Whether its momentum is an average of gradients."""
        ...

    @property
    def momentum(self) -> str:
        """The LINEAR slot that finders and error feedback look at.

        A rule may have no such slot, and is then refused in frames that are not whole.
        """
        ...

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """The slots that the rule keeps for a core of this shape, that of one row of a batch.

        Raises:
            ValueError: a core that the rule cannot serve.
        """
        ...

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(a, b) of the momentum's recursion m <- a m + b z; both are what error feedback needs to know of the rule."""
        ...

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """Take z, the projected gradient, into the slots; the clock already counts this step.

        z has shape (*rows, r_1, ..., r_N), and the slots have the rows in front.
        The slots' tensors are replaced, or changed in place. z may be the caller's gradient, and is not changed.
        """
        ...

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """The direction in the core, with entries of about unit size; a new tensor of z's shape and dtype."""
        ...


def averaged(rule: Rule, momentum: Tensor, clock: Clock) -> Tensor:
    """The momentum as a weighted mean of past gradients: m divided by b (1 - a^t) / (1 - a). For Adam m / c1."""
    decay, intake = rule.recursion(clock)
    return momentum * ((1 - decay) / (intake * clock.weight(decay)))
