"""Singular vectors and values of a matrix that grows by columns."""

import torch
from torch import Tensor

from ..linalg import WIDE
from ..linalg.checks import require_dtype, require_within
from .eigenvectors import eigenvectors
from .incremental_qr import incremental_qr


def incremental_svd(u: Tensor, values: Tensor, columns: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    r"""The leading left singular vectors and values of [U diag(s), C], from U and s (Brand, ECCV 2002).

    With the QR of the grown matrix, [U, Q] and [[diag(s), S], [0, R]] (:func:`incremental_qr`), all that is decomposed
    is the small triangle: its left vectors W turn the basis, U' = [U, Q] W. U diag(s) stands for all columns so far,
    for U diag(s) diag(s)^H U^H is their Gram matrix; nothing is dropped where ``count`` is k + n.

    The squares of the triangle are formed, in double the precision where there is one: singular values are accurate
    down to about 1e-8 of the largest. Gradient by :func:`eigenvectors` and :func:`incremental_qr`.

    Args:
        u: (*batch, d, k) with orthonormal columns (not checked), float32, float64, complex64 or complex128.
        values: s, (*batch, k), real.
        columns: C, (*batch, d, n) with k + n <= d.
        count: how many are kept, in [1, k + n]; default k.

    Returns:
        U' (*batch, d, count), orthonormal to roundoff, and s' (*batch, count), largest first. One boolean is read on
        the host, as in :func:`incremental_qr`.

    Raises:
        TypeError: for half precision, integers or unequal dtypes.
        ValueError: for shapes that do not fit, k + n > d, or a count outside its interval.
    """
    require_dtype("incremental_svd", u, columns)
    k = u.shape[-1]
    if values.shape != (*u.shape[:-2], k):
        raise ValueError(f"incremental_svd: values of shape {(*u.shape[:-2], k)}, not {tuple(values.shape)}")
    basis, triangle = incremental_qr(u, torch.diag_embed(values.to(u.dtype)), columns)
    most = basis.shape[-1]
    kept = require_within("incremental_svd: count", k if count is None else count, min(1, most), most)
    vectors, found = turning(triangle[..., k:], kept, values)
    return basis @ vectors, found


def turning(a: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``count`` leading left singular vectors, in a's dtype, and singular values of [diag(own), A], largest first.

    The small problem of :func:`incremental_svd`, also where A = [U Q]^H O is known by contraction alone. From the
    eigenvectors of A A^H in double the precision: for few rows. Gradient by :func:`eigenvectors`.

    Args:
        a: (*batch, r, n), with entries whose squares fit.
        count: <= r.
        own: (*batch, k) with k <= r, real: a diagonal block that stands before the first k rows of A; none by default.

    Returns:
        (*batch, r, count) and (*batch, count), real.
    """
    wide = a.to(WIDE.get(a.dtype, a.dtype))
    product = wide @ wide.mH
    if own is not None:
        product.diagonal(dim1=-2, dim2=-1)[..., : own.shape[-1]].add_(own.to(product.dtype).square())
    squares, vectors = eigenvectors(product)
    leading = vectors[..., -count:].flip(-1).to(a.dtype).contiguous()
    least = torch.finfo(squares.dtype).tiny  # where the root has a derivative still
    return leading, squares[..., -count:].flip(-1).clamp_min(least).sqrt().to(a.dtype.to_real())
