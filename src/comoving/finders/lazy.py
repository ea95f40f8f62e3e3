"""Fewer refreshes where the subspace has settled."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..codecs import Part
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..validate import check_float, check_int
from .base import NEXT, Finder, Memory, check_inner, check_start, drawing
from .exact import Exact
from .operand import Operand

_SIMILAR, _COUNT, _STRETCH = "lazy.similar", "lazy.count", "lazy.stretch"


@dataclass(frozen=True)
class Lazy:
    """Another finder, asked less and less often while the leading direction stays (Q-GaLore, arXiv 2407.08296).

    At every refresh c = |<u', u>|, with u the first column of the last factor, as it is read of its codes, and u' that
    of the new one; the least c where several modes are compressed. Once the mean of the last ``patience`` values is at
    least ``threshold``, the interval is multiplied by ``growth``, and so at every later refresh at which that holds.
    The first interval is the group's ``refresh_every``; each parameter, or block, has its own.

    As in the authors' code the first direction alone is compared, and the queue is not emptied. Two things differ: the
    sign of a singular vector means nothing, so the cosine is taken without it; and a new interval counts from the
    refresh that decided on it, where the code waits for the next step that is its multiple. The host reads the decision
    from the device, at refreshes only.

    Args:
        inner: the finder, whose factors have their leading direction first, as :class:`comoving.finders.Exact` has;
            none that times its refreshes itself.
        threshold: of the mean cosine, in [0, 1].
        patience: how many values are averaged, >= 1.
        growth: of the interval, >= 2.
    """

    fills: ClassVar[tuple[type, ...]] = (ModeFrame,)
    batched: ClassVar[bool] = True  # where the inner finder is
    alone: ClassVar[bool] = True  # when the next refresh is due depends on what each has found

    inner: Finder = Exact()
    threshold: float = 0.4
    patience: int = 5
    growth: int = 2

    def __post_init__(self) -> None:
        check_float("threshold", self.threshold, 0.0, 1.0)
        check_int("patience", self.patience, 1)
        check_int("growth", self.growth, 2)
        check_inner(self.inner, timed=False)
        if not getattr(self.inner, "batched", False):
            object.__setattr__(self, "batched", False)

    @property
    def momentum(self) -> float:
        """The inner finder's."""
        return self.inner.momentum

    def parts(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Part]:
        """The inner finder's, the last cosines, and on the host their number, the factor, and what is next."""
        number = drawing._replace(own=True)
        own = {_SIMILAR: Part((self.patience,), torch.float32), _COUNT: number, _STRETCH: number, NEXT: number}
        return self.inner.parts(shape, ranks, dtype) | own

    def observe(self, gradient: torch.Tensor, memory: Memory, rows: int = 0) -> None:
        """As the inner finder does."""
        if rows:
            self.inner.observe(gradient, memory, rows)
        else:
            self.inner.observe(gradient, memory)

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """The inner finder's frame, compared with the last one."""
        check_start(self, start)
        found: ModeFrame = self.inner.find(operand, start, warm, memory)
        if warm:
            self._compare(start, found, memory)
        return found

    def _compare(self, last: ModeFrame, new: ModeFrame, memory: Memory) -> None:
        pairs = [(a, b) for a, b in zip(last.factors, new.factors, strict=True) if a is not None and b is not None]
        cosines = torch.stack([torch.linalg.vecdot(a[:, 0], b[:, 0]).abs() for a, b in pairs])
        memory[_SIMILAR] = torch.cat([memory[_SIMILAR][1:], cosines.amin(0, keepdim=True).to(torch.float32)])
        count = min(int(memory[_COUNT]) + 1, self.patience)
        memory[_COUNT] = torch.tensor(count, device="cpu")
        if count == self.patience and bool(memory[_SIMILAR].mean() >= self.threshold):
            memory[_STRETCH] = torch.tensor(self._stretch(memory) * self.growth, device="cpu")

    @staticmethod
    def _stretch(memory: Memory) -> int:
        return max(1, int(memory[_STRETCH]))  # 0 before anything was decided

    def interval(self, memory: Memory, every: int) -> int:
        """Steps from a refresh to the next: ``every`` times the factor so far."""
        return every * self._stretch(memory)
