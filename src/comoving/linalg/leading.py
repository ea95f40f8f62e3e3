"""Leading left singular vectors by the smaller of two Gram matrices."""

from typing import Literal

import torch
from torch import Tensor

from .decompositions import svd
from .multilinear import gram, unfold
from .orthogonal import leading_eigenvectors, orthonormalize

Method = Literal["gram", "svd"]


def leading_directions(x: Tensor, mode: int, rank: int, method: Method = "gram") -> Tensor:
    """The ``rank`` leading left singular vectors of the unfolding X_(n), (d_n, rank), completed where it has fewer.

    Args:
        x: (d_1, ..., d_N) with entries of about 1: squares of large or small ones would leave the range of float32.
        mode: n.
        rank: at most d_n.
        method: "gram" takes eigenvectors of X_(n) X_(n)^H or X_(n)^H X_(n), whichever is smaller, accurate for singular
            values above about sqrt(machine epsilon) of the largest; "svd" is accurate for all and slower.
    """
    columns = x.numel() // x.shape[mode]
    if method == "svd" and rank <= columns:
        return svd(unfold(x, mode, x.ndim))[0][:, :rank].contiguous()
    if rank <= columns < x.shape[mode]:  # the other side is the small one
        wide = unfold(x, mode, x.ndim)
        return orthonormalize(wide @ leading_eigenvectors(wide.mH @ wide, rank))
    return leading_eigenvectors(gram(x, mode, x.ndim), rank)  # completes what too few columns leave open


def unit_size(x: Tensor) -> Tensor:
    """x with a largest real or imaginary part of 1, or zero: its squares stay in the range of float32."""
    low, high = torch.aminmax(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)
    return x / torch.maximum(-low, high).clamp_min(torch.finfo(x.dtype).tiny)
