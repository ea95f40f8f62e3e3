"""Bases against Householder's QR and products along modes against einsum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comoving.draws import gaussian
from comoving.linalg import (
    abs_squared,
    add_multilinear,
    correlate,
    gram,
    multilinear,
    orthogonality_defect,
    orthonormalize,
    reorthonormalize,
    unfold,
)
from contract.support import COMPLEX, REAL, close, randn

SINGLE = {torch.float32: REAL, torch.complex64: COMPLEX}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, REAL, torch.complex64, COMPLEX], ids=str)
SIZES = pytest.mark.parametrize("size", [(9, 4), (5, 5), (12, 1), (3, 7, 4), (2, 2, 6, 3)], ids=str)


def conditioned(size, dtype, condition, seed=0):
    """Random columns with singular values from 1 down to 1/condition."""
    *batch, d, r = size
    u, v = (
        torch.linalg.qr(randn((*batch, d, r), dtype, seed)).Q,
        torch.linalg.qr(randn((*batch, r, r), dtype, seed + 1)).Q,
    )
    return (u * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=REAL)) @ v.mH


def qr_with_positive_diagonal(a):
    q, r = torch.linalg.qr(a)
    return q * torch.sgn(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)


def explicit_defect(q):
    wide = q.to(SINGLE.get(q.dtype, q.dtype))
    return float((wide.mH @ wide - torch.eye(q.shape[-1], dtype=wide.dtype)).abs().max())


@DTYPES
@SIZES
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5, 1e10])
def test_orthonormalize_is_qr_with_a_positive_diagonal(size, condition, dtype):
    exact = conditioned(size, COMPLEX if dtype.is_complex else REAL, condition)
    a = exact.to(dtype)
    q = orthonormalize(a)
    eps = torch.finfo(dtype).eps
    assert q.dtype is dtype
    assert q.shape == a.shape
    assert explicit_defect(q) <= 40 * eps * size[-1] ** 0.5
    if condition * eps < 1e-3 and size[-1] > 1 or condition == 1.0:
        wide = a.to(SINGLE.get(dtype, dtype))
        tolerance = 60 * eps + (0 if dtype in SINGLE else 50 * eps * condition)
        assert (q.to(wide.dtype) - qr_with_positive_diagonal(wide)).abs().max() <= tolerance


@DTYPES
@SIZES
def test_the_result_is_contiguous_and_the_input_unchanged(size, dtype):
    a = randn(size, dtype)
    before = a.clone()
    assert orthonormalize(a).is_contiguous()
    assert torch.equal(a, before)


@DTYPES
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("kind", ["rank-deficient", "zero", "repeated", "zero column", "equal rows", "tiny", "huge"])
def test_orthonormalize_completes_what_has_no_full_rank(kind, batch, dtype):
    a = {
        "rank-deficient": lambda: randn((*batch, 9, 2), dtype) @ randn((*batch, 2, 4), dtype, 1),
        "zero": lambda: torch.zeros(*batch, 9, 4, dtype=dtype),
        "repeated": lambda: randn((*batch, 9, 1), dtype).expand(*batch, 9, 4).clone(),
        "equal rows": lambda: randn((*batch, 1, 4), dtype).expand(*batch, 9, 4).clone(),  # R ends in denormals
        "zero column": lambda: randn((*batch, 9, 4), dtype) * torch.tensor([1, 0, 1, 1]),
        "tiny": lambda: randn((*batch, 9, 4), dtype) * 1e-30,
        "huge": lambda: randn((*batch, 9, 4), dtype) * 1e30,
    }[kind]()
    q = orthonormalize(a)
    assert q.isfinite().all()
    assert explicit_defect(q) <= 40 * torch.finfo(dtype).eps * 2
    if kind != "zero":  # the columns of A stay in the span
        unit = a / a.abs().max()
        assert (unit - q @ (q.mH @ unit)).abs().max() <= 200 * torch.finfo(dtype).eps


@DTYPES
def test_reorthonormalize_leaves_a_good_basis_alone_and_mends_a_bad_one(dtype):
    u = orthonormalize(randn((9, 4), dtype))
    assert reorthonormalize(u) is u
    bent = u + 1e-3 * randn((9, 4), dtype, 1)
    mended = reorthonormalize(bent)
    assert orthogonality_defect(bent) > 1e-4
    assert explicit_defect(mended) <= 80 * torch.finfo(dtype).eps
    close(mended @ (mended.mH @ bent), bent, 400 * torch.finfo(dtype).eps)
    assert reorthonormalize(bent, tolerance=0.1) is bent


@DTYPES
def test_orthogonality_defect_is_per_batch_entry(dtype):
    u = torch.linalg.qr(randn((3, 7, 4), dtype)).Q
    u[1] *= 1.1
    found = orthogonality_defect(u)
    assert found.shape == (3,)
    close(found[1].double(), torch.tensor(1.1**2 - 1, dtype=REAL), 1e-5)
    assert max(found[0], found[2]) < 1e-5


# ------------------------------------------------------------------------------------------- products along modes

LETTERS, NEW = "abcde", "vwxyz"


@st.composite
def products(draw):
    """A tensor of order 1 to 5, batched or not, with a matrix or None for each mode."""
    order = draw(st.integers(1, 5))
    batch = draw(st.sampled_from([(), (2,), (2, 3)]))
    dtype = draw(st.sampled_from([REAL, COMPLEX]))
    sizes = draw(st.lists(st.integers(1, 4), min_size=order, max_size=order))
    to = draw(st.lists(st.none() | st.integers(1, 4), min_size=order, max_size=order))
    x = randn((*batch, *sizes), dtype, 1)
    matrices = [
        None if k is None else randn((*batch, k, d), dtype, 2 + n)
        for n, (k, d) in enumerate(zip(to, sizes, strict=True))
    ]
    if order > 1 and not batch and draw(st.booleans()):  # a transposed layout
        x = x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x, matrices


def by_einsum(x, matrices):
    for n, a in enumerate(matrices):
        if a is not None:
            modes = LETTERS[: len(matrices)]
            x = torch.einsum(f"...{modes},...{NEW[n]}{modes[n]}->...{modes.replace(modes[n], NEW[n])}", x, a)
    return x


@given(products())
def test_multilinear_is_einsum(case):
    x, matrices = case
    before = x.clone()
    close(multilinear(x, matrices), by_einsum(x, matrices), 1e-11)
    assert torch.equal(x, before)


@given(products(), st.sampled_from([1.0, -0.7]), st.booleans())
def test_add_multilinear_adds_in_place(case, alpha, transposed):
    x, matrices = case
    order = len(matrices)
    lead = x.ndim - order
    if lead:  # no batch dimensions there
        x, matrices = x[(0,) * lead], [None if a is None else a[(0,) * lead] for a in matrices]
    product = by_einsum(x, matrices)
    out = randn(product.shape, x.dtype, 9)
    if transposed and order > 1:
        out = out.movedim(0, -1).contiguous().movedim(-1, 0)
    expected, address = out + alpha * product, out.data_ptr()
    result = add_multilinear(out, x, matrices, alpha)
    close(result, expected, 1e-11)
    close(out, expected, 1e-11)
    assert result.data_ptr() == address


@given(products())
def test_gram_correlate_and_unfold_are_einsum(case):
    x, matrices = case
    order = len(matrices)
    modes = LETTERS[:order]
    for n in range(order):
        other = modes.replace(modes[n], "z")
        z = randn(
            (*x.shape[: x.ndim - order], *x.shape[x.ndim - order :][:n], 3, *x.shape[x.ndim - order :][n + 1 :]),
            x.dtype,
            7,
        )
        both = f"...{modes},...{other}->...{modes[n]}z"
        close(correlate(x, z, n, order), torch.einsum(both, x, z.conj()), 1e-11)
        close(gram(x, n, order), torch.einsum(both, x, x.conj()), 1e-11)
        rest = modes.replace(modes[n], "")
        expected = (
            torch.einsum(f"...{modes}->...{modes[n]}{rest}", x).flatten(x.ndim - order + 1) if rest else x.unsqueeze(-1)
        )
        assert torch.equal(unfold(x, n, order), expected)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_abs_squared_is_real(dtype):
    x = randn((4, 5), dtype)
    assert not abs_squared(x).is_complex()
    close(abs_squared(x), x.abs() ** 2, 1e-14)


def test_abs_squared_takes_conjugate_views():
    x = randn((4, 5), COMPLEX)
    close(abs_squared(x.mH), x.abs().mT ** 2, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (64, 7), (200, 200)], ids=str)
def test_a_trusted_gaussian_is_orthonormalized_as_any_matrix(shape, dtype):
    for seed in range(5):
        a = gaussian(shape, torch.zeros((), dtype=dtype), seed)
        q = orthonormalize(a, trusted=True)
        assert orthogonality_defect(q) <= 32 * torch.finfo(dtype).eps * shape[1] ** 0.5
        assert (q - orthonormalize(a)).abs().max() <= 1e4 * torch.finfo(torch.float64).eps + torch.finfo(dtype).eps
