"""Tucker factors by randomized range finders."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Part
from ..draws import generator
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import leading_directions, unit_size
from ..validate import check_float, check_int
from .base import DRAWS, Memory, check_start, counted, drawing, unless_zero
from .kronecker import gaussians, widths
from .operand import Operand
from .sequential import by_shrinkage


@dataclass(frozen=True)
class RandomizedTucker:
    """Sequentially truncated HOSVD, each mode's directions from a random sketch of its unfolding.

    Y = O_(n) Omega_n has r_n + oversampling columns and nearly the range of O_(n) (Halko, Martinsson and Tropp, 2011);
    further passes sharpen it: the second gives B = Q^H O with Q = orth(Y), and U_n = Q times B's leading directions,
    the third Y = O_(n) B^H, and so on. O is then projected on U_n before the next mode (Minster, Saibaba and Kilmer,
    1905.07311). Omega_n is a Kronecker product of a Gaussian matrix for each other mode, and never formed. A mode whose
    sketch would be as wide as tall is decomposed exactly.

    Args:
        momentum: rho of the operand, in [0, 1).
        oversampling: columns beyond r_n, >= 0; a Kronecker product may have more.
        passes: over the operand and mode, >= 1.
        seed: with a counter of refreshes in the memory, it seeds the draws, >= 0.
    """

    fills: ClassVar[tuple[type, ...]] = (ModeFrame,)
    batched: ClassVar[bool] = True

    momentum: float = 0.9
    oversampling: int = 8
    passes: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        check_int("oversampling", self.oversampling, 0)
        check_int("passes", self.passes, 1)
        check_int("seed", self.seed, 0)

    def parts(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Part]:
        """The number of refreshes so far, "draws"."""
        return {DRAWS: drawing}

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Nothing to note."""

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Draw and decompose anew; ``start`` only serves where the operand is zero."""
        check_start(self, start)
        source = generator(self.seed, counted(memory))
        factors, waiting = list(start.factors), by_shrinkage(start.factors)
        while waiting:
            n = waiting.pop(0)
            u = factors[n]
            assert u is not None
            factors[n] = found = self._leading(operand, n, u, source)
            if waiting:
                operand = Operand(operand.contract(n, found), rows=operand.rows)
        return ModeFrame(tuple(factors))

    def _leading(self, operand: Operand, mode: int, start: Tensor, source: torch.Generator) -> Tensor:
        (d, rank), shape, rows = start.shape[-2:], operand.shape, operand.rows
        width = min(rank + self.oversampling, prod(shape) // d)
        if width >= d or width < rank:
            x = unit_size(operand.full(), rows)
            return unless_zero(x, leading_directions(x, mode, rank, rows=rows), start, rows)
        matrices = gaussians(shape, widths(shape, {mode: width}), source, operand.dense)
        sketch = unit_size(operand.sketches(matrices, (mode,))[mode], rows)
        basis = leading_directions(sketch, mode, width, rows=rows)
        small: Tensor | None = None
        for _ in range(1, self.passes):
            if small is None:
                small = unit_size(operand.contract(mode, basis), rows)
            else:
                y, small = unit_size(operand.correlate(mode, small), rows), None
                basis = leading_directions(y, 0, width, rows=rows)
        if small is None:
            found = basis[..., :rank].contiguous()
        else:
            found = basis @ leading_directions(small, mode, rank, rows=rows)
        return unless_zero(sketch, found, start, rows)
