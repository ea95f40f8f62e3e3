"""A QR that grows by columns is the QR of the grown matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from comoving.decompositions import incremental_qr, tsqr
from comoving.linalg import orthogonality_defect
from contract.support import COMPLEX, REAL, randn

ALL = pytest.mark.parametrize("dtype", [torch.float32, REAL, torch.complex64, COMPLEX], ids=str)
DOUBLE = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)


@st.composite
def blocks(draw):
    k, n = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    batch = draw(st.sampled_from([(), (3,), (2, 1)]))
    m = draw(st.integers(max(k + n, 1), 12))
    dtype, seed = draw(st.sampled_from([REAL, COMPLEX])), draw(st.integers(0, 99))
    return randn((*batch, m, k), dtype, seed), randn((*batch, m, n), dtype, seed + 100)


@settings(max_examples=40, deadline=None)
@given(blocks())
def test_it_is_the_qr_of_both(case):
    a, c = case
    q, r = incremental_qr(*tsqr(a), c)
    both = torch.cat([a, c], -1)
    expected_q, expected_r = tsqr(both)
    assert q.shape == expected_q.shape
    if both.shape[-1]:
        condition = float(torch.linalg.cond(expected_r).max())
        torch.testing.assert_close(q, expected_q, atol=1e-13 * condition, rtol=0)
        torch.testing.assert_close(r, expected_r, atol=1e-12 * condition, rtol=0)


@ALL
def test_columns_almost_inside_the_span_stay_orthogonal(dtype):
    """Once is not enough: the first projection leaves roundoff as large as what remains."""
    eps = torch.finfo(dtype).eps
    q, r = tsqr(randn((50, 6), dtype))
    c = q @ randn((6, 3), dtype, 1) + 1e4 * eps * randn((50, 3), dtype, 2)
    whole, triangle = incremental_qr(q, r, c)
    assert orthogonality_defect(whole) <= 30 * eps
    assert (whole @ triangle[:, 6:] - c).abs().max() <= 100 * eps


@ALL
@pytest.mark.parametrize("kind", ["all inside", "one inside", "zero", "repeated", "nothing before"])
def test_dependent_columns_complete_the_basis(kind, dtype):
    eps = torch.finfo(dtype).eps
    k = 0 if kind == "nothing before" else 4
    a, new = randn((2, 12, k), dtype), randn((2, 12, 3), dtype, 1)
    inside = a @ randn((2, k, 3), dtype, 2) if k else torch.zeros_like(new)
    c, dead = {
        "all inside": (inside, [True, True, True]),
        "one inside": (torch.where(torch.tensor([False, True, False]), inside, new), [False, True, False]),
        "zero": (torch.zeros_like(new), [True, True, True]),
        "repeated": (new[..., [0, 0, 1]], [False, True, False]),
        "nothing before": (torch.zeros_like(new), [True, True, True]),
    }[kind]
    c.requires_grad_()
    a.requires_grad_()
    q, r = incremental_qr(*tsqr(a), c)
    assert orthogonality_defect(q.detach()).max() <= 50 * eps
    both = torch.cat([a, c], -1).detach()
    assert (q @ r - both).detach().abs().max() <= 200 * eps * max(1, both.abs().max())
    assert torch.equal(r.diagonal(dim1=-2, dim2=-1)[..., k:] == 0, torch.tensor(dead).expand(2, 3))
    grads = torch.autograd.grad(q.abs().sum() + r.abs().sum(), (a, c))
    assert all(g.isfinite().all() for g in grads)


@DOUBLE
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_once_and_twice(batch, dtype):
    a, c = randn((*batch, 5, 2), dtype).requires_grad_(), randn((*batch, 5, 2), dtype, 1).requires_grad_()

    def grow(a, c):
        return incremental_qr(*tsqr(a), c)

    assert gradcheck(grow, (a, c))
    assert gradgradcheck(grow, (a, c), fast_mode=True)


@DOUBLE
def test_gradient_is_that_of_the_qr_of_both(dtype):
    a, c = randn((7, 2), dtype).requires_grad_(), randn((7, 3), dtype, 1).requires_grad_()
    weights = randn((7, 5), dtype, 2), randn((5, 5), dtype, 3)

    def loss(factors):
        return sum((w.conj() * x).sum().real for w, x in zip(weights, factors, strict=True))

    found = torch.autograd.grad(loss(incremental_qr(*tsqr(a), c)), (a, c))
    expected = torch.autograd.grad(loss(tsqr(torch.cat([a, c], -1))), (a, c))
    torch.testing.assert_close(found, expected)


def test_errors_state_the_interval():
    q, r = tsqr(randn((5, 3)))
    with pytest.raises(ValueError, match=r"n = 3 new columns are outside \[0, 2\]"):
        incremental_qr(q, r, randn((5, 3)))
    with pytest.raises(ValueError, match=r"not \(5, 3\), \(3, 3\), \(4, 1\)"):
        incremental_qr(q, r, randn((4, 1)))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        incremental_qr(q, r[:2, :2], randn((5, 1)))
    with pytest.raises(TypeError, match="one dtype"):
        incremental_qr(q, r, randn((5, 1), torch.float32))
    with pytest.raises(TypeError, match="float16"):
        incremental_qr(q.half(), r.half(), randn((5, 1)).half())
