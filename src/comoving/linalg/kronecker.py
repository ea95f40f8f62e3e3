"""Kronecker factors of a tensor's second moment: L_n, averages of X_(n) X_(n)^H, and their inverse roots.

A factor is a Hermitian matrix (*rows, d_n, d_n) or, for a mode too long for one, its diagonal, real (*rows, d_n). Of a
batch x has shape (*rows, d_1, ..., d_N), and every row has factors of its own.
"""

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from .entries import abs_squared, largest, over
from .lapack import WIDE, asks_host, eigh, qr
from .multilinear import gram, multilinear

InverseRoot = Literal["eigh", "newton"]


def bounded(x: Tensor, rows: int = 0) -> Tensor:
    """x, each row at most so large that its Gram matrices stay finite: an infinite one would stay in a factor."""
    most = torch.finfo(x.dtype).max ** 0.5 / (2 * prod(x.shape[rows:]))
    size = largest(x, rows)
    return x * over(torch.where(size > most, most / size, 1).to(x.dtype), x)


def add_gram(factor: Tensor, x: Tensor, mode: int, keep: float, add: float, rows: int = 0) -> Tensor:
    """keep L + add X_(n) X_(n)^H, or its diagonal where L is one, a new tensor. x must be :func:`bounded`."""
    order = x.ndim - rows
    if factor.ndim == rows + 1:
        others = [n - order for n in range(order) if n != mode]
        squares = abs_squared(x)
        return (squares.sum(others) if others else squares).mul_(add).add_(factor, alpha=keep)
    return gram(x, mode, order).mul_(add).add_(factor, alpha=keep)


def inverse_root(factor: Tensor, eps: float, power: float, method: InverseRoot = "eigh", rows: int = 0) -> Tensor:
    """(L + eps I)^-power, of L's shape and dtype; finite for every finite L >= 0, whatever its rank.

    Args:
        factor: (*rows, d, d) Hermitian, positive semi-definite but for roundoff, or a diagonal (*rows, d).
        eps: > 0.
        power: > 0; 1/p with an integer p for "newton".
        method: "eigh" decomposes; eigenvalues below d machine epsilons of the largest, roundoff, are raised to that.
            "newton" is a coupled Newton iteration for inverse roots (Guo and Higham, SIAM J. Matrix Anal. Appl. 28,
            2006; Iannazzo, 2006), in double the precision and with nothing but matrix products, so that no device is
            waited for; the same multiple of the Frobenius norm is added to the diagonal, and what rounding has made
            negative beyond that counts by its size.
        rows: number of leading dimensions that count the rows of a batch, 0 or 1.
    """
    if factor.ndim == rows + 1:
        return (factor + eps) ** -power
    d, roundoff = factor.shape[-1], torch.finfo(factor.dtype).eps
    if method == "eigh":
        values, vectors = eigh(factor)
        values = torch.maximum(values, d * roundoff * values[..., -1:].clamp_min(0)) + eps
        return (vectors * (values**-power).unsqueeze(-2)) @ vectors.mH
    wide, p, ridge = factor.to(WIDE.get(factor.dtype, factor.dtype)), round(1 / power), d * roundoff
    unit = wide.abs().amax((-2, -1), keepdim=True).clamp_min(eps)  # squares must not leave the range
    wide = (wide + wide.mH) / (2 * unit)
    eye = torch.eye(d, dtype=wide.dtype, device=wide.device)
    wide = wide + (eps / unit + ridge * torch.linalg.matrix_norm(wide, keepdim=True)) * eye
    return (_newton(wide, p, ridge / (1 + ridge * d**0.5)) * unit ** (-1 / p)).to(factor.dtype)


def standing_root(kept: Tensor) -> Tensor:
    """A root (*rows, d, d) that was kept, and the identity where it is still the zeros that its slot begins as.

    So it is after a first step that was skipped on a device. On the CPU, where the host knows of it, nothing is kept of
    such a step.
    """
    if asks_host(kept):
        return kept
    eye = torch.eye(kept.shape[-1], dtype=kept.dtype, device=kept.device)
    return torch.where((kept != 0).any(-1, keepdim=True).any(-2, keepdim=True), kept, eye)


def _newton(a: Tensor, p: int, least: float) -> Tensor:
    """|A|^(-1/p): X <- X T, M <- M T^p with T = ((2p+1) I - M^2) / 2p, from X = |A|^(-1/p) I and M = A / |A|.

    It is Newton's iteration for the inverse 2p-th root of A^2, and takes an eigenvalue of M to the sign of itself. That
    for the inverse p-th root of A, with M in place of M^2, is lost with the first eigenvalue that rounding has made
    negative. M and X are multiplied by numbers that let M's smallest eigenvalues grow fastest.

    Args:
        a: (*batch, d, d), Hermitian.
        p: >= 1.
        least: smallest |eigenvalue| / |A| that is brought to 1; smaller ones, rounding, stay below.
    """
    size = torch.linalg.matrix_norm(a, keepdim=True)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    x, m = size ** (-1 / p) * eye, a / size
    for c in _scales(p, least):
        t = ((2 * p + 1) * eye - c**2 * (m @ m)) * (c ** (1 / p) / (2 * p))
        x, m = x @ t, m @ torch.linalg.matrix_power(t, p)
    return (x + x.mH) / 2


@cache
def _scales(p: int, least: float) -> tuple[float, ...]:
    """What M is multiplied by before each step of :func:`_newton`, all of its eigenvalues in [least, 1] at first.

    A step takes m to f(cm), f(m) = m ((2p+1 - m^2) / 2p)^p <= f(1) = 1. c is the largest for which the largest
    eigenvalues become no smaller than the smallest ones, nor than 1/4: what they lose in size is lost to rounding.
    """

    def f(m: float) -> float:
        return m * ((2 * p + 1 - m**2) / (2 * p)) ** p

    scales: list[float] = []
    while least < 1 - 1e-12:
        low, high = 1.0, (2 * p + 1) ** 0.5
        for _ in range(60):
            c = (low + high) / 2
            low, high = (c, high) if f(c) > max(f(c * least), 0.25) else (low, c)
        scales.append(low)
        least = f(low * least)
    return (*scales, 1.0)


def multiply_factors(x: Tensor, factors: Mapping[int, Tensor], rows: int = 0) -> Tensor:
    """x x_n A_n over the modes that have a factor, matrix or diagonal."""
    modes = range(x.ndim - rows)
    x = multilinear(x, [a if (a := factors.get(n)) is not None and a.ndim == rows + 2 else None for n in modes])
    for n, a in factors.items():
        if a.ndim == rows + 1:
            x = x * a.view(*a.shape[:rows], *[-1 if m == n else 1 for m in modes])
    return x


def leading_basis(factor: Tensor) -> Tensor:
    """All eigenvectors of a Hermitian matrix (*rows, d, d), largest eigenvalue first."""
    return eigh(factor)[1].flip(-1)


def turned_basis(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration towards the eigenvectors of L: Q' = QR(L Q[:, j]), j the order of Re diag(Q^H L Q) downwards.

    Orthonormal whatever the rank of L.

    Returns:
        Q', of L's shape (*rows, d, d), and j, (*rows, d).
    """
    product = factor @ basis
    order = (basis.conj() * product).sum(-2).real.argsort(descending=True, stable=True)
    return qr(in_order(product, -1, order))[0], order


def in_order(x: Tensor, mode: int, order: Tensor) -> Tensor:
    """x with the entries j of one mode, < 0, in this order: that of all of x, (d,), or of each row, (*rows, d)."""
    if order.ndim == 1:
        return x.index_select(mode, order)
    shape = [*order.shape[:-1], *[1] * (x.ndim - order.ndim), order.shape[-1]]
    return x.take_along_dim(order.view(shape).movedim(-1, mode), mode)
