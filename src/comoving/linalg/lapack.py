"""Eigenvectors, QR and SVD that always return: finite input, of any rank, gives finite orthonormal output everywhere.

LAPACK does not promise that. In single precision ``eigh`` of a Gram matrix most of whose rows are zero is NaN or raises
in a quarter of all cases, ``qr`` of a constant complex64 matrix is NaN on some CPUs, and which inputs fail differs from
one library to the next. So a result is checked, and where it is no good, there are other ways to one: double the
precision, a perturbation, another algorithm, and in the end one that is made of plain products alone.

On the CPU the host looks at each result and takes the next way if it has to. Elsewhere it waits for nothing: the result
is replaced on the device, entry by entry of the batch, by coordinate vectors. The checks compare norms that a
decomposition keeps: cheap beside it, and no NaN passes them. Torch itself waits inside of ``eigh`` and ``svd``, to see
whether they converged; there is no other of either that would not, and none made of products takes less time than that.

LAPACK's vectors come with signs, or complex phases, that last digits decide. What keeps numbers in the coordinates of
one basis when the next one comes (GaLore's moments, say) would depend on them: so eigenvectors, and left singular
vectors with the right ones beside them, have the signs of a convention, the same on every machine.

Nothing else in this package calls LAPACK's decompositions (but ``cholesky_ex``, which says itself where it failed).
All of them raise TypeError for half precision and integers, which LAPACK has no routines for.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from .checks import require_dtype
from .entries import norm

Factors = tuple[Tensor, ...]
Figures = list[tuple[Tensor, Tensor | float, Tensor | float]]
Check = Callable[[Factors], Figures]
"""Triples of a figure of the result, what it must be, and the size that its roundoff is measured by."""

WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
"""The dtype with double the precision, where there is one."""
_SMALL = 64  # rows up to which double the precision costs less than what surrounds it
_JITTER = 1e-10  # of the largest entry, far above the roundoff of double precision and below that of single


def asks_host(x: Tensor) -> bool:
    """Whether the host may look at x for a decision: it is on the CPU, or the shadow of something that is."""
    return x.device.type in ("cpu", "meta")


def eigh(hermitian: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a Hermitian matrix, of which the lower triangle is read.

    Each vector's product with the vector of cos(1), ..., cos(d) is real and not negative. Small matrices are decomposed
    in double the precision. Where all of LAPACK fails, the eigenvectors come from an SVD,
    and at last they are the coordinate vectors, with the diagonal for eigenvalues.

    Args:
        hermitian: (*batch, d, d), float32, float64, complex64 or complex128, finite.

    Returns:
        (*batch, d) real and (*batch, d, d), in the input's precision.
    """
    wide = WIDE.get(hermitian.dtype, hermitian.dtype)
    first = wide if hermitian.shape[-1] <= _SMALL else hermitian.dtype
    ways: list[Callable[[], Factors]] = [partial(_eigh, hermitian, first)]
    if first != wide:
        ways.append(partial(_eigh, hermitian, wide))
    ways += [partial(_eigh, hermitian, wide, _JITTER), partial(_eigh_by_svd, hermitian)]
    values, vectors = _first_good(hermitian, ways, partial(_is_eigh, hermitian), partial(_by_diagonal, hermitian))
    return values, vectors


def qr(a: Tensor) -> tuple[Tensor, Tensor]:
    """The reduced A = Q R, Q orthonormal whatever the rank of A; the signs of R's diagonal are LAPACK's.

    Where LAPACK fails in both precisions, Householder's reflections are made of plain products (on the CPU).

    Args:
        a: (*batch, m, n), float32, float64, complex64 or complex128, finite.

    Returns:
        (*batch, m, k) and (*batch, k, n), k = min(m, n), in a's dtype.
    """
    wide = WIDE.get(a.dtype, a.dtype)
    # Complex reflectors of single precision are the ones that are known to fail; elsewhere nobody can look.
    first = wide if a.dtype == torch.complex64 and not asks_host(a) else a.dtype
    ways: list[Callable[[], Factors]] = [partial(_qr, a, first)]
    if first != wide:
        ways.append(partial(_qr, a, wide))
    q, r = _first_good(a, ways, _is_qr, partial(_reflections if asks_host(a) else _coordinates, a))
    return q, r


def qr_triangle(a: Tensor) -> Tensor:
    """The R of :func:`qr` alone, where Q is not wanted."""
    wide = WIDE.get(a.dtype, a.dtype)
    ways: list[Callable[[], Factors]] = [partial(_triangle, a, a.dtype), partial(_triangle, a, wide)]
    (r,) = _first_good(a, ways, _is_finite, lambda: qr(a)[1:])
    return r


def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced A = U diag(s) V^H, s descending; U and V orthonormal whatever the rank of A.

    The product of each column of U with the vector of cos(1), ..., cos(m) is real and not negative.
    Where LAPACK fails in both precisions, V holds the eigenvectors of A^H A, or U those of A A^H, whichever is smaller,
    and :func:`qr` of the product with A makes the other factor orthonormal (on the CPU).

    Args:
        a: (*batch, m, n), float32, float64, complex64 or complex128, finite.

    Returns:
        U (*batch, m, k), s (*batch, k) real, V^H (*batch, k, n), k = min(m, n), in a's precision.
    """
    wide = WIDE.get(a.dtype, a.dtype)
    ways: list[Callable[[], Factors]] = [partial(_svd, a, a.dtype)]
    if wide != a.dtype:
        ways.append(partial(_svd, a, wide))
    u, s, vh = _first_good(a, ways, _is_svd, partial(_svd_by_eigh if asks_host(a) else _svd_by_diagonal, a))
    return u, s, vh


def pinv(a: Tensor, rtol: float) -> Tensor:
    """The pseudoinverse of A, singular values below rtol times the largest counting as zero; see :func:`svd`.

    Differentiable as torch's own is, where that returns.
    """
    (inverse,) = _first_good(a, [partial(_pinv, a, rtol)], _is_finite, partial(_pinv_by_svd, a, rtol))
    return inverse


# ------------------------------------------------------------------------------------------------------- the way out


def _first_good(a: Tensor, ways: Iterable[Callable[[], Factors]], check: Check, last: Callable[[], Factors]) -> Factors:
    """The first result that passes its check, for each entry of the batch; what the last way makes is not checked."""
    require_dtype("decomposition", a)  # torch's own refusal would pass for a failure of LAPACK
    kept, good = None, None
    for way in ways:
        try:
            found = way()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # LAPACK gave up, or torch did not like what it returned
            continue
        if a.is_meta:
            return found
        with torch.no_grad():
            fine = _passed(check(found), a)
        if fine is True and good is None:
            return found
        fine = torch.as_tensor(fine, device=a.device)
        kept, good = (found, fine) if kept is None or good is None else (_chosen(good, kept, found), good | fine)
        if not asks_host(a):
            break
        if bool(good.all()):
            return kept
    fallback = last()
    return fallback if kept is None or good is None else _chosen(good, kept, fallback)


def _chosen(good: Tensor, one: Factors, other: Factors) -> Factors:
    """One where it is good, the other elsewhere, for each entry of the batch."""
    pairs = zip(one, other, strict=True)
    return tuple(torch.where(good.reshape(*good.shape, *[1] * (x.ndim - good.ndim)), x, y) for x, y in pairs)


def _passed(triples: Figures, like: Tensor) -> Tensor | bool:
    """Whether all figures agree but for many roundings, for each entry of a batch; a NaN agrees with nothing."""
    many = 1e4 * torch.finfo(like.dtype).eps
    if asks_host(like) and like.ndim == 2:  # numbers are many times cheaper than tensors of one number
        return all(abs(float(x) - float(y)) <= many * float(size) for x, y, size in triples)
    return torch.stack([(x - y).abs() <= many * size for x, y, size in triples]).all(0)


def _orthonormal(q: Tensor) -> Figures:
    """|Q| and |Q 1|, both the root of the number of columns: a basis that is none shows in one of them."""
    root = q.shape[-1] ** 0.5
    image = q @ q.new_ones(q.shape[-1])
    if q.ndim == 2:  # without dim, and along the columns as LAPACK lays them out, it takes a tenth of the time
        return [(norm(q.mT), root, root), (norm(image), root, root)]
    sizes = torch.linalg.vector_norm(q, dim=(-2, -1)), torch.linalg.vector_norm(image, dim=-1)
    return [(size, root, root) for size in sizes]


def _finite(x: Tensor) -> Figures:
    """Zero times the sum is zero."""
    return [((x.mT.sum() if x.ndim == 2 else x.sum((-2, -1))).abs() * 0, 0.0, 1.0)]


def _largest(a: Tensor) -> Tensor:
    return a.abs().amax((-2, -1), keepdim=True)


@torch.no_grad()
def _phases(vectors: Tensor) -> Tensor:
    """The sign, or complex phase, of each column's product with the fixed vector, (*batch, 1, columns)."""
    fixed = torch.arange(1, vectors.shape[-2] + 1, device=vectors.device, dtype=vectors.dtype.to_real()).cos()
    phases = (fixed.to(vectors.dtype).unsqueeze(0) @ vectors).sgn()
    return torch.where(phases == 0, torch.ones_like(phases), phases)


# ------------------------------------------------------------------------------------------------------ eigenvectors


def _eigh(hermitian: Tensor, dtype: torch.dtype, jitter: float = 0.0) -> Factors:
    h = hermitian.to(dtype)
    if jitter:
        wave = torch.cos(torch.arange(h.shape[-1] ** 2, device=h.device, dtype=h.dtype.to_real()).square())
        h = h + (jitter * _largest(h)) * wave.reshape(h.shape[-2:]).to(dtype)
    values, vectors = torch.linalg.eigh(h)
    vectors = vectors * _phases(vectors).conj()
    return values.to(hermitian.dtype.to_real()), vectors.to(hermitian.dtype)


def _whole(hermitian: Tensor) -> Tensor:
    """The Hermitian matrix that has this lower triangle."""
    below = hermitian.tril(-1)
    diagonal = hermitian.diagonal(dim1=-2, dim2=-1)
    return below + below.mH + torch.diag_embed(diagonal.real.to(below.dtype) if below.is_complex() else diagonal)


def _eigh_by_svd(hermitian: Tensor) -> Factors:
    """Right singular vectors, ordered by their Rayleigh quotients: eigenvectors, but where x and -x both are values."""
    h = _whole(hermitian)
    wide = h.to(WIDE.get(h.dtype, h.dtype))
    vectors = torch.linalg.svd(wide).Vh.mH
    vectors = vectors * _phases(vectors).conj()
    return _sorted((vectors.conj() * (wide @ vectors)).sum(-2), vectors, hermitian.dtype)


def _by_diagonal(hermitian: Tensor) -> Factors:
    eye = torch.eye(hermitian.shape[-1], dtype=hermitian.dtype, device=hermitian.device)
    return _sorted(hermitian.diagonal(dim1=-2, dim2=-1), eye.expand(hermitian.shape), hermitian.dtype)


def _sorted(values: Tensor, vectors: Tensor, dtype: torch.dtype) -> Factors:
    ordered = (values.real if values.is_complex() else values).sort(dim=-1, stable=True)
    turned = vectors.gather(-1, ordered.indices.unsqueeze(-2).expand(vectors.shape))
    return ordered.values.to(dtype.to_real()), turned.to(dtype)


def _is_eigh(hermitian: Tensor, found: Factors) -> Figures:
    """Orthonormal vectors, and values whose sum is the trace."""
    values, vectors = found
    trace = hermitian.diagonal(dim1=-2, dim2=-1).sum(-1)
    size = values.abs().sum(-1)
    return [*_orthonormal(vectors), (values.sum(-1), trace.real if trace.is_complex() else trace, size)]


# ---------------------------------------------------------------------------------------------------------------- QR


def _qr(a: Tensor, dtype: torch.dtype) -> Factors:
    q, r = torch.linalg.qr(a.to(dtype))
    return q.to(a.dtype), r.to(a.dtype)


def _triangle(a: Tensor, dtype: torch.dtype) -> Factors:
    return (torch.linalg.qr(a.to(dtype), mode="r").R.to(a.dtype),)


def _is_qr(found: Factors) -> Figures:
    """An orthonormal Q, and a finite R."""
    return [*_orthonormal(found[0]), *_finite(found[1])]


def _is_finite(found: Factors) -> Figures:
    return _finite(found[0])


def _reflections(a: Tensor) -> Factors:
    """Householder's QR, a reflection at a time, in double the precision."""
    wide = WIDE.get(a.dtype, a.dtype)
    size = _largest(a.to(wide))
    r = a.to(wide) / torch.where(size == 0, 1, size)
    k = min(a.shape[-2:])
    mirrors: list[Tensor] = []
    for j in range(k):
        x = r[..., j:, j : j + 1].clone()
        length = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
        head = x[..., :1, :]
        phase = torch.where(head.abs() > torch.finfo(wide).tiny, head.sgn(), 1)
        x[..., :1, :] += phase * length
        norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
        mirrors.append(x / torch.where(norm == 0, 1, norm))
        r[..., j:, j:] -= mirrors[j] @ (2 * (mirrors[j].mH @ r[..., j:, j:]))
    q = torch.eye(a.shape[-2], k, dtype=wide, device=a.device).repeat(*a.shape[:-2], 1, 1)
    for j in reversed(range(k)):
        q[..., j:, :] -= mirrors[j] @ (2 * (mirrors[j].mH @ q[..., j:, :]))
    return q.to(a.dtype), (r[..., :k, :].triu() * size).to(a.dtype)


def _coordinates(a: Tensor) -> Factors:
    """Coordinate vectors, and what of A is seen in them."""
    k = min(a.shape[-2:])
    eye = torch.eye(a.shape[-2], k, dtype=a.dtype, device=a.device)
    return eye.expand(*a.shape[:-1], k), a[..., :k, :].triu()


# --------------------------------------------------------------------------------------------------------------- SVD


def _svd(a: Tensor, dtype: torch.dtype) -> Factors:
    u, s, vh = torch.linalg.svd(a.to(dtype), full_matrices=False)
    u, vh = _signed(u, vh)
    return u.to(a.dtype), s.to(a.dtype.to_real()), vh.to(a.dtype)


def _signed(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors with the signs of the convention."""
    phases = _phases(u)
    return u * phases.conj(), vh * phases.mT


def _is_svd(found: Factors) -> Figures:
    """Orthonormal U and V, and finite singular values."""
    u, s, vh = found
    return [*_orthonormal(u), *_orthonormal(vh.mH), *_finite(s.unsqueeze(-1))]


def _svd_by_eigh(a: Tensor) -> Factors:
    if a.shape[-2] < a.shape[-1]:
        v, s, uh = _svd_by_eigh(a.mH)
        u, vh = _signed(uh.mH, v.mH)
        return u, s, vh
    x = a.to(WIDE.get(a.dtype, a.dtype))
    size = _largest(x)
    x = x / torch.where(size == 0, 1, size)
    v = eigh(x.mH @ x)[1].flip(-1)
    q, r = qr(x @ v)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    lengths = diagonal.abs()
    phases = torch.where(lengths > torch.finfo(x.dtype).tiny, diagonal.sgn(), 1)
    ordered = lengths.sort(dim=-1, descending=True, stable=True)
    u, v = (y.gather(-1, ordered.indices.unsqueeze(-2).expand(y.shape)) for y in (q * phases.unsqueeze(-2), v))
    u, vh = _signed(u, v.mH)
    return u.to(a.dtype), (ordered.values * size.squeeze(-1)).to(a.dtype.to_real()), vh.to(a.dtype)


def _svd_by_diagonal(a: Tensor) -> Factors:
    """Coordinate vectors on both sides, ordered by the diagonal between them."""
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    ordered = diagonal.abs().sort(dim=-1, descending=True, stable=True)
    phases = torch.where(diagonal.abs() > torch.finfo(a.dtype).tiny, diagonal.sgn(), 1)
    sides: list[Tensor] = []
    for rows in a.shape[-2:]:
        eye = torch.eye(rows, diagonal.shape[-1], dtype=a.dtype, device=a.device).expand(*a.shape[:-2], rows, -1)
        sides.append(eye.gather(-1, ordered.indices.unsqueeze(-2).expand(eye.shape)))
    return sides[0] * phases.gather(-1, ordered.indices).unsqueeze(-2), ordered.values, sides[1].mH


def _pinv(a: Tensor, rtol: float) -> Factors:
    return (torch.linalg.pinv(a, rtol=rtol),)


def _pinv_by_svd(a: Tensor, rtol: float) -> Factors:
    u, s, vh = svd(a)
    live = (s > rtol * s[..., :1]).unsqueeze(-2)
    inverse = torch.where(live, 1 / torch.where(live, s.unsqueeze(-2), 1), 0)
    return ((vh.mH * inverse) @ u.mH,)
