"""Kronecker factors of a tensor's second moment: L_n, averages of X_(n) X_(n)^H, and their inverse roots.

A factor is a Hermitian matrix (d_n, d_n) or, for a mode too long for one, its diagonal, a real vector (d_n,).
"""

from collections.abc import Mapping
from math import ceil, log
from typing import Literal

import torch
from torch import Tensor

from .decompositions import WIDE, eigh, qr
from .multilinear import abs_squared, gram, multilinear

InverseRoot = Literal["eigh", "newton"]


def bounded(x: Tensor) -> Tensor:
    """x, at most so large that its Gram matrices stay finite: an infinite one would stay in a factor for ever."""
    most = torch.finfo(x.dtype).max ** 0.5 / x.numel()
    size = x.abs().amax()
    return x * torch.where(size > most, most / size, 1).to(x.dtype)


def add_gram(factor: Tensor, x: Tensor, mode: int, keep: float, add: float) -> Tensor:
    """L <- keep L + add X_(n) X_(n)^H, or its diagonal where L is one; in place. x must be :func:`bounded`."""
    if factor.ndim == 1:
        others = [n for n in range(x.ndim) if n != mode]
        squares = abs_squared(x)
        return factor.mul_(keep).add_(squares.sum(others) if others else squares, alpha=add)
    return factor.mul_(keep).add_(gram(x, mode, x.ndim), alpha=add)


def inverse_root(factor: Tensor, eps: float, power: float, method: InverseRoot = "eigh") -> Tensor:
    """(L + eps I)^-power, of L's shape and dtype; finite for every finite L >= 0, whatever its rank.

    Args:
        factor: (*batch, d, d) Hermitian, positive semi-definite but for roundoff, or a diagonal (d,).
        eps: > 0.
        power: > 0; 1/p with an integer p for "newton".
        method: "eigh" decomposes; eigenvalues below d machine epsilons of the largest, roundoff, are raised to that.
            "newton" is the coupled Newton iteration for inverse p-th roots (Guo and Higham, SIAM J. Matrix Anal. Appl.
            28, 2006; Iannazzo, 2006), in double the precision and with nothing but matrix products, so that no device
            is waited for; the same multiple of the norm is added to the diagonal.
    """
    if factor.ndim == 1:
        return (factor + eps) ** -power
    d, roundoff = factor.shape[-1], torch.finfo(factor.dtype).eps
    if method == "eigh":
        values, vectors = eigh(factor)
        values = torch.maximum(values, d * roundoff * values[..., -1:].clamp_min(0)) + eps
        return (vectors * (values**-power).unsqueeze(-2)) @ vectors.mH
    wide = factor.to(WIDE.get(factor.dtype, factor.dtype))
    size = torch.linalg.matrix_norm(wide, keepdim=True)
    eye = torch.eye(d, dtype=wide.dtype, device=wide.device)
    return _newton(wide + (eps + roundoff * size) * eye, round(1 / power), 1 / roundoff).to(factor.dtype)


def _newton(a: Tensor, p: int, condition: float) -> Tensor:
    """A^(-1/p): X <- X T, M <- T^p M with T = ((p+1) I - M)/p, from X = z^(1/p) I and M = z A, |M| <= (p+1)/2."""
    # Small eigenvalues of M grow by (1 + 1/p)^p a step until they are near 1, where a few quadratic steps do the rest.
    steps = ceil(log(condition) / (p * log(1 + 1 / p))) + 8
    z = (1 + p) / (2 * torch.linalg.matrix_norm(a, keepdim=True))
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    x, m = z ** (1 / p) * eye, z * a
    for _ in range(steps):
        t = ((p + 1) * eye - m) / p
        x, m = x @ t, torch.linalg.matrix_power(t, p) @ m
    return (x + x.mH) / 2


def multiply_factors(x: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """x x_n A_n over the modes that have a factor, matrix or diagonal."""
    x = multilinear(x, [a if (a := factors.get(n)) is not None and a.ndim == 2 else None for n in range(x.ndim)])
    for n, a in factors.items():
        if a.ndim == 1:
            x = x * a.view([-1 if m == n else 1 for m in range(x.ndim)])
    return x


def leading_basis(factor: Tensor) -> Tensor:
    """All eigenvectors of a Hermitian matrix, largest eigenvalue first."""
    return eigh(factor)[1].flip(-1)


def turned_basis(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration towards the eigenvectors of L: Q' = QR(L Q[:, j]), j the order of Re diag(Q^H L Q) downwards.

    Orthonormal whatever the rank of L.

    Returns:
        Q' and j.
    """
    product = factor @ basis
    order = (basis.conj() * product).sum(0).real.argsort(descending=True, stable=True)
    return qr(product[:, order])[0], order
