"""Kronecker factors and their inverse roots, against their definitions."""

import pytest
import torch

from comoving.linalg import abs_squared, add_gram, inverse_root, leading_basis, multiply_factors, turned_basis
from contract.support import COMPLEX, REAL, close, randn
from references.algebra import mode_product, unfold

FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
METHODS = pytest.mark.parametrize("method", ["eigh", "newton"])


def semidefinite(d, rank, dtype=REAL, seed=0):
    a = randn((d, rank), dtype, seed)
    return a @ a.mH


@FIELDS
@pytest.mark.parametrize("shape", [(5,), (3, 4), (3, 4, 2)])
def test_factors_are_those_of_the_unfoldings(shape, dtype):
    x = randn(shape, dtype)
    for n, d in enumerate(shape):
        before = semidefinite(d, 2, dtype)
        expected = 0.7 * before + 0.2 * unfold(x, n) @ unfold(x, n).mH
        close(add_gram(before.clone(), x, n, 0.7, 0.2), expected)
        close(add_gram(before.diagonal().real.clone(), x, n, 0.7, 0.2), expected.diagonal().real)


@FIELDS
@METHODS
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_inverse_roots(method, p, dtype):
    a = semidefinite(6, 9, dtype)
    root = inverse_root(a, 1e-2, 1 / p, method)
    eye = torch.eye(6, dtype=dtype)
    close(torch.linalg.matrix_power(root, p) @ (a + 1e-2 * eye), eye)
    close(root, root.mH, 1e-12)
    stacked = inverse_root(torch.stack([a, 3 * a]), 1e-2, 1 / p, method)
    close(stacked[0], root, 1e-12)
    diagonal = a.diagonal().real
    close(inverse_root(diagonal, 1e-2, 1 / p, method), (diagonal + 1e-2) ** (-1 / p))


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX])
@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-6, 1.0, 1e25])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_roots_of_any_rank_and_size_are_finite(method, dtype, size, rank):
    """And right on the range, where eps is next to nothing."""
    q = torch.linalg.qr(randn((6, rank), dtype)).Q
    values = torch.arange(1, rank + 1, dtype=REAL).to(dtype.to_real()) * size
    root = inverse_root((q * values) @ q.mH, 1e-12 * (size or 1), 0.25, method)
    assert root.dtype is dtype
    assert root.isfinite().all()
    if size:
        close(root @ q * size**0.25, q * (values / size) ** -0.25, 1e-9 if dtype in (REAL, COMPLEX) else 1e-4)


@METHODS
def test_newton_agrees_with_eigh_on_ill_conditioned_factors(method):
    u = torch.linalg.qr(randn((8, 8))).Q
    a = (u * torch.logspace(0, -10, 8, dtype=REAL)) @ u.mT
    expected = (u * (torch.logspace(0, -10, 8, dtype=REAL) + 1e-12) ** -0.25) @ u.mT
    close(inverse_root(a, 1e-12, 0.25, method), expected, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e15])
@pytest.mark.parametrize("p", range(2, 13))
def test_newton_roots_are_those_of_the_eigenvalues_in_double_precision(p, size, dtype):
    """Of every rank, stacked; d machine epsilons of the norm are added to the diagonal."""
    d, eps = 10, torch.finfo(dtype).eps
    factors = torch.stack([semidefinite(d, rank, dtype, rank) for rank in range(1, d + 1)]) * size
    root = inverse_root(factors, 1e-12, 1 / p, "newton").to(COMPLEX)
    wide = (factors.to(COMPLEX) + factors.to(COMPLEX).mH) / 2
    values, vectors = torch.linalg.eigh(wide)
    norms = torch.linalg.matrix_norm(wide)[:, None]
    values = (values + (1e-12 + d * eps * norms)).abs()
    expected = (vectors * (values ** (-1 / p)).unsqueeze(-2)) @ vectors.mH
    assert root.isfinite().all()
    gaps = torch.linalg.matrix_norm(root - expected) / torch.linalg.matrix_norm(expected)
    rounding = 100 * torch.finfo(REAL).eps * (norms / values).amax(-1)
    known = rounding < 1e-3  # nothing is left of eigenvalues of a few machine epsilons of double precision
    assert (known | (eps < 1e-10)).all()
    assert known[-1]
    assert (gaps <= rounding + 10 * eps)[known].all()


@pytest.mark.parametrize("shape", [(30, 20, 10), (90, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL], ids=str)
def test_newton_roots_of_factors_that_rounding_has_made_indefinite(shape, dtype):
    """Those of a gradient of rank one, and one whose negative eigenvalues are far beyond what is added."""
    for seed in range(5):
        x = randn(shape[:1], dtype, seed)
        for n, d in enumerate(shape[1:], 1):
            x = x.unsqueeze(-1) * randn((d,), dtype, 10 * n + seed)
        for n, d in enumerate(shape):
            factor = add_gram(torch.zeros(d, d, dtype=dtype), x, n, 0.99, 0.01)
            noise = randn((d, d), dtype, seed)
            worse = factor + 1e-5 * factor.abs().max() * (noise + noise.mH)
            assert inverse_root(factor, 1e-12, 1 / (2 * len(shape)), "newton").isfinite().all()
            assert inverse_root(worse, 1e-12, 1 / (2 * len(shape)), "newton").isfinite().all()


@FIELDS
def test_factors_multiply_their_modes(dtype):
    x, a, b = randn((3, 4, 2), dtype), randn((3, 3), dtype, 1), randn((2,), REAL, 2)
    expected = mode_product(mode_product(x, a, 0), torch.diag(b).to(dtype), 2)
    close(multiply_factors(x, {0: a, 2: b}), expected)
    assert multiply_factors(x, {}) is x


@FIELDS
def test_bases_converge_to_the_eigenvectors(dtype):
    a = semidefinite(5, 9, dtype)
    exact = leading_basis(a)
    values = abs_squared(a @ exact).sum(0)
    assert (values.diff() < 0).all()
    q = torch.linalg.qr(randn((5, 5), dtype, 3)).Q
    for _ in range(300):
        q, _ = turned_basis(a, q)
    close((q.mH @ exact).abs(), torch.eye(5, dtype=REAL), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("size", [1e-30, 1.0])
def test_bases_stay_orthonormal_and_order_by_energy(dtype, rank, size):
    a = semidefinite(4, rank, dtype) * size if rank else torch.zeros(4, 4, dtype=dtype)
    q = torch.linalg.qr(randn((4, 4), dtype, 3)).Q
    energies = (q.mH @ a @ q).diagonal().real
    turned, order = turned_basis(a, q)
    close(turned.mH @ turned, torch.eye(4, dtype=dtype), 1e-5)
    assert (energies[order].diff() <= 1e-5 * size).all()
