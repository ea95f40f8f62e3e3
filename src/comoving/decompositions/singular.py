"""Left singular vectors with a gradient that stays finite where singular values coincide or vanish."""

from typing import Any, cast

import torch
from torch import Tensor

from ..linalg import WIDE, asks_host, eigh, qr, qr_triangle, svd
from ..linalg.checks import require_dtype, require_within
from .tsqr import tsqr, tsqr_r, wide_gram

_SMALL = 4096  # entries up to which LAPACK's own SVD takes least time
_TALL = 64  # rows per column from which a QR before the SVD does not repeat what LAPACK does: :func:`tsqr` is faster


def leading_left_vectors(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""The ``count`` leading left singular vectors and singular values of A = U diag(s) V^H, largest first.

    Gauge: the entry of largest modulus of each vector is real and positive (the first of them at a tie).

    Only a small factor of a large A is decomposed, where that takes less time: the triangle R of A or A^H, whichever is
    tall, or in single precision and wide A the Gram matrix A A^H accumulated in double precision. Where ``count`` is
    much below min(d, m), A's range is first sought with a fixed random sketch; if A lies in it up to roundoff (16
    machine epsilons of its Frobenius norm, one number read on the host), the decomposition is that of the sketched A.

    Gradient, with P = U^H Ū and F_ij = 1 / (s_j^2 - s_i^2) over all pairs, and zero outside U's span for s = 0:

        Ḡ = U (F ∘ P) U^H + (I - U U^H) Ū diag(s)^-2 U^H,   Ā = (Ḡ + Ḡ^H) A + U diag(s̄) V^H.

    Degenerate spectra: F_ij = 0 where |s_i - s_j| <= 64 machine epsilons times s_1 (rotations inside a cluster of equal
    singular values get no gradient; functions of the whole cluster's span have none to get, and theirs is exact), and
    the inverse powers of s_j are zero where s_j itself is that small. Everything is finite for every finite A, zero
    included. Differentiable twice where the singular values are distinct.

    Args:
        a: (*batch, d, m), float32, float64, complex64 or complex128; finite (not checked: LAPACK raises on NaN).
        count: r in [1, min(d, m)].

    Returns:
        U (*batch, d, r) with orthonormal columns, s (*batch, r) real.

    Raises:
        TypeError: for half precision and integers.
        ValueError: for a count outside its interval.
    """
    require_dtype("leading_left_vectors", a)
    require_within("leading_left_vectors: count", count, 1, min(a.shape[-2:]))
    u, s = left_vectors(a, count)
    return fix_gauge(u[..., :count]), s[..., :count]


def left_vectors(a: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """All left vectors and singular values of A, in any gauge; with a count those that A has up to roundoff suffice.

    There are at least ``count`` of them. Without one, the range is not sketched, and nothing is read on the host of
    what lies elsewhere.
    """
    return cast("tuple[Tensor, Tensor]", _LeftVectors.apply(a, count))


def fix_gauge(u: Tensor) -> Tensor:
    """Each column with the phase that makes its entry of largest modulus real and positive."""
    index = u.detach().abs().argmax(-2, keepdim=True)
    return u * u.gather(-2, index).sgn().conj()


class _LeftVectors(torch.autograd.Function):
    """All left vectors that A has up to roundoff, which is what the gradient of the leading ones takes."""

    @staticmethod
    def forward(a: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        width = 0 if count is None else 2 * count + 8
        found = _by_range(a, width) if 0 < 4 * width <= min(a.shape[-2:]) else None
        return _decompose(a) if found is None else found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int | None], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        a, u, s = ctx.saved_tensors
        grad_u, grad_s = grad_outputs
        first = s.detach()[..., :1]
        limit = 64 * torch.finfo(s.dtype).eps * first
        scale = torch.where(first == 0, 1, first).unsqueeze(-1)  # 1 / s^2 may overflow where s_1 / s^2 does not
        inside = u.mH @ a  # diag(s) V^H
        p = u.mH @ grad_u
        gap, total = s.unsqueeze(-2) - s.unsqueeze(-1), s.unsqueeze(-2) + s.unsqueeze(-1)
        apart = gap.abs() > limit.unsqueeze(-1)
        x = p * (_inverse_where(gap, apart) * (scale * _inverse_where(total, apart)))
        inverse = _inverse_where(s, s > limit)
        small = x + x.mH + torch.diag_embed((grad_s * inverse).to(a.dtype)) * scale
        result = (u / scale) @ (small @ inside)
        if u.shape[-1] < u.shape[-2]:
            # The other half, U diag(s)^-2 (..)^H A, takes only what A has outside U's span: roundoff.
            result = result + (grad_u - u @ p) @ (inverse.unsqueeze(-1) * (inverse.unsqueeze(-1) * inside))
        return result, None


def _inverse_where(x: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, 1 / torch.where(where, x, 1), 0)


def _decompose(a: Tensor) -> tuple[Tensor, Tensor]:
    d, m = a.shape[-2:]
    if d * m <= _SMALL:
        return svd(a)[:2]
    if m >= 2 * d and a.dtype in WIDE:
        # wide_gram takes tall matrices and sums conjugates on the left: A A^H = conj(gram of A^T).
        values, vectors = eigh(wide_gram(a.mT).conj())
        real = torch.empty((), dtype=a.dtype).real.dtype
        return vectors.flip(-1).to(a.dtype), values.flip(-1).clamp(min=0).sqrt().to(real)
    if m >= 2 * d:
        return svd((tsqr_r(a.mH) if asks_host(a) else qr_triangle(a.mH)).mH)[:2]
    host = asks_host(a)
    if d >= (_TALL if host else 2) * m and (a.dtype in WIDE or not host):
        q, r = tsqr(a) if host else qr(a)
        u, s, _ = svd(r)
        return q @ u, s
    return svd(a)[:2]


def _by_range(a: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
    """The decomposition of A if a random sketch of this width holds A up to roundoff, otherwise None."""
    generator = torch.Generator("cpu" if a.is_meta else a.device).manual_seed(0)
    omega = torch.randn(a.shape[-1], width, dtype=a.dtype, device=a.device, generator=generator)
    basis, _ = tsqr(a @ omega)
    inside = basis.mH @ a
    left_over = torch.linalg.matrix_norm(a - basis @ inside)
    limit = 16 * torch.finfo(a.dtype).eps * torch.linalg.matrix_norm(a)
    if not bool((left_over <= limit).all()):
        return None
    u, s = _decompose(inside)
    return basis @ u, s
