"""Randomized SVD: a Gaussian sketch, power passes, and a small problem."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Part
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import leading_singular, orthonormalize, over, reorthonormalize, to_unit, unfold
from ..validate import check_float, check_int
from .base import DRAWS, Memory, check_start, counted, drawing, peak
from .operand import Operand


@dataclass(frozen=True)
class Randomized:
    """U_n = the leading left singular vectors of O_(n), found in the range of a sketch (Halko et al., arXiv 0909.4061).

    Q = orth(O_(n) W) with Gaussian W of r_n + oversampling columns, Q <- orth(O_(n) O_(n)^H Q) at each pass, then the
    leading r_n left singular vectors of Q^H O_(n). The last frame is not looked at. Each refresh draws another W: the
    seed and a count of the refreshes, which is in the state, determine it.

    Args:
        momentum: rho of the operand, in [0, 1).
        oversampling: columns of the sketch beyond the rank, >= 0.
        passes: power passes, >= 0; for slowly decaying spectra.
        seed: of the sketches, >= 0.
    """

    fills: ClassVar[tuple[type, ...]] = (ModeFrame,)
    batched: ClassVar[bool] = True

    momentum: float = 0.9
    oversampling: int = 8
    passes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        check_int("oversampling", self.oversampling, 0)
        check_int("passes", self.passes, 0)
        check_int("seed", self.seed, 0)

    def parts(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Part]:
        """How often a sketch was drawn."""
        return {DRAWS: drawing}

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Nothing to note."""

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Decompose each compressed mode anew; ``start`` only serves where the operand is zero."""
        check_start(self, start)
        count = counted(memory)
        return ModeFrame(
            tuple(None if u is None else self._leading(operand, n, u, count) for n, u in enumerate(start.factors))
        )

    def _leading(self, operand: Operand, mode: int, start: Tensor, count: int) -> Tensor:
        d, rank = start.shape[-2:]
        rows = operand.rows
        width = min(rank + self.oversampling, d, max(rank, operand.columns(mode)))
        q = orthonormalize(to_unit(operand.sketch(mode, width, self.seed, count, mode), rows))
        for _ in range(self.passes):
            seen = to_unit(operand.contract(mode, q), rows)
            q = orthonormalize(to_unit(operand.correlate(mode, seen), rows))
        inside = unfold(operand.contract(mode, q), mode, operand.order)
        vectors, _ = leading_singular(to_unit(inside, rows), rank)
        return torch.where(over(peak(inside, rows) > 0, start), reorthonormalize(q @ vectors), start)
