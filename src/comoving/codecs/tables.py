"""Levels of codecs that are not evenly spaced, as short tables on each device."""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """Rising levels (n,), and between and beside them.

    ``middles`` (n - 1,) halve the gaps; ``gaps`` (n,) is the wider of the two gaps beside each level.
    """

    levels: Tensor
    middles: Tensor
    gaps: Tensor


@lru_cache(maxsize=64)
def table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Table:
    """The levels on a device, brought there once, and not waited for."""
    x = torch.tensor(levels, dtype=torch.float64, device="cpu")
    inner, none = x.diff(), torch.zeros(1, dtype=torch.float64, device="cpu")
    gaps = torch.maximum(torch.cat([none, inner]), torch.cat([inner, none]))
    return Table(*(part.to(dtype).to(device, non_blocking=True) for part in (x, (x[:-1] + x[1:]) / 2, gaps)))


@cache
def normal() -> tuple[float, ...]:
    """16 levels of NF4: eight from 0 up to 1 at equally likely quantiles, seven from -1 below 0, and 0."""
    edge = 0.9677083  # between the outermost probabilities of 15 and of 16 equal bins
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64, device="cpu"))[:-1]
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64, device="cpu"))[:-1]
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64, device="cpu")]) / above[0]
    return tuple(levels.sort().values.tolist())


@cache
def dynamic() -> tuple[float, ...]:
    """256 levels of the dynamic tree: 127 of each sign, 0 and 1.

    Behind the sign, e = 0 ... 6 zero bits and a one leave 6 - e bits for a fraction, one of the middles of 2^(6 - e)
    equal parts of [0.1, 1]; it is multiplied by 10^-e. The two codes without a one are 0 and 1.
    """
    sizes = _decades(extra=0)
    return tuple(sorted([*sizes, *(-x for x in sizes), 0.0, 1.0]))


@cache
def dynamic_positive() -> tuple[float, ...]:
    """255 levels > 0: the bit of the sign goes to the fraction, which has 7 - e bits; and 1, but not 0."""
    return tuple(sorted([*_decades(extra=1), 1.0]))


def _decades(extra: int) -> list[float]:
    return [
        10.0**-e * (0.1 + 0.9 * (k + 0.5) / 2 ** (6 - e + extra)) for e in range(7) for k in range(2 ** (6 - e + extra))
    ]
