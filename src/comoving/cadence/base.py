"""What the engine asks of a cadence."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..codecs import Spec

Slots = Mapping[str, Tensor]
"""A cadence's own tensors of one parameter, by the names of its ``schema``; none of them is changed."""


class When(NamedTuple):
    """A step, as a cadence is asked about it.

    Args:
        tick: how many steps the parameter has made before it, >= 0.
        every: tau, the group's ``refresh_every``, >= 1.
        phase: the parameter's own, >= 0; it counts modulo tau.
    """

    tick: int
    every: int
    phase: int

    def following(self, interval: int) -> int:
        """The step of the refresh after the one that is made now: so many steps later.

        Behind the first refresh it is the phase, or tau where that is 0, so that parameters stay staggered.
        """
        return self.tick + min(interval, LONGEST) if self.tick > 0 else self.phase % self.every or self.every


class Cadence(Protocol):
    """Says when a frame is refreshed; a frozen dataclass of hyper-parameters, without tensors.

    Nobody asks at a parameter's first step, nor where a loaded frame has other ranks than it should: then a refresh is
    due in any case. Of a batch every row fares as if it were alone.
    """

    batched: ClassVar[bool]
    """Whether it serves units with rows: slots whose spec is ``own`` then have the rows in front."""
    alone: ClassVar[bool]
    """Whether each frame is refreshed alone, at steps of its own: batches are stepped in between, and :meth:`refreshed`
    sees none. It has to be where what is decided for one row may differ from what is decided for another."""
    compares: ClassVar[tuple[type, ...]]
    """The types of frames that it can compare; none where it does not look at them."""

    def schema(self) -> dict[str, Spec]:
        """Its slots for one parameter; all of them start at zero, and stay as ranks change."""
        ...

    def due(self, slots: Slots, when: When) -> bool:
        """Whether the frame is refreshed at a step that is not the first one; of rows, whether any is.

        Args:
            slots: its own.
            when: the step.
        """
        ...

    def refreshed(self, slots: Slots, last: Any, new: Any, when: When) -> dict[str, Tensor]:
        """Its slots after a refresh.

        Args:
            slots: its own.
            last: the frame that the finder went on from, of the new one's type and ranks; None for one that was drawn.
            new: the frame that it has found.
            when: the step.
        """
        ...


LONGEST = 2**53
"""Steps that an interval has at most."""
NEXT = "next"
"""The slot for the step of the next refresh."""
number = Spec((), torch.int64, scalar=True)
"""A slot for an integer on the host, the same for all rows of a batch."""
own_number = number._replace(own=True)
"""Likewise, with one for each row."""


def on_host(value: int) -> Tensor:
    """An integer as it is kept in a slot: () int64, on the host."""
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def reached(slots: Slots, when: When) -> bool:
    """Whether the step in the slot "next" has come; of rows, that of any."""
    return when.tick >= int(slots[NEXT].amin())
