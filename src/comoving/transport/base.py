"""What the engine asks of a transport, and what transports share."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..clock import Clock
from ..frames import Overlap
from ..linalg.cosine import cosine_columns
from ..slots import Kind, Slot

State = dict[str, Tensor]


class Transport(Protocol):
    """Moves the slots of a rule from one frame to the next; a frozen dataclass without tensors."""

    batched: ClassVar[bool]
    """Whether it serves the rows of a batch (``Clock.rows``), every one as if it were alone."""

    @property
    def resizes(self) -> bool:
        """Whether moments can go between frames of different ranks."""
        ...

    @property
    def projects(self) -> bool:
        """Whether a LINEAR slot becomes m' = R m."""
        ...

    @property
    def restarts(self) -> bool:
        """Whether a refresh sets the step count of the rule back to zero, in place."""
        ...

    def slots(self, rule: Sequence[Slot]) -> tuple[Slot, ...]:
        """Slots of the transport's own, beside the rule's."""
        ...

    def age(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """Bring those slots up to date, in place, after the rule has taken in one more gradient."""
        ...

    def adopt(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """Add the transport's own slots to moments that were made without it, such as those of torch's AdamW."""
        ...

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """The slots in the new frame, the given ones staying as they are; without CACHEs that are out of date."""
        ...


class Slotless:
    """What transports without slots of their own share."""

    def slots(self, rule: Sequence[Slot]) -> tuple[Slot, ...]:
        """None."""
        return ()

    def age(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """Nothing to do."""

    def adopt(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """Nothing to add."""


def initial(slot: Slot, x: Tensor) -> Tensor:
    """What a slot starts from, in place: the identity for a basis, waves where they are declared, else zero."""
    if slot.waves:
        return x.copy_(cosine_columns(x.shape[-2], torch.arange(x.shape[-1], device=x.device), x.dtype.to_real()))
    return x.copy_(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)) if slot.kind is Kind.BASIS else x.zero_()


def anew(slot: Slot, x: Tensor, overlap: Overlap, rows: int) -> Tensor:
    """The slot's first value in the new core's shape."""
    if slot.kind is Kind.SCALAR:
        return torch.zeros_like(x)
    if slot.mode < 0:
        return x.new_zeros(overlap.moved_shape(x))
    r = overlap.matrices[slot.mode]
    size = x.shape[-1] if r is None else r.shape[-2]
    return initial(slot, x.new_empty((*x.shape[:rows], *(size,) * (x.ndim - rows))))
