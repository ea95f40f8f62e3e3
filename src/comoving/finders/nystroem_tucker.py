"""Tucker factors from a sample of each unfolding's columns."""

from dataclasses import dataclass
from math import ceil, prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..codecs import Part
from ..draws import generator
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import each_row, leading_directions, unit_size
from ..validate import check_choice, check_float, check_int
from .base import DRAWS, Memory, check_start, counted, drawing, unless_zero
from .operand import Operand

_ENERGY = "energy."
# Columns of little energy so far must not be lost for ever, nor get a boundless weight.
_UNIFORM_EVERY = 5


@dataclass(frozen=True)
class NystroemTucker:
    """U_n = the leading left singular vectors of s sampled fibres, columns of O_(n), instead of all of them.

    With weights 1/(expected number of draws of the column) the sampled Gram matrix is an unbiased estimate of
    O_(n) O_(n)^H (Drineas, Kannan and Mahoney, 2006). Only the sampled columns of O are ever formed.

    "uniform" draws without replacement. "energy" draws a fifth of the columns uniformly and the others by the product
    of the modes' own distributions: the energy of a slice, one number for each index of each mode, decayed and summed
    over the gradients, of which each counts as if it had norm 1.

    Args:
        momentum: rho of the operand, in [0, 1).
        samples: a float in (0, 1], that share of the columns of each unfolding, or an int >= 1, so many columns; never
            fewer than 2 r_n or r_n + 8, and all of them, exactly, where there are no more.
        fibres: "uniform" or "energy".
        decay: of the energies, in (0, 1].
        seed: with a counter of refreshes in the memory, it seeds the draws, >= 0.
    """

    fills: ClassVar[tuple[type, ...]] = (ModeFrame,)
    batched: ClassVar[bool] = True

    momentum: float = 0.9
    samples: float | int = 0.02
    fibres: Literal["uniform", "energy"] = "energy"
    decay: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        _check_samples(self.samples)
        check_choice("fibres", self.fibres, ("uniform", "energy"))
        check_float("decay", self.decay, 0.0, 1.0, open_low=True)
        check_int("seed", self.seed, 0)

    def parts(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Part]:
        """The number of refreshes so far, "draws"; for "energy" also "energy.m", (d_m,), for each mode."""
        parts = {DRAWS: drawing}
        if self.fibres == "energy":
            parts |= {f"{_ENERGY}{m}": Part((d,), dtype.to_real()) for m, d in enumerate(shape)}
        return parts

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Energies of the slices, for "energy"."""
        if self.fibres == "uniform":
            return
        real = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
        squares = unit_size(real, rows).square_()
        lead, shape = gradient.shape[:rows], gradient.shape[rows:]
        middle = len(shape) // 2
        squares = squares.reshape(*lead, prod(shape[:middle]), -1)
        # Two sums over all serve all modes.
        halves = squares.sum(-1).reshape(*lead, *shape[:middle]), squares.sum(-2)
        tail = halves[1].reshape(*lead, *shape[middle:], -1).sum(-1)
        total = each_row(tail, rows).sum(-1, keepdim=True) if rows else tail.sum()
        total = total.clamp_min(torch.finfo(tail.dtype).tiny)
        for half, first in ((halves[0], 0), (tail, middle)):
            for m in range(half.ndim - rows):
                others = [i for i in range(rows, half.ndim) if i != rows + m]
                slices = half.sum(others) if others else half
                memory[f"{_ENERGY}{first + m}"].mul_(self.decay).add_(slices / total)

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Draw and decompose anew; ``start`` only serves where all that was drawn is zero."""
        check_start(self, start)
        source = generator(self.seed, counted(memory))
        shape, factors, rows = operand.shape, list(start.factors), operand.rows
        needed = {n: self.count(shape, n, u.shape[-1]) for n, u in enumerate(factors) if u is not None}
        drawn = self._indices(shape, max(needed.values()), source, memory) if self.fibres == "energy" else None
        for n, count in needed.items():
            u = factors[n]
            assert u is not None
            columns, weights = self._columns(shape, n, count, source, drawn)
            x = unit_size(operand.sample(n, columns.to(u.device, non_blocking=True)), rows)
            x = x if weights is None else x * weights.sqrt().to(u).unsqueeze(-2)
            factors[n] = unless_zero(x, leading_directions(x, 0, u.shape[-1], rows=rows), u, rows)
        return ModeFrame(tuple(factors))

    def count(self, shape: tuple[int, ...], mode: int, rank: int) -> int:
        """Columns to draw of the unfolding in ``mode``."""
        total = prod(shape) // shape[mode]
        return min(
            total,
            max(self.samples if isinstance(self.samples, int) else ceil(self.samples * total), 2 * rank, rank + 8),
        )

    def draw(
        self, shape: tuple[int, ...], mode: int, count: int, source: torch.Generator, memory: Memory
    ) -> tuple[Tensor, Tensor | None]:
        """Columns of the unfolding in ``mode``, (*rows, count), and their weights; None where all are equal.

        Columns that do not depend on energies are the same for all rows, (count,).
        """
        drawn = self._indices(shape, count, source, memory) if self.fibres == "energy" else None
        return self._columns(shape, mode, count, source, drawn)

    def _indices(
        self, shape: tuple[int, ...], count: int, source: torch.Generator, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """An index along each mode, (N, *rows, count), and its probability by energy; every fifth one is uniform."""
        chances = torch.rand((len(shape), count), generator=source, dtype=torch.float64)
        chances = chances.to(memory[f"{_ENERGY}0"].device, non_blocking=True)
        evenly = torch.arange(count, device=chances.device) % _UNIFORM_EVERY == 0
        indices: list[Tensor] = []
        densities: list[Tensor] = []
        for m, (d, chance) in enumerate(zip(shape, chances, strict=True)):
            energy = memory[f"{_ENERGY}{m}"].double()
            steps = torch.where(energy.any(-1, keepdim=True), energy, 1.0).cumsum(-1)
            steps = steps / steps[..., -1:]
            sought = chance.expand(*steps.shape[:-1], count).contiguous()
            index = torch.where(evenly, (chance * d).long(), torch.searchsorted(steps, sought, right=True))
            index = index.clamp_max(d - 1)
            indices.append(index)
            densities.append(steps.diff(prepend=steps.new_zeros(*steps.shape[:-1], 1)).gather(-1, index))
        return torch.stack(indices), torch.stack(densities)

    def _columns(
        self,
        shape: tuple[int, ...],
        mode: int,
        count: int,
        source: torch.Generator,
        drawn: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What :meth:`draw` returns, from indices that all modes share."""
        others = [m for m in range(len(shape)) if m != mode]
        total = prod(shape[m] for m in others)
        if count >= total:
            return torch.arange(total), None
        if drawn is None:
            return torch.randperm(total, generator=source)[:count], None
        indices, densities = (x[..., :count] for x in drawn)
        columns, density = torch.zeros_like(indices[0]), torch.ones_like(densities[0])
        for m in others:
            columns = columns * shape[m] + indices[m]
            density = density * densities[m]
        # Fixed numbers of draws from two densities: each column is weighted by the inverse of its expected number.
        evenly = ceil(count / _UNIFORM_EVERY)
        return columns, 1 / (evenly / total + (count - evenly) * density)


def _check_samples(value: object) -> None:
    """Raise unless value is a float in (0, 1] or an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"samples must be a float or an int, got {value!r}")
    if not (value >= 1 if isinstance(value, int) else 0.0 < value <= 1.0):
        raise ValueError(f"samples must lie in (0, 1] or be an int >= 1, got {value!r}")
