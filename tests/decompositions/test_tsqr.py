"""TSQR against its definition and Householder's QR: what is factored, how orthonormal, and how it is differentiated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from comoving.decompositions import tsqr, tsqr_r
from contract.support import COMPLEX, REAL, randn

WIDE = {torch.float32: REAL, torch.complex64: COMPLEX, REAL: REAL, COMPLEX: COMPLEX}
ALL = pytest.mark.parametrize("dtype", WIDE, ids=str)
DOUBLE = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)


def reference(a):
    """Householder's QR of the matrix in double precision, with the diagonal made positive."""
    q, r = torch.linalg.qr(a.to(WIDE[a.dtype]))
    phase = r.diagonal(dim1=-2, dim2=-1).sgn()
    return q * phase.unsqueeze(-2), r * phase.conj().unsqueeze(-1)


def defect(q):
    q = q.to(WIDE[q.dtype])
    return float((q.mH @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max())


def is_gauged(r):
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    real = not r.is_complex() or not diagonal.imag.any()
    return bool(torch.equal(r, r.triu()) and real and (diagonal.real >= 0).all())


@st.composite
def matrices(draw):
    n = draw(st.integers(1, 5))
    block = draw(st.none() | st.integers(2 * n, 12))
    m = draw(st.integers(n if block is None else max(n, block), 70))
    batch = draw(st.sampled_from([(), (2,), (2, 1)]))
    return randn((*batch, m, n), draw(st.sampled_from(list(WIDE))), draw(st.integers(0, 99))), block


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_factors_of_any_shape_are_those_of_householder(case):
    a, block = case
    before = a.clone()
    q, r = tsqr(a, block)
    assert torch.equal(a, before)
    assert q.dtype == r.dtype == a.dtype
    assert is_gauged(r)
    eps = torch.finfo(a.dtype).eps
    wide_q, wide_r = reference(a)
    assert defect(q) <= 100 * eps
    condition = float(torch.linalg.cond(wide_r).max())
    assert (r - wide_r).abs().max() <= 200 * eps * condition * wide_r.abs().max()
    assert (q - wide_q).abs().max() <= 200 * eps * condition
    alone = tsqr_r(a, block)
    assert is_gauged(alone)
    assert (alone - wide_r).abs().max() <= 200 * eps * condition * wide_r.abs().max()


def conditioned(m, n, condition, dtype):
    u, v = torch.linalg.qr(randn((m, n), WIDE[dtype])).Q, torch.linalg.qr(randn((n, n), WIDE[dtype], 1)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=REAL)
    return ((u * values) @ v.mH).to(dtype)


@ALL
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3, 1e5, 1e7, 1e12])
def test_very_tall_and_ill_conditioned(condition, dtype):
    a = conditioned(3000, 16, condition, dtype)
    q, r = tsqr(a)
    assert defect(q) <= 60 * torch.finfo(dtype).eps
    assert (q.to(WIDE[dtype]) @ r.to(WIDE[dtype]) - a).norm() <= 20 * torch.finfo(dtype).eps * a.norm()


def test_ten_thousands_of_rows_stay_orthonormal():
    """One Householder QR in single precision loses digits with the rows; the tree does not."""
    a = randn((100000, 4), torch.float32) @ randn((4, 8), torch.float32, 1)  # rank-deficient: no Gram matrix
    q, r = tsqr(a)
    assert defect(q) <= 2e-6
    assert (q @ r - a).norm() <= 1e-6 * a.norm()


DEFICIENT = {
    "rank 2": lambda dtype: randn((700, 2), dtype) @ randn((2, 5), dtype, 1),
    "zero": lambda dtype: torch.zeros(700, 5, dtype=dtype),
    "zero column": lambda dtype: randn((700, 5), dtype) * torch.tensor([1, 0, 1, 1, 1]),
    "repeated column": lambda dtype: randn((700, 5), dtype)[:, [0, 1, 0, 3, 4]],
    "few rows": lambda dtype: torch.cat([randn((3, 5), dtype), torch.zeros(697, 5, dtype=dtype)]),
    "equal columns": lambda dtype: torch.ones(700, 5, dtype=dtype),
    "columns of very different length": lambda dtype: randn((700, 5), dtype) * torch.tensor([1e-8, 1, 1e8, 1, 1]),
}


@ALL
@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("kind", DEFICIENT)
def test_rank_deficient_input_has_an_orthonormal_q_and_finite_gradients(kind, block, dtype):
    a = DEFICIENT[kind](dtype).requires_grad_()
    q, r = tsqr(a, block)
    eps = torch.finfo(dtype).eps
    assert defect(q.detach()) <= 300 * eps
    assert is_gauged(r.detach())
    columns = torch.linalg.vector_norm(a.detach(), dim=0)
    assert ((q @ r - a).detach().abs() <= 100 * eps * columns).all()
    for loss in (q.abs().sum() + r.abs().sum(), tsqr_r(a, block).abs().sum()):
        (grad,) = torch.autograd.grad(loss, a)
        assert grad.isfinite().all()


@ALL
def test_graded_triangles_that_underflow_give_no_nan(dtype):
    """Rank one, repeated: R's diagonal falls by a machine epsilon a column, to below the smallest number."""
    for m in range(7, 40):
        q, r = tsqr(torch.full((m, min(m, 5 + m // 2)), 0.7, dtype=dtype) * (0.7 + 0.2j if dtype.is_complex else 1))
        assert defect(q) <= 1e3 * torch.finfo(dtype).eps
        assert r.isfinite().all() and is_gauged(r)
        assert tsqr_r(q @ r).isfinite().all()


def test_a_dependent_column_gets_no_gradient_and_the_others_theirs():
    free = randn((20, 2))
    a = torch.cat([free, free @ randn((2, 1), seed=1)], -1).requires_grad_()
    q, r = tsqr(a)
    weight = randn((20, 2), seed=2)
    (grad,) = torch.autograd.grad((q[:, :2] * weight).sum() + r[0, 1], a)
    assert not grad[:, 2].any()
    alone = free.requires_grad_()
    q, r = tsqr(alone)
    (expected,) = torch.autograd.grad((q * weight).sum() + r[0, 1], alone)
    torch.testing.assert_close(grad[:, :2], expected)


@DOUBLE
@pytest.mark.parametrize(("size", "block"), [((5, 3), None), ((9, 2), 4), ((3, 3), None), ((2, 1, 5, 1), 2)])
def test_gradients_once_and_twice(size, block, dtype):
    a = randn(size, dtype).requires_grad_()
    assert gradcheck(lambda a: tsqr(a, block), a)
    assert gradgradcheck(lambda a: tsqr(a, block), a, fast_mode=block is not None)
    assert gradcheck(lambda a: tsqr_r(a, block), a)
    assert gradgradcheck(lambda a: tsqr_r(a, block), a, fast_mode=block is not None)


@DOUBLE
def test_gradient_of_the_product_is_that_of_the_identity(dtype):
    a, weight = randn((30, 4), dtype).requires_grad_(), randn((30, 4), dtype, 1)
    q, r = tsqr(a, 8)
    (grad,) = torch.autograd.grad(((q @ r) * weight.conj()).sum().real, a)
    torch.testing.assert_close(grad, weight)


def test_errors_state_the_interval():
    with pytest.raises(ValueError, match=r"n = 4 columns are outside \[0, 3\]"):
        tsqr(randn((3, 4)))
    with pytest.raises(ValueError, match=r"block = 7 is outside \[8, 30\]"):
        tsqr_r(randn((30, 4)), 7)
    with pytest.raises(ValueError, match="1 dimensions"):
        tsqr(randn((4,)))
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        with pytest.raises(TypeError, match=f"float32, float64, complex64 or complex128, not {dtype}"):
            tsqr(torch.ones(4, 2, dtype=dtype))


@pytest.mark.parametrize("size", [(0, 5, 2), (5, 0), (0, 0)])
def test_empty(size):
    q, r = tsqr(torch.zeros(size))
    assert q.shape == size
    assert r.shape == (*size[:-2], size[-1], size[-1])
