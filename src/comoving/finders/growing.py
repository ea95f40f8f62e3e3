"""Refreshes at exponentially growing intervals."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..codecs import Part
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..validate import check_float
from .base import MERGED, NEXT, REFRESHES, Finder, Memory, check_inner, check_start, drawing
from .exact import Exact
from .operand import Operand


@dataclass(frozen=True)
class Growing:
    """Another finder at growing intervals: tau + floor(psi^k) steps from its k-th refresh, k >= 1, to the next.

    Refreshes are counted from 0; tau is the group's ``refresh_every`` and psi the field ``base``. The second refresh
    comes after tau steps, or at the phase by which parameters are staggered. LoQT (arXiv 2405.16528) takes psi = 1.2
    and tau = 100.

    Args:
        inner: the finder, of mode-wise frames; none that times its refreshes itself.
        base: psi >= 1.
    """

    fills: ClassVar[tuple[type, ...]] = (ModeFrame,)
    batched: ClassVar[bool] = True  # where the inner finder is

    inner: Finder = Exact()
    base: float = 1.2

    def __post_init__(self) -> None:
        check_float("base", self.base, 1.0)
        check_inner(self.inner, timed=False)
        if not getattr(self.inner, "batched", False):
            object.__setattr__(self, "batched", False)

    @property
    def momentum(self) -> float:
        """The inner finder's."""
        return self.inner.momentum

    def parts(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Part]:
        """The inner finder's, and on the host the refreshes so far, the last merged one, and when the next one is."""
        return self.inner.parts(shape, ranks, dtype) | {REFRESHES: drawing, MERGED: drawing, NEXT: drawing}

    def observe(self, gradient: torch.Tensor, memory: Memory, rows: int = 0) -> None:
        """As the inner finder does."""
        if rows:
            self.inner.observe(gradient, memory, rows)
        else:
            self.inner.observe(gradient, memory)

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """The inner finder's frame."""
        check_start(self, start)
        memory[REFRESHES] = torch.tensor(int(memory[REFRESHES]) + 1, device="cpu")
        return self.inner.find(operand, start, warm, memory)

    def interval(self, memory: Memory, every: int) -> int:
        """tau + floor(psi^k)."""
        return every + int(min(self.base ** (int(memory[REFRESHES]) - 1), 2.0**53))
