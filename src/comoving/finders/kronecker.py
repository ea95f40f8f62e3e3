"""Random test matrices that are Kronecker products of one small Gaussian matrix per mode."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ..draws import sent

_NARROWEST = 4


def widths(shape: Sequence[int], wanted: Mapping[int, int]) -> tuple[int, ...]:
    """k_1, ..., k_N as small and as equal as they can be, so that the product over m != n of k_m is wanted[n] or more.

    No k_m exceeds d_m, nor needs to: all of the unfolding's columns are enough. None is below 4 where d_m is not, for
    every column of the sketch would share the luck of a single Gaussian vector.

    Args:
        shape: (d_1, ..., d_N).
        wanted: columns of the sketch of mode n.
    """
    k = [min(d, _NARROWEST) for d in shape]
    for n, columns in wanted.items():
        others = [m for m in range(len(shape)) if m != n]
        enough = min(columns, prod(shape[m] for m in others))
        while (product := prod(k[m] for m in others)) < enough:
            shortest = min((m for m in others if k[m] < shape[m]), key=lambda m: (k[m], -shape[m]))
            # All at once where nothing else can grow, as for a matrix.
            alone = all(k[m] == shape[m] for m in others if m != shortest)
            k[shortest] = -(-enough * k[shortest] // product) if alone else k[shortest] + 1
    return tuple(k)


def gaussians(
    shape: Sequence[int], widths: Sequence[int], generator: torch.Generator, like: Tensor
) -> tuple[Tensor | None, ...]:
    """A_m of shape (k_m, d_m) with standard normal entries, None (the identity) where k_m = d_m.

    Drawn on the CPU, hence equal on all devices and processes.
    """
    return tuple(
        None if k == d else sent(torch.randn((k, d), generator=generator, dtype=like.dtype), like)
        for k, d in zip(widths, shape, strict=True)
    )


def fixed_gaussians(
    shape: tuple[int, ...], widths: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, ...]:
    """:func:`gaussians` that the seed alone decides: drawn anew at each call, so nothing lives beside the state."""
    return gaussians(shape, widths, torch.Generator().manual_seed(seed), torch.empty((), dtype=dtype, device=device))
