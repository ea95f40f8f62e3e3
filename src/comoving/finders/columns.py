"""Columns of an unfolding drawn at random, with the weights that keep the sample's Gram matrix unbiased.

A column that is drawn with chance pi, or pi times on average where it may be drawn again, has weight 1/pi (Drineas,
Kannan and Mahoney, 2006).
"""

from collections.abc import Sequence
from math import ceil, prod

import torch
from torch import Tensor

from ..linalg import abs_squared, each_row, unit_size

_UNIFORM_SHARE = 0.1  # of the chances by energy: bounds the weight of a column that was silent so far
_UNIFORM_EVERY = 5  # column by slices, for the same reason


def column_energies(x: Tensor, mode: int, rows: int) -> Tensor:
    """|column|^2 / |x|^2 for each column of X_(n), (*rows, columns); zero where x is."""
    unit = unit_size(x, rows)
    squares = abs_squared(unit) if unit.is_complex() else unit.square_()
    energies = squares.sum(rows + mode).flatten(rows)
    return energies / energies.sum(-1, keepdim=True).clamp_min(torch.finfo(energies.dtype).tiny)


def slice_energies(x: Tensor, rows: int) -> list[Tensor]:
    """|slice|^2 / |x|^2 for each index of each mode, (*rows, d_m) for mode m; zero where x is."""
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    squares = unit_size(real, rows).square_()
    lead, shape = x.shape[:rows], x.shape[rows:]
    middle = len(shape) // 2
    squares = squares.reshape(*lead, prod(shape[:middle]), -1)
    # Two sums over all serve all modes.
    halves = squares.sum(-1).reshape(*lead, *shape[:middle]), squares.sum(-2)
    tail = halves[1].reshape(*lead, *shape[middle:], -1).sum(-1)
    total = each_row(tail, rows).sum(-1, keepdim=True) if rows else tail.sum()
    total = total.clamp_min(torch.finfo(tail.dtype).tiny)
    found: list[Tensor] = []
    for half in (halves[0], tail):
        for m in range(rows, half.ndim):
            others = [i for i in range(rows, half.ndim) if i != m]
            found.append((half.sum(others) if others else half) / total)
    return found


def by_energy(energies: Tensor, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` different columns and their weights, (*rows, count), by :func:`inclusion` from energies (*rows, N).

    A tenth of the chances is spread evenly, and all of them where the energies are zero.
    """
    total, columns = energies.double().sum(-1, keepdim=True), energies.shape[-1]
    even = 1 / columns
    shares = (1 - _UNIFORM_SHARE) * energies / total.clamp_min(torch.finfo(energies.dtype).tiny)
    chances = inclusion(torch.where(total > 0, shares + _UNIFORM_SHARE * even, even), count)
    # Systematic sampling: marks at distance 1 along the chances, which lie end to end in a random order.
    device = energies.device
    order = torch.randperm(columns, generator=source, device="cpu").to(device, non_blocking=True)
    offset = torch.rand((), dtype=torch.float64, generator=source, device="cpu").to(device, non_blocking=True)
    ends = chances[..., order].cumsum(-1)
    marks = offset + torch.arange(count, dtype=torch.float64, device=device)
    places = torch.searchsorted(ends, marks.expand(*ends.shape[:-1], count).contiguous())
    indices = order[places.clamp_max(columns - 1)]
    return indices, 1 / chances.gather(-1, indices)


def inclusion(shares: Tensor, count: int) -> Tensor:
    """Chances pi_j = min(1, a p_j) that sum to ``count``, for positive shares p and ``count`` below their number.

    Both are of shape (*rows, columns).
    """
    ordered = shares.sort(descending=True).values
    rest = ordered.flip(-1).cumsum(-1).flip(-1)  # p_k + p_{k+1} + ...
    factors = (count - torch.arange(shares.shape[-1], device=shares.device)) / rest
    certain = (factors * ordered > 1).logical_and(factors > 0).long().cumprod(-1).sum(-1, keepdim=True)
    return (shares * factors.gather(-1, certain)).clamp(max=1)


def by_slices(energies: Sequence[Tensor], count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` indices along each mode, drawn by the energies (*rows, d_m) of its slices; every fifth one evenly.

    Returns:
        The indices, (N, *rows, count), and their chances by energy, of the same shape; see :func:`joined`.
    """
    drawn = torch.rand((len(energies), count), generator=source, dtype=torch.float64)
    drawn = drawn.to(energies[0].device, non_blocking=True)
    evenly = torch.arange(count, device=drawn.device) % _UNIFORM_EVERY == 0
    indices: list[Tensor] = []
    chances: list[Tensor] = []
    for energy, uniform in zip(energies, drawn, strict=True):
        d = energy.shape[-1]
        steps = torch.where(energy.any(-1, keepdim=True), energy.double(), 1.0).cumsum(-1)
        steps = steps / steps[..., -1:]
        sought = uniform.expand(*steps.shape[:-1], count).contiguous()
        index = torch.where(evenly, (uniform * d).long(), torch.searchsorted(steps, sought, right=True))
        index = index.clamp_max(d - 1)
        indices.append(index)
        chances.append(steps.diff(prepend=steps.new_zeros(*steps.shape[:-1], 1)).gather(-1, index))
    return torch.stack(indices), torch.stack(chances)


def joined(drawn: tuple[Tensor, Tensor], shape: tuple[int, ...], mode: int, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` columns of X_(n) that :func:`by_slices` drew, and their weights, (*rows, count).

    A column may come several times. Those drawn by energy have as chance the product of the modes' own.
    """
    indices, chances = (x[..., :count] for x in drawn)
    columns, chance = torch.zeros_like(indices[0]), torch.ones_like(chances[0])
    others = [m for m in range(len(shape)) if m != mode]
    for m in others:
        columns = columns * shape[m] + indices[m]
        chance = chance * chances[m]
    # Fixed numbers of draws from two distributions.
    evenly = ceil(count / _UNIFORM_EVERY)
    return columns, 1 / (evenly / prod(shape[m] for m in others) + (count - evenly) * chance)
