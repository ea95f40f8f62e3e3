"""Nystroem's method: factors from a few columns of each unfolding."""

from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor

from ..codecs import Spec
from ..decompositions import sampled_factor
from ..draws import generator
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import unit_size
from ..validate import check_choice, check_float, check_int
from .base import DRAWS, Memory, check_start, counted, drawing, unless_zero
from .columns import by_energy, by_slices, column_energies, joined, slice_energies
from .operand import Operand

_COLUMNS = "columns."
_ENERGY = "energy."


@dataclass(frozen=True)
class Nystroem:
    """U_n = the leading r_n left singular vectors of a weighted sample C of the columns of the unfolding O_(n).

    Each column has the weight 1/(its expected number of draws), so that C C^H estimates O_(n) O_(n)^H without bias
    (Drineas, Kannan and Mahoney, 2006). Only the sampled columns of O are ever formed, never the full Gram matrix:
    s columns cost O(d_n s r_n). Each refresh draws other ones: the seed and a count of the refreshes, which is in the
    state, determine which. As many samples as there are columns are all of them, and exact. The factors are made as in
    :func:`comoving.decompositions.nystroem_tucker`, which draws by given weights, with replacement, from a tensor in
    hand; here the columns are drawn by what was seen so far, and the operand may be a sum that is never formed.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1).
        samples: the number s of columns of each unfolding. A float >= 1 is a multiple of r_n, cut to the columns there
            are; a float below 1 a share of the columns, but never fewer than 2 r_n or r_n + 8; an int >= 1 the number
            itself, at most that of the columns of every unfolding. Where r_n is higher than an int, as it may become
            where ranks adapt, there are r_n of them.
        columns: how they are drawn. "uniform": all with the same chance. "energy": in proportion to the energy that
            each column had in past gradients, but for a tenth of the chances, spread evenly; one number per column in
            the state. "slices": in proportion to the product of the energies that the slices of the tensor through the
            column had, but for a fifth of the columns, drawn evenly; one number per index of each mode in the state. A
            slice holds all entries with the same index along one mode. Only "slices" may draw a column twice.
        decay: of the energies, which each gradient changes as if it had norm 1, in [0, 1).
        seed: of the draws, >= 0.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = False
    ahead = 0

    inertia: float = 0.9
    samples: int | float = 2.0
    columns: Literal["uniform", "energy", "slices"] = "uniform"
    decay: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        if isinstance(self.samples, int):
            check_int("samples", self.samples, 1)
        else:
            check_float("samples", self.samples, 0.0, open_low=True)
        check_choice("columns", self.columns, ("uniform", "energy", "slices"))
        check_float("decay", self.decay, 0.0, 1.0, open_high=True)
        check_int("seed", self.seed, 0)

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """How often columns were drawn, "draws", and decayed sums of energies.

        For "energy" these are "columns.n", a number per column of the unfolding of each compressed mode n; for "slices"
        "energy.m", (d_m,), for each mode m.

        Raises:
            ValueError: more samples than there are columns.
        """
        schema, real = {DRAWS: drawing}, dtype.to_real()
        columns = {n: prod(shape) // shape[n] for n, r in enumerate(ranks) if r is not None}
        for n, most in columns.items():
            if isinstance(self.samples, int) and self.samples > most:
                raise ValueError(f"samples must lie in [1, {most}], the columns of mode {n}, got {self.samples}")
        if self.columns == "energy":
            schema |= {f"{_COLUMNS}{n}": Spec((count,), real) for n, count in columns.items()}
        elif self.columns == "slices":
            schema |= {f"{_ENERGY}{m}": Spec((d,), real) for m, d in enumerate(shape)}
        return schema

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Bring the energies up to date: for "energy" a pass over the gradient for each compressed mode."""
        if self.columns == "slices":
            for m, fresh in enumerate(slice_energies(gradient, rows)):
                memory[f"{_ENERGY}{m}"].mul_(self.decay).add_(fresh)
        for name in memory:
            if name.startswith(_COLUMNS):
                fresh = column_energies(gradient, int(name.removeprefix(_COLUMNS)), rows)
                memory[name].mul_(self.decay).add_(fresh)

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Draw and decompose anew; ``start`` only serves where all that was drawn is zero."""
        check_start(self, start)
        factors, rows = list(start.factors), operand.rows
        ranks = {n: u.shape[-1] for n, u in enumerate(factors) if u is not None}
        drawn = self.draw(operand.shape, ranks, counted(memory), memory)
        for n, (columns, weights) in drawn.items():
            u = factors[n]
            assert u is not None
            x = unit_size(operand.sample(n, columns.to(u.device, non_blocking=True)), rows)
            factors[n] = unless_zero(x, sampled_factor(x, u.shape[-1], weights), u, rows)
        return ModeFrame(tuple(factors))

    def count(self, columns: int, rank: int) -> int:
        """How many of an unfolding's columns are drawn."""
        if isinstance(self.samples, int):
            wanted = max(self.samples, rank)
        elif self.samples >= 1:
            wanted = ceil(self.samples * rank)
        else:
            wanted = max(ceil(self.samples * columns), 2 * rank, rank + 8)
        return min(wanted, columns)

    def draw(
        self, shape: tuple[int, ...], ranks: dict[int, int], refresh: int, memory: Memory
    ) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Columns of the unfolding of each mode that has a rank, and their weights; None where all are equal.

        Both are of shape (*rows, s), or (s,) for all rows where they do not depend on energies.

        Args:
            shape: (d_1, ..., d_N).
            ranks: r_n of each compressed mode n.
            refresh: the number of the draw.
            memory: with the energies.
        """
        total = {n: prod(shape) // shape[n] for n in ranks}
        counts = {n: self.count(total[n], rank) for n, rank in ranks.items()}
        slices = None
        if self.columns == "slices":  # which all modes share
            energies = [memory[f"{_ENERGY}{m}"] for m in range(len(shape))]
            slices = by_slices(energies, max(counts.values()), generator(self.seed, refresh))
        drawn: dict[int, tuple[Tensor, Tensor | None]] = {}
        for n, count in counts.items():
            if count == total[n]:
                drawn[n] = torch.arange(count), None
            elif slices is not None:
                drawn[n] = joined(slices, shape, n, count)
            elif self.columns == "energy":
                drawn[n] = by_energy(memory[f"{_COLUMNS}{n}"], count, generator(self.seed, refresh, n))
            else:
                drawn[n] = torch.randperm(total[n], generator=generator(self.seed, refresh, n))[:count], None
        return drawn
