"""Orthonormal bases: CholeskyQR with a measured defect, Householder where that is not enough."""

import torch
from torch import Tensor

from .checks import trouble
from .cosine import cosine_columns
from .lapack import WIDE, asks_host, qr

_INDEPENDENT, _JITTER = 1e-5, 1e-5
"""Of columns of unit length: what must be left of each beyond those before it, and what is added where that is not."""


def _default_tolerance(u: Tensor) -> float:
    return 32 * torch.finfo(u.dtype).eps * u.shape[-1] ** 0.5


def orthogonality_defect(u: Tensor) -> Tensor:
    """max |U^H U - I| over entries, for U of shape (*batch, d, r): a real scalar per batch entry."""
    identity = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    return (u.mH @ u - identity).abs().amax((-2, -1))


def orthonormalize(a: Tensor, tolerance: float | None = None, trusted: bool = False) -> Tensor:
    """An orthonormal basis Q of the columns of A, the Q of A = QR with a positive diagonal in R.

    CholeskyQR: R^H R = A^H A, Q = A R^-1, in double the precision, so that one pass serves condition numbers up to
    about 1e6 and a second one up to 1e12. The defect max |Q^H Q - I| is measured; what passes the tolerance after two
    passes (A rank-deficient, say) goes to Householder's QR, which completes any A to an orthonormal basis. The
    host reads the measurement on the CPU: call this at a refresh, not at every step. On other devices nothing is waited
    for: where columns, brought to unit length, are nearly dependent, 1e-5 of the cosine transform's columns is added to
    them, and three passes follow.

    Args:
        a: (*batch, d, r) with r <= d, in float32, float64, complex64 or complex128 (half precision is cast up by the
            caller: no decomposition exists for it).
        tolerance: largest accepted defect; default 32 machine epsilons times sqrt(r).
        trusted: A is Gaussian, hence of a condition number far below 1e4: one pass in double the precision is then
            enough, or two where there is none, and nothing is read on the host. At most half as wide as long it has
            one below 10, and one pass in its own precision is enough.

    Returns:
        Q of a's shape and dtype, contiguous.
    """
    limit = _default_tolerance(a) if tolerance is None else tolerance
    if not trusted and not asks_host(a):
        return orthonormalize_unseen(a)
    if not trusted and a.ndim > 2:
        return _each_measured(a, limit)
    tall = trusted and 2 * a.shape[-1] <= a.shape[-2]
    q = a if tall else a.to(WIDE.get(a.dtype, a.dtype))
    passes = 1 if tall or (trusted and q.dtype != a.dtype) else 2
    for _ in range(passes):
        factor, info = torch.linalg.cholesky_ex(q.mH @ q)
        q = torch.linalg.solve_triangular(factor.mH, q, upper=True, left=False)
        if trusted:
            continue
        narrow = q.to(a.dtype).contiguous()
        failed = (info != 0).any()
        done = ~failed & (orthogonality_defect(narrow) <= limit).all()
        if bool(done):
            return narrow
        if trouble(failed):
            break
    if trusted:
        return q.to(a.dtype).contiguous()
    return _reflected(a)


def _reflected(a: Tensor) -> Tensor:
    """Householder's Q, with the signs that make R's diagonal positive."""
    q, r = qr(a)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    present = diagonal.abs() >= torch.finfo(a.dtype).tiny  # the sign of a complex denormal is NaN
    return (q * torch.where(present, diagonal.sgn(), 1).unsqueeze(-2)).contiguous()


def _each_measured(a: Tensor, limit: float) -> Tensor:
    """:func:`orthonormalize` of a batch: each matrix goes as far as it would alone, and no mate changes another."""
    q = a.to(WIDE.get(a.dtype, a.dtype))
    found, done = a, torch.zeros(a.shape[:-2], dtype=torch.bool, device=a.device)
    broken = done
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(q.mH @ q)
        q = torch.linalg.solve_triangular(factor.mH, q, upper=True, left=False)
        narrow = q.to(a.dtype).contiguous()
        broken = broken | (info != 0)  # what follows a failure may be orthonormal, but of another span
        found = torch.where(done[..., None, None], found, narrow)
        done = done | (~broken & (orthogonality_defect(narrow) <= limit))
        if a.is_meta or bool(done.all()):
            return found
    found[~done] = _reflected(a[~done])
    return found


def orthonormalize_unseen(a: Tensor) -> Tensor:
    """:func:`orthonormalize` by products and Cholesky's factors alone, of A of any rank, decided on the device.

    The host reads nothing, so that it may be called at every step.
    """
    x = a.to(WIDE.get(a.dtype, a.dtype))
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    length = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    x = x / torch.where(length > 0, length, 1)
    factor, info = torch.linalg.cholesky_ex(x.mH @ x)
    left = factor.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    dependent = (info != 0) | ~(left >= _INDEPENDENT)
    d, r = a.shape[-2:]
    waves = cosine_columns(d, torch.arange(r, device=a.device), x.dtype.to_real())
    x = x + torch.where(dependent[..., None, None], _JITTER, 0.0).to(waves.dtype) * waves
    for _ in range(3):
        factor, _ = torch.linalg.cholesky_ex(x.mH @ x)
        x = torch.linalg.solve_triangular(factor.mH, x, upper=True, left=False)
    return x.to(a.dtype).contiguous()


def reorthonormalize(u: Tensor, tolerance: float | None = None) -> Tensor:
    """U itself while its defect is within the tolerance, an orthonormal basis of the same span once it is not.

    For bases (*batch, d, r) that were cached, cast or updated in place, each on its own. Default tolerance as in
    :func:`orthonormalize`. The host reads the defect on the CPU; elsewhere the basis is always computed, and not waited
    for.
    """
    limit = _default_tolerance(u) if tolerance is None else tolerance
    good = orthogonality_defect(u) <= limit
    if asks_host(u):
        if bool(good.all()):
            return u
        mended = orthonormalize(u, limit)
        return mended if u.ndim == 2 else torch.where(good[..., None, None], u, mended)
    return torch.where(good[..., None, None], u, orthonormalize(u, limit))
