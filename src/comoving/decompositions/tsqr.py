"""Thin QR of tall matrices: a tree of small QRs over row blocks, or CholeskyQR in double the precision.

Communication-avoiding QR (Demmel, Grigori, Hoemmen, Langou, arXiv 0808.2664): each block of rows is factored alone, the
triangles are stacked and factored in turn, and Q is the product down the tree. It is Householder's QR throughout, so Q
is orthonormal whatever A is. For very tall single-precision A, the Gram matrix accumulated in double precision block by
block is faster still (mixed-precision CholeskyQR; Yamazaki, Tomov, Dongarra, SIAM J. Sci. Comput. 37, 2015), and good
while A's columns, scaled to unit length, have a condition number below about 1e5; the triangle tells.
"""

from typing import Any, cast

import torch
from torch import Tensor

from ..linalg import WIDE, qr, qr_triangle
from ..linalg.checks import require_dtype, require_within

_TALL, _NARROW = 64, 512  # rows per column from which, and columns up to which, the Gram matrix is the faster way
_LEAF = 4096  # rows of a leaf, at least; one QR of many more rows is slower and less orthogonal
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # entries that are cast up at a time: what stays in cache, what fills a GPU
_GOOD, _FAIR = 4.0, 1e4  # condition (over sqrt n) up to which Q = A R^-1 is formed in A's precision, in the wide one


def tsqr(a: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Thin QR of a tall matrix, A = Q R with Q^H Q = I and R upper triangular with a real, non-negative diagonal.

    Gradient, with W = R̄ R^H - Q^H Q̄ (triangle and diagonal below make up R's gauge):

        Ā = (Q̄ + Q (striu(W) + striu(W)^H + Re diag(W))) R^-H.

    Rank-deficient A: Q is orthonormal all the same and A = Q R; a column of A that depends on the columns before it
    (r_jj below 16 sqrt(n) machine epsilons times that column's length) has no derivative, and R^-1 is taken without it:
    its gradient is zero and that of the others finite. Differentiable any number of times elsewhere.

    Args:
        a: (*batch, m, n) with m >= n, in float32, float64, complex64 or complex128. Not checked for inf and NaN,
            which come out as NaN or as LAPACK's error.
        block: rows per leaf of the tree, at least 2 n. Without it, single precision with m >= 64 n and n <= 512 tries
            the Gram matrix first and reads one number on the host to decide; leaves then have max(4096, 16 n) rows,
            and fewer than two of them are one QR.

    Returns:
        Q (*batch, m, n) and R (*batch, n, n) in a's dtype.

    Raises:
        TypeError: for half precision and integers.
        ValueError: for m < n, fewer than two dimensions, or block < 2 n.
    """
    _check(a, block)
    return cast("tuple[Tensor, Tensor]", _TSQR.apply(a, block))


def tsqr_r(a: Tensor, block: int | None = None) -> Tensor:
    """The R of :func:`tsqr` alone, without forming Q; arguments, errors and the rule for dependent columns as there.

    Gradient, with W = R̄ R^H: Ā = A R^-1 (striu(W) + striu(W)^H + Re diag(W)) R^-H.
    """
    _check(a, block)
    return cast(Tensor, _Triangle.apply(a, block))


class _TSQR(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
        q, r = _factor(a, block, True)
        assert q is not None
        return q, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int | None], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        q, r = ctx.saved_tensors
        return qr_backward(q, r, *grad_outputs), None


class _Triangle(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, block: int | None) -> Tensor:
        return _factor(a, block, False)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        a, r = ctx.saved_tensors
        live, safe = _without_dependent_columns(r)
        inner = torch.linalg.solve_triangular(safe.mH, _gauge(grad_outputs[0] @ r.mH) * live, upper=False, left=False)
        return a @ torch.linalg.solve_triangular(safe, inner * live.mT, upper=True), None


def qr_backward(q: Tensor, r: Tensor, grad_q: Tensor, grad_r: Tensor) -> Tensor:
    """The gradient of A where A = QR, from those of Q and R; see :func:`tsqr`."""
    live, safe = _without_dependent_columns(r)
    w = grad_r.triu() @ r.mH - q.mH @ grad_q
    return torch.linalg.solve_triangular(safe.mH, (grad_q + q @ _gauge(w)) * live, upper=False, left=False)


def dependent_columns(r: Tensor) -> Tensor:
    """Where r_jj is roundoff next to the length of column j of A, which is that of R's: booleans (*batch, n)."""
    limit = 16 * torch.finfo(r.dtype).eps * r.shape[-1] ** 0.5
    return r.diagonal(dim1=-2, dim2=-1).abs() <= limit * torch.linalg.vector_norm(r, dim=-2)


def phase_of(z: Tensor) -> Tensor:
    """z / |z|, and 1 for 0; safe where |z|^2 underflows, as the diagonal of a rank-deficient R may."""
    if not z.is_complex():
        return torch.where(z < 0, -torch.ones_like(z), 1)
    parts = torch.view_as_real(z)
    largest = parts.abs().amax(-1, keepdim=True)
    scaled = torch.view_as_complex(parts / torch.where(largest == 0, 1, largest))
    return torch.where(largest.squeeze(-1) == 0, 1, scaled / scaled.abs())


def _gauge(w: Tensor) -> Tensor:
    upper, diagonal = w.triu(1), w.diagonal(dim1=-2, dim2=-1)
    return upper + upper.mH + torch.diag_embed(diagonal.real.to(w.dtype) if w.is_complex() else diagonal)


def _without_dependent_columns(r: Tensor) -> tuple[Tensor, Tensor]:
    """A (*batch, 1, n) mask of the independent columns, and R with the identity in the others' rows."""
    live = ~dependent_columns(r.detach()).unsqueeze(-2)
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return live, torch.where(live.mT, r, eye)


def _check(a: Tensor, block: int | None) -> None:
    require_dtype("tsqr", a)
    if a.ndim < 2:
        raise ValueError(f"tsqr: a matrix or a batch of them, not {a.ndim} dimensions")
    m, n = a.shape[-2:]
    if m < n:
        raise ValueError(f"tsqr: n = {n} columns are outside [0, {m}], the number of rows")
    if block is not None:
        require_within("tsqr: block", block, max(2 * n, 1), max(m, 2 * n))


def _factor(a: Tensor, block: int | None, want_q: bool) -> tuple[Tensor | None, Tensor]:
    m, n = a.shape[-2:]
    if 0 in a.shape:
        return a.clone(), a.new_zeros(*a.shape[:-2], n, n)
    if block is None and a.dtype in WIDE and m >= _TALL * n and n <= _NARROW:
        found = _cholesky(a, want_q)
        if found is not None:
            return found
    return _tree(a, max(_LEAF, 16 * n) if block is None else block, want_q)


def _tree(a: Tensor, block: int, want_q: bool) -> tuple[Tensor | None, Tensor]:
    m, n = a.shape[-2:]
    leaves = m // block
    if leaves < 2:  # the root, where signs are cheapest to set
        q, r = _thin(a, want_q)
        phase = phase_of(r.diagonal(dim1=-2, dim2=-1))
        r *= phase.conj().unsqueeze(-1)
        if r.is_complex():
            r.diagonal(dim1=-2, dim2=-1).imag.zero_()
        return q.mul_(phase.unsqueeze(-2)) if want_q else None, r
    cut = leaves * block
    parts = [a[..., :cut, :].unflatten(-2, (leaves, block))]
    if cut < m:  # the rest, shorter than a block and perhaps than it is wide, gives a trapezoid
        parts.append(a[..., cut:, :])
    pairs = [_thin(x, want_q) for x in parts]
    stacked = torch.cat([pairs[0][1].flatten(-3, -2), *(r for _, r in pairs[1:])], -2)
    top, r = _tree(stacked, block, want_q)
    if top is None:
        return None, r
    head = (pairs[0][0] @ top[..., : leaves * n, :].unflatten(-2, (leaves, n))).flatten(-3, -2)
    return torch.cat([head, *(q @ top[..., leaves * n :, :] for q, _ in pairs[1:])], -2), r


def _thin(a: Tensor, want_q: bool) -> tuple[Tensor, Tensor]:
    """Householder's QR; an empty Q where none is wanted."""
    return qr(a) if want_q else (a.new_empty(0), qr_triangle(a))


def _chunks(a: Tensor) -> tuple[Tensor, ...]:
    size = _CHUNK.get(a.device.type, 1 << 24)
    return a.split(max(1, size // a.shape[-1]), -2)


def wide_gram(a: Tensor) -> Tensor:
    """A^H A of a tall single-precision A, accumulated in double precision without a double-precision copy of A."""
    wide = WIDE[a.dtype]
    total = a.new_zeros(*a.shape[:-2], a.shape[-1], a.shape[-1], dtype=wide)
    for rows in _chunks(a):
        x = rows.to(wide)
        total += x.mH @ x
    return total


def _cholesky(a: Tensor, want_q: bool) -> tuple[Tensor | None, Tensor] | None:
    """CholeskyQR through the Gram matrix of A's columns scaled to unit length; None where A is too ill-conditioned."""
    n = a.shape[-1]
    gram = wide_gram(a)
    length = gram.diagonal(dim1=-2, dim2=-1).real.sqrt().unsqueeze(-2)
    factor, info = torch.linalg.cholesky_ex(gram / (length * length.mT))
    eye = torch.eye(n, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor.mH, eye, upper=True)
    # ||R^-1||_F bounds 1 / sigma_min of the scaled A, whose sigma_max is at most sqrt(n); NaN and inf fail the test.
    bound = torch.linalg.matrix_norm(inverse)
    condition = float(torch.where(info == 0, bound, torch.inf).max()) / n**0.5
    if not condition <= _FAIR:
        return None
    r = (factor.mH * length).to(a.dtype)
    if not want_q:
        return None, r
    inverse = inverse / length.mT
    if condition <= _GOOD:
        return a @ inverse.to(a.dtype), r
    return torch.cat([(x.to(inverse.dtype) @ inverse).to(a.dtype) for x in _chunks(a)], -2), r
