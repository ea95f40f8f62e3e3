"""The leading singular triplets of matrices, and how subspaces lie to each other: pure functions, batched."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import WIDE, eigh, qr, svd

_WORKING = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}


class Spectrum(NamedTuple):
    """The k leading singular triplets of A ~ U diag(s) V^H, largest first.

    u (*batch, m, k) and v (*batch, n, k) have orthonormal columns, s (*batch, k) is real. Float32 or wider.
    """

    u: Tensor
    s: Tensor
    v: Tensor


def working(a: Tensor) -> Tensor:
    """A in float32 at least: half precision has no decompositions."""
    return a.to(_WORKING.get(a.dtype, a.dtype))


def check_count(k: int, shape: tuple[int, ...], what: str = "k") -> None:
    """Raise unless 1 <= k <= min(m, n).

    Raises:
        ValueError: otherwise, with both.
    """
    if not 1 <= k <= min(shape[-2:]):
        raise ValueError(f"{what} = {k} is outside [1, {min(shape[-2:])}], for a matrix {tuple(shape[-2:])}")


def exact(a: Tensor, k: int) -> Spectrum:
    """The k leading triplets by LAPACK's or cuSOLVER's full decomposition.

    Args:
        a: (*batch, m, n), any floating or complex dtype; finite.
        k: in [1, min(m, n)].

    Raises:
        ValueError: for k outside its interval.
    """
    check_count(k, a.shape)
    u, s, vh = svd(working(a))
    return Spectrum(u[..., :k].contiguous(), s[..., :k].contiguous(), vh[..., :k, :].mH.contiguous())


def leading(  # noqa: PLR0917
    a: Tensor, k: int, start: Tensor | None = None, iterations: int = 3, oversampling: int = 4, seed: int = 0
) -> Spectrum:
    """The k leading triplets by block Krylov iteration (arXiv 1504.05477) from a warm or a random start.

    With A as wide as long or longer (else A^H in its place), X_0 = orth([start, Gaussian]) of k + oversampling columns,

        X_i = orth(A^H A X_{i-1}),   Q = orth([X_0, ..., X_q]),   V = Q W,   A V = U diag(s),

    where W are the k leading eigenvectors of (A Q)^H A Q, found in double the precision. What the start holds already
    is kept, so that the result converges to the exact one when A stands still. Where q + 1 blocks fill the shorter
    side, the result is that of :func:`exact`. Nothing is read on the host.

    Args:
        a: (*batch, m, n), any floating or complex dtype; finite. Half precision is cast up. Any scale, rank or zero.
        k: in [1, min(m, n)].
        start: (*batch, min(m, n), any number of columns up to k + oversampling): right (A^H: left) directions of
            an earlier reading, those of the shorter side. None for a random start.
        iterations: q >= 1.
        oversampling: random columns beside the start, >= 0.
        seed: of the Gaussian columns; drawn on the CPU, hence equal on all devices.

    Raises:
        ValueError: for k outside its interval, or a start that does not fit.
    """
    check_count(k, a.shape)
    m, n = a.shape[-2:]
    if m < n:
        u, s, v = leading(a.mH, k, start, iterations, oversampling, seed)
        return Spectrum(v, s, u)
    width = min(k + oversampling, n)
    if start is not None and (start.shape[-2] != n or not 1 <= start.shape[-1] <= width):
        raise ValueError(f"a start of shape {tuple(start.shape)} does not fit {width} directions of {n} entries")
    if (iterations + 1) * width >= n:
        return exact(a, k)
    a = working(a)
    size = a.abs().amax((-2, -1), keepdim=True)
    a = a / torch.where(size > 0, size, 1)  # A^H A would leave the range of float32
    block = _orthonormal(_start(a, width, start, seed))
    blocks = [block]
    for _ in range(iterations):
        block = _orthonormal(a.mH @ (a @ block))
        blocks.append(block)
    basis = _orthonormal(torch.cat(blocks, -1))
    image = (a @ basis).to(WIDE.get(a.dtype, a.dtype))
    turn = eigh(image.mH @ image)[1][..., -k:].flip(-1)
    v = basis @ turn.to(a.dtype)
    u, r = qr((image @ turn).to(a.dtype))  # orthonormal also where singular values vanish
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    present = diagonal.abs() >= torch.finfo(a.dtype).tiny
    return Spectrum(
        u * torch.where(present, diagonal.sgn(), 1).unsqueeze(-2), diagonal.abs() * size.squeeze(-1), v.contiguous()
    )


def present(s: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Which singular values are more than roundoff, s > eps max(m, n) s_1: (*batch, k) of bool.

    The vectors of the others are any that complete a basis.
    """
    return s > torch.finfo(s.dtype).eps * max(shape[-2:]) * s[..., :1]


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the principal angles of two subspaces, the singular values of A^H B, descending, in [0, 1].

    Args:
        a: (*batch, d, i), orthonormal columns; a column of zeros is a direction that is not there, of cosine 0.
        b: (*batch, d, j), likewise.

    Returns:
        (*batch, min(i, j)).
    """
    return svd(working(a).mH @ working(b))[1].clamp(max=1)


def vector_cosines(a: Tensor, b: Tensor) -> Tensor:
    """|<a_i, b_i>| for each pair of columns, in [0, 1]: (*batch, k) from two (*batch, d, k)."""
    return (working(a).conj() * working(b)).sum(-2).abs().clamp(max=1)


def projected_energy(g: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """||U^H G V||_F^2 / ||G||_F^2 in [0, 1], zero for G = 0: the share of G's energy between two subspaces.

    Args:
        g: (*batch, m, n).
        u: (*batch, m, i), orthonormal columns.
        v: (*batch, n, j), likewise.

    Returns:
        (*batch,) real, in double the precision.
    """
    g = working(g)
    core = u.to(g.dtype).mH @ g @ v.to(g.dtype)
    wide = WIDE.get(g.dtype, g.dtype)  # squares of very large or small entries would leave float32
    inside, whole = (torch.linalg.vector_norm(x, dim=(-2, -1), dtype=wide).square() for x in (core, g))
    return (inside / torch.where(whole > 0, whole, 1)).clamp(max=1)


def _start(a: Tensor, width: int, start: Tensor | None, seed: int) -> Tensor:
    known = 0 if start is None else start.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    n = a.shape[-1]
    fresh = torch.randn(n, width - known, dtype=a.dtype, generator=generator).to(a.device)
    fresh = fresh.expand(*a.shape[:-2], n, width - known) / n**0.5
    return fresh if start is None else torch.cat([start.to(a.dtype).expand(*a.shape[:-2], n, known), fresh], -1)


def _orthonormal(a: Tensor) -> Tensor:
    """Householder's, since blocks may be rank-deficient: any A is completed."""
    return qr(a)[0]
