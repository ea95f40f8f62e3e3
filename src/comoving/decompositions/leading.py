"""Leading left singular vectors by the smaller of two Gram matrices, or by an SVD after QR."""

from typing import Literal

from torch import Tensor

from ..linalg import orthonormalize, unfold
from .eigenvectors import leading_eigenvectors
from .singular import left_vectors
from .tsqr import tsqr

Method = Literal["gram", "svd"]


def leading_directions(x: Tensor, mode: int, rank: int, method: Method = "gram", rows: int = 0) -> Tensor:
    """The ``rank`` leading left singular vectors of X_(n), (*rows, d_n, rank), completed where it has fewer.

    Orthonormal, in any gauge. Differentiable, with the gradients of :func:`eigenvectors`, :func:`leading_left_vectors`
    and :func:`tsqr`; that of a direction that completes the others is finite and means nothing.

    Args:
        x: (*rows, d_1, ..., d_N), float32, float64, complex64 or complex128, with entries of about 1: squares of large
            or small ones would leave the range of float32.
        mode: n. Of a matrix, mode 0 is the matrix itself.
        rank: at most d_n.
        method: "gram" takes eigenvectors of X_(n) X_(n)^H or X_(n)^H X_(n), whichever is smaller, accurate for singular
            values above about sqrt(machine epsilon) of the largest; "svd" is that of :func:`leading_left_vectors`,
            accurate for all and slower.
        rows: leading dimensions of x that count rows.

    Raises:
        TypeError: for half precision and integers.
    """
    a = unfold(x, mode, x.ndim - rows)
    d, columns = a.shape[-2:]
    if method == "svd" and rank <= columns:
        return left_vectors(a)[0][..., :rank].contiguous()
    if rank <= columns < d:  # the other side is the small one
        images = spanning(a, rank)
        # The same Q; the gradient of this one is finite where the images depend on one another.
        return tsqr(images)[0] if images.requires_grad else orthonormalize(images)
    return leading_eigenvectors(a @ a.mH, rank)  # completes what too few columns leave open


def spanning(a: Tensor, count: int) -> Tensor:
    """Columns that span the ``count`` leading left singular directions of A, neither normalized nor completed.

    Args:
        a: (*batch, d, m), as in :func:`leading_directions`.
        count: at most min(d, m).

    Returns:
        (*batch, d, count): the vectors themselves where m >= d, else A times the right ones.
    """
    if a.shape[-1] < a.shape[-2]:
        return a @ leading_eigenvectors(a.mH @ a, count)
    return leading_eigenvectors(a @ a.mH, count)
