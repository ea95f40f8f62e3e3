"""Leading left singular vectors by the smaller of two Gram matrices."""

from math import prod
from typing import Literal

import torch
from torch import Tensor

from .decompositions import svd
from .entries import largest, over
from .multilinear import gram, unfold
from .orthogonal import leading_eigenvectors, orthonormalize

Method = Literal["gram", "svd"]


def leading_directions(x: Tensor, mode: int, rank: int, method: Method = "gram", rows: int = 0) -> Tensor:
    """The ``rank`` leading left singular vectors of X_(n), (*rows, d_n, rank), completed where it has fewer.

    Args:
        x: (*rows, d_1, ..., d_N), entries of about 1: squares of large or small ones would leave the range of float32.
        mode: n.
        rank: at most d_n.
        method: "gram" takes eigenvectors of X_(n) X_(n)^H or X_(n)^H X_(n), whichever is smaller, accurate for singular
            values above about sqrt(machine epsilon) of the largest; "svd" is accurate for all and slower.
        rows: leading dimensions of x that count rows.
    """
    order, d = x.ndim - rows, x.shape[rows + mode]
    columns = prod(x.shape[rows:]) // d
    if method == "svd" and rank <= columns:
        return svd(unfold(x, mode, order))[0][..., :rank].contiguous()
    if rank <= columns < d:  # the other side is the small one
        wide = unfold(x, mode, order)
        return orthonormalize(wide @ leading_eigenvectors(wide.mH @ wide, rank))
    return leading_eigenvectors(gram(x, mode, order), rank)  # completes what too few columns leave open


def unit_size(x: Tensor, rows: int = 0) -> Tensor:
    """x, each row with a largest real or imaginary part of 1, or zero: its squares stay in the range of float32."""
    if rows:
        return x / over(largest(x, rows).clamp_min(torch.finfo(x.dtype).tiny), x)
    low, high = torch.aminmax(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)
    return x / torch.maximum(-low, high).clamp_min(torch.finfo(x.dtype).tiny)
