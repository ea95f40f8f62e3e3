"""The largest singular value of a product of thin factors, bounded from above on the device."""

from math import ceil, log, log2

import torch
from torch import Tensor

from .orthonormal import widest_dtype

ACCURACY = 0.002
"""Relative: sigma_max <= bound <= (1 + ACCURACY) sigma_max, up to roundoff."""


def gram_product(u: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """K = diag(a) U^H U diag(a) V^H V: its eigenvalues are the squared singular values of U diag(a) V^T, and zeros.

    In float64, since U and V need not be well conditioned; in float32 on devices that have no other.

    Args:
        u: (*batch, d_out, r).
        a: (*batch, r).
        v: (*batch, d_in, r).

    Returns:
        (*batch, r, r).
    """
    wide = widest_dtype(u.device)
    u, a, v = u.to(wide), a.to(wide), v.to(wide)
    return (a.unsqueeze(-1) * (u.mT @ u) * a.unsqueeze(-2)) @ (v.mT @ v)


def bound(product: Tensor) -> Tensor:
    """tr(K^p)^(1/(2p)) for K of :func:`gram_product`: sigma_max within :data:`ACCURACY`, from above, (*batch,).

    The sum of the p-th powers of r eigenvalues lies between that of the largest and r times it, hence p = 2^q with
    ln(r) / (2p) <= ACCURACY: power iteration by q squarings, each divided by the trace, whose logarithms are summed.
    Nothing is read on the host.

    Args:
        product: (*batch, r, r).
    """
    rank = product.shape[-1]
    squarings = ceil(log2(max(1.0, log(rank) / (2 * ACCURACY))))
    tiny = torch.finfo(product.dtype).tiny
    logarithm = torch.zeros(product.shape[:-2], dtype=product.dtype, device=product.device)
    for step in range(squarings + 1):
        trace = _trace(product)
        logarithm = logarithm + trace.clamp_min(tiny).log() / 2**step
        product = product / trace.clamp_min(tiny)[..., None, None]
        if step < squarings:
            product = product @ product
    first = _trace(product)  # 1; 0 where K is 0, NaN where it is not finite
    return (logarithm / 2).exp() * first


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)
