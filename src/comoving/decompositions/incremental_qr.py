"""QR of a matrix that grows by columns."""

from typing import Any, cast

import torch
from torch import Tensor

from ..linalg import qr, trouble
from ..linalg.checks import require_dtype
from .tsqr import dependent_columns, phase_of, qr_backward, tsqr


def incremental_qr(q: Tensor, r: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    r"""QR of [A, C] from that of A = Q R: Q' = [Q, Q_2], R' = [[R, S], [0, R_2]].

    Block Gram-Schmidt with one re-orthogonalization ("twice is enough"; Giraud, Langou, Rozloznik, van den Eshof,
    Numer. Math. 101, 2005): S = Q^H C, Q_2 R_2 = C - Q S, with S and the remainder corrected once by the same
    step. R_2 has a real, non-negative diagonal. New columns that depend on those before them (what is left of one is
    below 16 sqrt(k + n) machine epsilons of its length) get an orthonormal direction that completes Q and an exact zero
    on R's diagonal. Q is taken to be orthonormal; it is copied, never changed.

    Gradient, with W̄ that of C - Q S from the QR (see :func:`tsqr`) and W̄' = (I - Q Q^H) W̄:

        C̄ = W̄' + Q S̄,   Q̄ += C S̄^H - W̄ S^H - C W̄^H Q,

    which along changes that keep Q^H Q = I is the derivative. Completed directions have no derivative and are left out,
    as in :func:`tsqr`. Differentiable any number of times elsewhere.

    Args:
        q: (*batch, m, k) with orthonormal columns, float32, float64, complex64 or complex128; finite (not checked).
        r: (*batch, k, k) upper triangular.
        columns: C, (*batch, m, n) with k + n <= m.

    Returns:
        Q' (*batch, m, k + n) and R' (*batch, k + n, k + n). One boolean is read on the host (is any column dependent?).

    Raises:
        TypeError: for half precision, integers or unequal dtypes.
        ValueError: for shapes that do not fit, or k + n > m.
    """
    require_dtype("incremental_qr", q, r, columns)
    k, n = q.shape[-1], columns.shape[-1]
    if q.shape[:-1] != columns.shape[:-1] or r.shape != (*q.shape[:-2], k, k):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, r, columns))
        raise ValueError(f"incremental_qr: (*batch, m, k), (*batch, k, k) and (*batch, m, n), not {shapes}")
    if k + n > q.shape[-2]:
        raise ValueError(f"incremental_qr: n = {n} new columns are outside [0, {q.shape[-2] - k}], what m - k leaves")
    s, added, r2 = cast("tuple[Tensor, Tensor, Tensor]", _Increment.apply(q, columns))
    below = r.new_zeros(*r.shape[:-2], n, k)
    return torch.cat([q, added], -1), torch.cat([torch.cat([r, s], -1), torch.cat([below, r2], -1)], -2)


def completed(q: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that stand orthonormal beside Q and span with it what [Q, C] does, whatever the rank of that.

    Householder's QR of [Q, C]: what C leaves open is completed to an orthonormal basis. Gradient as torch's own, where
    C has full rank beside Q.

    Args:
        q: (*batch, m, k) with orthonormal columns.
        columns: C, (*batch, m, n) with k + n <= m.

    Returns:
        (*batch, m, n), and the triangle R of the QR, with LAPACK's signs.
    """
    whole, triangle = qr(torch.cat([q, columns], -1))
    return whole[..., q.shape[-1] :], triangle


class _Increment(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = q.mH @ columns
        rest = columns - q @ s
        again = q.mH @ rest
        rest, s = rest - q @ again, s + again
        added, r2 = tsqr(rest)
        dead = _dead(columns, r2, q.shape[-1])
        if trouble(dead.any()):
            added, r2 = _complete(q, rest, dead)
        return s, added, r2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        q, columns, s, added, r2 = ctx.saved_tensors
        grad_s, grad_added, grad_r2 = grad_outputs
        w = qr_backward(added, r2, grad_added, grad_r2)
        inside = q.mH @ w
        grad_q = columns @ (grad_s - inside).mH - w @ s.mH
        return grad_q, w + q @ (grad_s - inside)


def _dead(columns: Tensor, r2: Tensor, before: int) -> Tensor:
    limit = 16 * torch.finfo(r2.dtype).eps * (before + r2.shape[-1]) ** 0.5
    length = torch.linalg.vector_norm(columns, dim=-2)
    return (r2.diagonal(dim1=-2, dim2=-1).abs() <= limit * length) | dependent_columns(r2)


def _complete(q: Tensor, rest: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`completed` makes of [Q, W] with W's dependent columns, with exact zeros for them on R's diagonal."""
    added, triangle = completed(q, rest)
    added = added * phase_of(triangle.diagonal(dim1=-2, dim2=-1)[..., q.shape[-1] :]).unsqueeze(-2)
    r2 = (added.mH @ rest).triu()
    exact = torch.where(dead, 0, r2.diagonal(dim1=-2, dim2=-1))
    return added, r2.triu(1) + torch.diag_embed(exact)
