"""Nystroem's method: factors from a few columns of each unfolding."""

from dataclasses import dataclass
from math import ceil, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..codecs import Part
from ..draws import generator
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import abs_squared, leading_eigenvectors, orthonormalize, over
from ..validate import check_choice, check_float, check_int
from .base import DRAWS, Memory, check_start, counted, drawing, peak
from .operand import Operand

_ENERGY = ".energy"
_UNIFORM_SHARE = 0.1  # of the chances in energy sampling: bounds the weight of a column that was silent so far


@dataclass(frozen=True)
class Nystroem:
    """U_n = the leading left singular vectors of a weighted sample C of the columns of O_(n).

    Column j enters with chance pi_j, divided by sqrt(pi_j), so that C C^H estimates O_(n) O_(n)^H without bias (Drineas
    and Mahoney, 2005; here without replacement, so that as many samples as columns are exact). The full Gram matrix is
    never formed: s columns cost O(d_n s r_n). Each refresh draws other columns: the seed and a count of the refreshes,
    which is in the state, determine them.

    Args:
        momentum: rho of the operand, in [0, 1).
        samples: columns s of each unfolding. A float >= 1 is a multiple of the rank, cut to the columns there are; an
            int >= 1 is their number, at most the number of columns of every unfolding. Where the rank is higher, as it
            may become where ranks adapt, there are as many samples as it needs.
        columns: "uniform" gives all columns the same chance; "energy" chances in proportion to the energy that they
            had in past gradients, a tenth spread evenly. The energies are one number per column in the state.
        decay: of the energies, per gradient, in [0, 1).
        seed: of the samples, >= 0.
    """

    fills: ClassVar[tuple[type, ...]] = (ModeFrame,)
    batched: ClassVar[bool] = True

    momentum: float = 0.9
    samples: int | float = 2.0
    columns: Literal["uniform", "energy"] = "uniform"
    decay: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        if isinstance(self.samples, int):
            check_int("samples", self.samples, 1)
        else:
            check_float("samples", self.samples, 1.0)
        check_choice("columns", self.columns, ("uniform", "energy"))
        check_float("decay", self.decay, 0.0, 1.0, open_high=True)
        check_int("seed", self.seed, 0)

    def parts(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Part]:
        """How often columns were drawn, and for "energy" the root of each column's energy.

        Raises:
            ValueError: more samples than there are columns.
        """
        parts = {DRAWS: drawing}
        size = torch.Size(shape).numel()
        for n, (d, r) in enumerate(zip(shape, ranks, strict=True)):
            if r is None:
                continue
            columns = size // d
            if isinstance(self.samples, int) and self.samples > columns:
                raise ValueError(f"samples must lie in [1, {columns}], the columns of mode {n}, got {self.samples}")
            if self.columns == "energy":
                parts[f"{n}{_ENERGY}"] = Part((columns,), dtype.to_real())
        return parts

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Bring the energies up to date: a pass over the gradient for each compressed mode."""
        roots = {int(name.removesuffix(_ENERGY)): root for name, root in memory.items() if name.endswith(_ENERGY)}
        if not roots:
            return
        unit = peak(gradient, rows).clamp_min(torch.finfo(gradient.dtype).tiny)
        scaled = gradient / over(unit, gradient)
        squares = abs_squared(scaled) if scaled.is_complex() else scaled.square_()
        for mode, root in roots.items():
            new = squares.sum(rows + mode).flatten(rows).sqrt() * over(unit, root)
            root.copy_(torch.hypot(root * sqrt(self.decay), new * sqrt(1 - self.decay)))

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Decompose a sample for each compressed mode; ``start`` serves where it is zero, or smaller than the rank."""
        check_start(self, start)
        count = counted(memory)
        factors: list[Tensor | None] = []
        for n, u in enumerate(start.factors):
            root = memory.get(f"{n}{_ENERGY}")
            factors.append(None if u is None else self._leading(operand, n, u, root, count))
        return ModeFrame(tuple(factors))

    def _leading(self, operand: Operand, mode: int, start: Tensor, root: Tensor | None, count: int) -> Tensor:
        d, rank = start.shape[-2:]
        columns = operand.columns(mode)
        wanted = max(rank, self.samples) if isinstance(self.samples, int) else ceil(self.samples * rank)
        indices, chances = self._draw(root, min(wanted, columns), columns, operand.dense.device, (count, mode))
        c = operand.sample(mode, indices).div_(chances.sqrt().unsqueeze(-2))
        size = over(peak(c, operand.rows), c)
        c.div_(size.clamp_min(torch.finfo(c.dtype).tiny))
        kept = min(rank, c.shape[-1])
        small = c.shape[-1] <= d
        basis = c @ leading_eigenvectors(c.mH @ c, kept) if small else leading_eigenvectors(c @ c.mH, kept)
        return torch.where(size > 0, orthonormalize(torch.cat([basis, start[..., : rank - kept]], dim=-1)), start)

    def _draw(
        self, root: Tensor | None, count: int, columns: int, device: torch.device, key: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Indices of ``count`` columns, and the chances that they had: (s,) each, (*rows, s) where the roots differ."""
        every = torch.full((columns,), 1 / columns, dtype=torch.float64, device=device)
        if count == columns:
            return torch.arange(columns, device=device), torch.ones_like(every)
        if root is not None:
            energy = (root / root.amax(-1, keepdim=True).clamp_min(torch.finfo(root.dtype).tiny)).double().square()
            total = energy.sum(-1, keepdim=True)
            share = (1 - _UNIFORM_SHARE) * energy / total.clamp_min(1) + _UNIFORM_SHARE * every
            every = torch.where(total > 0, share, every)
        chances = inclusion(every, count)
        source = generator(self.seed, *key)
        order = torch.randperm(columns, generator=source, device="cpu").to(device, non_blocking=True)
        offset = torch.rand((), dtype=torch.float64, generator=source, device="cpu").to(device, non_blocking=True)
        ends = chances[..., order].cumsum(-1)
        marks = offset + torch.arange(count, dtype=torch.float64, device=device)
        places = torch.searchsorted(ends, marks.expand(*ends.shape[:-1], count).contiguous())
        indices = order[places.clamp_max(columns - 1)]
        return indices, chances.gather(-1, indices)


def inclusion(shares: Tensor, count: int) -> Tensor:
    """Chances pi_j = min(1, a p_j) that sum to ``count``, for positive shares p and ``count`` below their number.

    Both are of shape (*rows, columns).
    """
    ordered = shares.sort(descending=True).values
    rest = ordered.flip(-1).cumsum(-1).flip(-1)  # p_k + p_{k+1} + ...
    factors = (count - torch.arange(shares.shape[-1], device=shares.device)) / rest
    certain = (factors * ordered > 1).logical_and(factors > 0).long().cumprod(-1).sum(-1, keepdim=True)
    return (shares * factors.gather(-1, certain)).clamp(max=1)
