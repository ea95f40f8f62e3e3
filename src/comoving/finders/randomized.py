"""Factors from random sketches of the unfoldings: randomized SVD, HOSVD and sequentially truncated HOSVD."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..codecs import Spec
from ..decompositions import by_shrinkage, leading_directions
from ..draws import generator
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import orthonormalize, unfold, unit_size
from ..validate import check_choice, check_float, check_int
from .base import DRAWS, Memory, check_start, counted, drawing, unless_zero
from .kronecker import gaussians, widths
from .operand import Operand


@dataclass(frozen=True)
class Randomized:
    """U_n = the leading r_n left singular vectors of O_(n), found in the range of a sketch of it.

    A sketch Y = O_(n) Omega_n, with a random matrix Omega_n, has few columns, r_n + oversampling, and nearly the range
    of O_(n) (Halko, Martinsson and Tropp, arXiv 0909.4061). Further reads of O sharpen it: the second gives B = Q^H O
    with Q = orth(Y), and U_n = Q times B's leading directions; the third Y = O_(n) B^H, and so on. For a tensor that is
    the randomized HOSVD (Minster, Saibaba and Kilmer, arXiv 1905.07311).

    Omega_n is a Kronecker product of a Gaussian matrix for each other mode, and never formed; for a matrix it is a
    Gaussian matrix. A mode whose sketch would be as wide as tall is decomposed exactly. The last frame is not looked
    at. Each refresh draws anew: the seed, the mode and a count of the refreshes, which is in the state, determine what.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1).
        oversampling: columns of the sketch beyond r_n, >= 0; a Kronecker product may have more.
        reads: how often O is read for a mode, >= 1; with 2 q + 2 of them q are the "power iterations" of Halko et al.,
            which help where the spectrum decays slowly.
        sequential: the randomized ST-HOSVD (the same authors): O is projected on U_n before the next mode, which
            becomes cheaper; the mode that shrinks most, by r_n/d_n, goes first.
        seed: of the draws, >= 0.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.9
    oversampling: int = 8
    reads: int = 4
    sequential: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        check_int("oversampling", self.oversampling, 0)
        check_int("reads", self.reads, 1)
        check_choice("sequential", self.sequential, (True, False))
        check_int("seed", self.seed, 0)

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """The number of refreshes so far, "draws"."""
        return {DRAWS: drawing}

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Nothing to note."""

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Draw and decompose anew; ``start`` only serves where the operand is zero."""
        check_start(self, start)
        count, factors, waiting = counted(memory), list(start.factors), by_shrinkage(operand.shape, start.ranks)
        while waiting:
            n = waiting.pop(0)
            u = factors[n]
            assert u is not None
            factors[n] = found = self._leading(operand, n, u, generator(self.seed, count, n))
            if self.sequential and waiting:
                operand = Operand(operand.whole(n, operand.contract(n, found)), rows=operand.rows)
        return ModeFrame(tuple(factors))

    def _leading(self, operand: Operand, mode: int, start: Tensor, source: torch.Generator) -> Tensor:
        (d, rank), shape, rows = start.shape[-2:], operand.shape, operand.rows
        width = min(rank + self.oversampling, prod(shape) // d)
        if width >= d or width < rank:
            x = unit_size(operand.full(), rows)
            return unless_zero(x, leading_directions(x, mode, rank, rows=rows), start, rows)
        matrices = gaussians(shape, widths(shape, {mode: width}), source, operand.dense)
        sketch = unfold(operand.sketches(matrices, (mode,))[mode], mode, operand.order)
        y, basis, small = unit_size(sketch, rows), start, sketch
        for read in range(2, self.reads + 1):
            if read % 2 == 0:
                basis = orthonormalize(y) if y.shape[-1] == width else leading_directions(y, 0, width, rows=rows)
                small = operand.to_unit(mode, operand.contract(mode, basis))
            else:
                y = unit_size(operand.correlate(mode, small), rows)
        if self.reads % 2 == 0:
            found = basis @ leading_directions(operand.whole(mode, small), mode, rank, rows=rows)
        else:
            found = leading_directions(y, 0, rank, rows=rows)
        return unless_zero(y, found, start, rows)
