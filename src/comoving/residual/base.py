"""What the engine asks of a residual."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..clock import Clock
from ..codecs import Codec, Spec
from ..comm import LOCAL, Comm
from ..finders import Operand
from ..frames import Frame, Overlap
from ..linalg import inner, norm, pairs


@dataclass(frozen=True)
class Passage:
    """The momentum's way through a step: m in the frame F, m' in the frame F', and at the end  decay m' + intake z.

    Args:
        frame: F', that of this step.
        momentum: m'.
        decay, intake: of the rule's recursion.
        old_frame: F; None where the parameter had no frame before.
        old_momentum: m, or None.
        overlap: of F' and F; None while the frame stands, F' = F.
        image: F'^H F m, what m' would be if nothing of m inside F' were dropped; None while the frame stands.
        tick: the number of finished steps.
        rows: how many dimensions in front of every tensor count the members of a batch, 0 or 1.
        comm: joins norms of what processes have of tensors whose cores all of them have; one process's, which leaves
            them as they are, where norms are joined later, or nobody asks.
    """

    frame: Frame
    momentum: Tensor
    decay: float
    intake: float
    old_frame: Frame | None = None
    old_momentum: Tensor | None = None
    overlap: Overlap | None = None
    image: Tensor | None = None
    tick: int = 0
    rows: int = 0
    comm: Comm = LOCAL

    @property
    def reentry(self) -> float:
        """decay / intake: the gradient that must come again for a unit of m that is lost."""
        return self.decay / self.intake

    def lost(self) -> Tensor:
        """|F m - F' m'|, real, (*rows): the root of |m|^2 + |m'|^2 - 2 Re <F'^H F m, m'>.

        A few rounding errors of |m|^2 are added, so that a bound that is built on it stays one.
        """
        if self.old_momentum is None or self.image is None:
            lead = self.momentum.shape[: self.rows] if self.rows else ()
            return torch.zeros(lead, device=self.momentum.device)
        before, after = norm(self.old_momentum, self.rows).square(), norm(self.momentum, self.rows).square()
        gap = before + after - 2 * inner(self.image, self.momentum, self.rows)
        return gap.clamp_min(0).add(before, alpha=8 * torch.finfo(torch.float32).eps).sqrt()


@dataclass(frozen=True)
class Cores:
    """What the frame holds of the gradients of a step.

    Args:
        total: z of all gradients since the last step.
        newest: what is used of the last of them alone.
        unsent: its coordinates less ``newest``, where they were rounded on the way to other processes; None for zero.
    """

    total: Tensor
    newest: Tensor
    unsent: Tensor | None = None

    @classmethod
    def only(cls, core: Tensor) -> "Cores":
        """Those of a step of one gradient."""
        return cls(core, core)


@dataclass(frozen=True)
class Update:
    """Steps 6 and 7 of one parameter: w <- shrink w + factor F d, and what the residual wants beside it.

    Or of a batch: then F, z, d and the weights have its members in front, as many dimensions as the clock says.

    Args:
        load: returns F; it may have to be drawn first.
        compressed: the modes along which F is compressed, None where it is not mode-wise.
        core: z, the coordinates of all gradients of this step.
        direction: d.
        factor: -lr scale; of a step that is recorded a tensor without dimensions, as are the next two.
        shrink: 1 - lr weight_decay; 1.0 without decay.
        rate: -lr.
        clock: that of the rule.
        eps: likewise.
        size: the norm of this step's gradient, (*rows), where it is known.
        moments: the rule's slots, and the transport's, as this step leaves them, decoded, not to be changed; none where
            the residual does not read them.
    """

    load: Callable[[], Frame]
    compressed: tuple[int, ...] | None
    core: Tensor
    direction: Tensor
    factor: float | Tensor
    shrink: float | Tensor
    rate: float | Tensor
    clock: Clock
    eps: float
    size: Tensor | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def rows(self) -> int:
        """How many dimensions in front count the members of a batch, 0 or 1."""
        return self.clock.rows

    @cached_property
    def frame(self) -> Frame:
        """F."""
        return self.load()

    def decay(self, weights: Tensor) -> None:
        """w <- shrink w, in place; nothing where there is no decay, which saves a pass over the weights."""
        if isinstance(self.shrink, Tensor) or self.shrink != 1.0:
            pairs(weights).mul_(self.shrink)

    def write(self, weights: Tensor) -> None:
        """w <- shrink w + factor F d, in place."""
        if isinstance(self.factor, Tensor) or isinstance(self.shrink, Tensor):
            self.decay(weights)
            self.frame.add_lift(weights, self.direction * self.factor, 1.0)
        else:
            self.frame.add_lift(weights, self.direction, self.factor, beta=self.shrink)

    def move(self, weights: Tensor, x: Tensor) -> None:
        """w <- shrink w + factor x, in place: an update of the whole tensor; x may be overwritten."""
        self.decay(weights)
        if isinstance(self.factor, Tensor):
            weights.add_(x.mul_(self.factor))
        else:
            weights.add_(x, alpha=self.factor)

    def add(self, weights: Tensor, x: Tensor, share: float = 1.0) -> None:
        """w <- w + rate share x, in place."""
        if isinstance(self.rate, Tensor):
            weights.add_(x * (self.rate * share))
        else:
            weights.add_(x, alpha=self.rate * share)


HELD, HELD_NORM = "held", "held.norm"
"""The slots for what a residual holds from :meth:`Residual.keep` to :meth:`Residual.write`, gone between two steps, and
for its norm, where it is a single gradient whose norm the engine knows."""


class Residual(Protocol):
    """Keeps, or does not keep, what the frame cannot hold; a frozen dataclass without tensors.

    Of a batch every tensor has its members in front, slots too, and each member fares as if it were alone.
    """

    batched: ClassVar[bool]
    """Whether batches can be kept: only then does a passage or a clock have ``rows`` other than 0."""
    alone: ClassVar[bool]
    """Whether frames are refreshed one by one, at steps of their own, so that :meth:`renew` sees no batch."""
    holds: ClassVar[bool]
    """Whether :meth:`keep` may hold on to the gradient itself until :meth:`write`."""
    feeds: ClassVar[bool]
    """Whether :meth:`keep` keeps something of a gradient for the steps that follow, and returns its norm."""
    entrywise: ClassVar[bool]
    """Whether entries of a gradient meet one another in products with the frame only, and in norms that are returned:
    so that a process may keep what it has some entries of, in modes that the frame leaves whole."""
    rescales: ClassVar[bool]
    """Whether :meth:`size` and :meth:`rescale` make sense."""
    bounded: ClassVar[bool]
    """Whether what is kept, or lost, is g~ outside the frame and what the momentum loses, or less: then
    :mod:`comoving.diagnostics` bound it."""

    reads: ClassVar[bool]
    """Whether :meth:`write` reads the rule's moments, ``Update.moments``, which are given to no other."""

    @property
    def replays(self) -> bool:
        """Whether it calls the same operations with the same numbers at every step between two refreshes.

        See :class:`comoving.rules.Rule`.
        """
        ...

    def renew(self, gradient: Tensor, state: dict[str, Tensor], codec: Codec) -> None:
        """A refresh comes: choose anew what lies outside the frame by choice. Before :meth:`split`."""
        ...

    def split(self, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
        """What the frame shall see of a gradient, which stays as it is; the residual takes the rest. At every call."""
        ...

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """The slots of the residual for a tensor and a core of these shapes, stored by the codec."""
        ...

    def restore(
        self, gradient: Tensor, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Operand:
        """g~, the gradient and what was kept. The gradient is not changed; without anything kept it is the operand.

        Args:
            gradient: of the view's shape and dtype.
            passage: that of a frame that stands: F, in which the last step was made, and m in it.
            opening: whether this is the first gradient since then.
            state: of the parameter, with the slots of :meth:`schema`.
            codec: that stores them.
        """
        ...

    def keep(
        self, dense: Tensor, cores: Cores, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Tensor | None:
        """Keep what of g~, and of the momentum that the change of frame loses, is outside the new frame.

        Slots are replaced, here and wherever a state is given, and their tensors left as they are: a step that fails
        later goes back to them.

        Args:
            dense: the dense part of what :meth:`restore` returned; it may be overwritten.
            cores: what the frame holds of the gradients.
            passage: what becomes of the momentum.
            opening: whether this is the first gradient since then.
            state: as in :meth:`restore`.
            codec: likewise.

        Returns:
            The Frobenius norm of what is kept, before encoding, (*rows); None of a residual that does not feed.
        """
        ...

    def size(self, core: Tensor, rest: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The norm of all gradients since the last step with what was restored: |g~|^2 = |z|^2 + |g~ - F z|^2; (*rows).

        Args:
            core: z.
            rest: the norm of the second part, as far as the engine knows it, (*rows).
            state: as in :meth:`restore`.
        """
        ...

    def rescale(self, factor: float, core: Tensor, passage: Passage, state: dict[str, Tensor], codec: Codec) -> None:
        """Multiply what :meth:`keep` kept of g~ by the factor by which z is going to be multiplied.

        Args:
            factor: in (0, 1].
            core: z as it is.
            passage: that of the frame as it stands.
            state: as in :meth:`restore`.
            codec: likewise.
        """
        ...

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """The whole update, onto the weights in place: the lifted direction, and what belongs beside it.

        Whatever may fail comes before the first write.
        """
        ...

    def error(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> Tensor:
        """An upper bound on the norm of what encoding lost, real, (*rows), or without dimensions where it is 0."""
        ...

    def errors(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> tuple[Tensor, Tensor]:
        """Two such bounds, whose sum is :meth:`error`: for tensors of the gradient's shape, and of the core's.

        Asked of an ``entrywise`` residual, where a process has some of the former and all of the latter.
        """
        ...


class _Bounding(Protocol):
    def error(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> Tensor: ...  # noqa: D102


class Inside:
    """What residuals share that choose nothing themselves, and write nothing but the lifted direction."""

    entrywise: ClassVar[bool] = False
    holds: ClassVar[bool] = False
    feeds: ClassVar[bool] = False
    rescales: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    alone: ClassVar[bool] = False

    @property
    def replays(self) -> bool:
        """Always."""
        return True

    def errors(self: "_Bounding", state: dict[str, Tensor], codec: Codec, rows: int = 0) -> tuple[Tensor, Tensor]:
        """All of it is for what has the gradient's shape."""
        return self.error(state, codec, rows), torch.zeros(())

    def renew(self, gradient: Tensor, state: dict[str, Tensor], codec: Codec) -> None:
        """Nothing is chosen."""

    def split(self, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
        """All of it."""
        return gradient

    def size(self, core: Tensor, rest: Tensor, state: dict[str, Tensor]) -> Tensor:
        """hypot(|z|, rest)."""
        return torch.hypot(norm(core, rest.ndim), rest.to(core.device))

    def rescale(self, factor: float, core: Tensor, passage: Passage, state: dict[str, Tensor], codec: Codec) -> None:
        """Nothing is kept."""

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """w <- shrink w + factor F d."""
        update.write(weights)


class Holding(Inside):
    """What residuals share that need the gradient itself in step 6, and encode nothing.

    They hold it, or the sum of several, in the slot "held" until the update is written.
    """

    holds: ClassVar[bool] = True

    def restore(
        self, gradient: Tensor, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Operand:
        """The gradient itself: nothing comes from earlier steps."""
        return Operand(gradient, rows=passage.rows)

    def keep(
        self, dense: Tensor, cores: Cores, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> None:
        """Hold the gradient; a sum is a new tensor, since the first may be the caller's."""
        state[HELD] = dense if opening else state[HELD] + dense

    def size(self, core: Tensor, rest: Tensor, state: dict[str, Tensor]) -> Tensor:
        """That of what is held."""
        return norm(state[HELD], rest.ndim)

    def rescale(self, factor: float, core: Tensor, passage: Passage, state: dict[str, Tensor], codec: Codec) -> None:
        """Held gradients are multiplied; they may be the caller's."""
        state[HELD] = state[HELD] * factor

    def error(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> Tensor:
        """Zero."""
        return torch.zeros(())
