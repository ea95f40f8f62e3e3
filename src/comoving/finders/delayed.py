"""Frames that another finder has searched some steps before they are used."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cadence import Cadence, When
from ..codecs import Spec
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import over
from ..validate import check_int
from .base import Finder, Memory, check_inner
from .operand import Operand
from .power import Power

FACTOR = "next.{}"
"""The slot, by the mode, for a factor of the frame that is to come."""
DUE = "due"
"""The slot for the step from which on it is used; 0 where none is to come."""


@dataclass(frozen=True)
class Delayed:
    """The frame in use from step t on is the inner finder's of step t - k, k >= 1 (the field ``by``).

        F_t = inner(O_{t-k}, F_{t-k}),   O_s = rho F m/c1 + (1 - rho) g~_s as step s began

    O_s is what a refresh at step s would look at, and the search goes on from the frame that is in use at that step.
    When frames are refreshed is left to the cadence, and moments are carried over at step t, as ever. So a search may
    take as long as k steps take: forward passes, backward passes and updates. On a CUDA device it runs on a stream of
    its own beside them, from the moment at which its gradient is there; see :mod:`comoving.searches`.

    A frame is searched at once, as without the delay, where nothing was begun k steps before: at a parameter's first
    refresh, at those of its first k - 1 steps, where ranks have changed, and where a period was edited so that a
    refresh comes sooner.

    It keeps what the inner finder does, the frame to come, (d_n, r_n) in the working dtype for each compressed mode,
    and the step that this is for: one integer on the host.

    Args:
        inner: a finder of mode-wise frames, whose inertia is that of this one. It may remember single numbers of the
            host alone, as :class:`comoving.finders.Randomized` counts its draws.
        by: k >= 1. No refresh period may be shorter.

    Raises:
        TypeError, ValueError: a field of another type, or outside its interval.
    """

    fills = (ModeFrame,)

    inner: Finder = field(default_factory=Power)
    by: int = 1

    def __post_init__(self) -> None:
        check_inner(self.inner)
        check_int("by", self.by, 1)

    @property
    def ahead(self) -> int:
        """k."""
        return self.by

    @property
    def batched(self) -> bool:
        """As the inner finder."""
        return self.inner.batched

    @property
    def alone(self) -> bool:
        """As the inner finder."""
        return self.inner.alone

    @property
    def joint(self) -> bool:
        """As the inner finder."""
        return self.inner.joint

    @property
    def inertia(self) -> float:
        """The inner finder's."""
        return self.inner.inertia

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """What the inner finder remembers, the frame to come, and when it is used.

        Raises:
            ValueError: an inner finder that remembers tensors.
        """
        found = self.inner.schema(shape, ranks, dtype)
        if kept := [name for name, spec in found.items() if spec.shape or spec.dtype.is_floating_point]:
            raise ValueError(
                f"finder {self} is refused: {self.inner} keeps {', '.join(map(repr, kept))} of past gradients up to "
                f"date, which a search that still goes on would read or write; use Power(), Amortized(), Randomized() "
                f"or Exact()"
            )
        for n, (d, r) in enumerate(zip(shape, ranks, strict=True)):
            if r is not None:
                found[FACTOR.format(n)] = Spec((d, r), dtype)
        return found | {DUE: Spec((), torch.int64, scalar=True, own=True)}

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Nothing to note."""

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """The inner finder's frame, of this operand: where there is nothing to wait for."""
        found: ModeFrame = self.inner.find(operand, start, warm, memory)
        return found


def is_awaited(name: str) -> bool:
    """Whether a slot is one of those for a frame that is to come: these are replaced, and never written to."""
    return name == DUE or name.startswith(FACTOR.format(""))


def searched(finder: Finder, operand: Operand, start: ModeFrame, memory: Mapping[str, Tensor]) -> Memory:
    """What a search leaves in the memory: the frame to come, and what the inner finder remembers."""
    own = {name: x for name, x in memory.items() if not is_awaited(name)}
    found: ModeFrame = finder.find(operand, start, True, own)
    # A factor may be the one that it started from, and slots share no memory.
    factors = {
        FACTOR.format(n): u.clone() if any(u is v for v in start.factors) else u
        for n, u in enumerate(found.factors)
        if u is not None
    }
    return own | factors


def foreseen(finder: Finder, cadence: Cadence, slots: Mapping[str, Tensor], when: When) -> bool:
    """Whether a refresh is due as many steps after this one as its frame is searched ahead, and none before that.

    Args:
        finder: whose frames may be searched ahead.
        cadence: says when refreshes are due.
        slots: its own.
        when: this step, whose own refresh has been made.
    """
    return finder.ahead > 0 and [
        cadence.due(slots, when._replace(tick=when.tick + later)) for later in range(1, finder.ahead + 1)
    ] == [False] * (finder.ahead - 1) + [True]


def announced(memory: Mapping[str, Tensor], tick: int) -> Tensor:
    """For which rows a frame is to be used from this step on, (*rows) bool, on the host."""
    return memory[DUE] == tick


def announcing(memory: Mapping[str, Tensor], tick: int) -> Tensor:
    """What says that a frame is used from this step on; 0 for none."""
    return torch.full_like(memory[DUE], tick)


def come(memory: Mapping[str, Tensor], order: int) -> ModeFrame:
    """The frame to come, in tensors of its own; modes without a factor are whole."""
    factors = (memory.get(FACTOR.format(n)) for n in range(order))
    return ModeFrame(tuple(None if u is None else u.clone() for u in factors))


def of_each(which: Tensor, one: ModeFrame, other: ModeFrame) -> ModeFrame:
    """One frame of the rows that are marked, the other of the rest."""

    def chosen(u: Tensor | None, v: Tensor | None) -> Tensor | None:
        return None if u is None or v is None else torch.where(over(which.to(u.device), u), u, v)

    return ModeFrame(tuple(map(chosen, one.factors, other.factors)))
