"""An SVD that grows by columns is the SVD of the grown matrix."""

import pytest
import torch
from torch.autograd import gradcheck

from comoving.decompositions import incremental_svd, turning
from comoving.linalg import orthogonality_defect
from contract.support import COMPLEX, REAL, mixed, randn

FIELDS = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.complex64], ids=str)
DOUBLE = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)


def close_to(dtype):
    slack = 1e-10 if dtype in (torch.float64, torch.complex128) else 1e-4
    return {"rtol": slack, "atol": slack}


@FIELDS
@pytest.mark.parametrize("own", [False, True])
def test_the_small_problem_of_a_batch(dtype, own):
    a = mixed(dtype).mT[:, :, :9]
    a[4] /= 1e6
    extra = torch.rand(7, 3, dtype=a.dtype.to_real()) if own else None
    vectors, values = turning(a, 2, extra)
    for b, x in enumerate(a):
        u, s = turning(x, 2, None if extra is None else extra[b])
        torch.testing.assert_close(values[b].square(), s.square(), **close_to(dtype))
        assert orthogonality_defect(vectors[b]) < 100 * torch.finfo(dtype).eps
        if b in (0, 6):
            torch.testing.assert_close(vectors[b] @ vectors[b].mH, u @ u.mH, **close_to(dtype))


@FIELDS
@pytest.mark.parametrize("batch", [(), (3,), (2, 1)], ids=str)
def test_nothing_is_lost_where_all_is_kept(batch, dtype):
    whole = randn((*batch, 12, 9), dtype)
    u, s = randn((*batch, 12, 0), dtype), torch.zeros(*batch, 0, dtype=dtype.to_real())
    for columns in whole.split(3, -1):
        u, s = incremental_svd(u, s, columns, u.shape[-1] + 3)
    expected = torch.linalg.svd(whole.to(COMPLEX if dtype.is_complex else REAL), full_matrices=False)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(s.double(), expected.S, rtol=100 * eps, atol=0)
    assert orthogonality_defect(u).max() <= 100 * eps
    overlap = (u.to(expected.U.dtype).mH @ expected.U).abs()
    torch.testing.assert_close(overlap, torch.eye(9, dtype=REAL).expand_as(overlap), atol=1e4 * eps, rtol=0)


@DOUBLE
def test_the_leading_ones_are_kept_and_are_exact_where_the_rest_is_zero(dtype):
    a, b = randn((20, 3), dtype), randn((3, 30), dtype, 1)
    x = a @ b
    u, s = incremental_svd(randn((20, 0), dtype), torch.zeros(0, dtype=REAL), x[:, :4], 4)
    for columns in x[:, 4:].split(2, -1):
        u, s = incremental_svd(u, s, columns)
    expected = torch.linalg.svdvals(x)[:4]
    torch.testing.assert_close(s, expected, rtol=1e-10, atol=1e-6 * float(expected[0]))
    torch.testing.assert_close(u[:, :3] @ (u[:, :3].mH @ x), x, rtol=0, atol=1e-10)


@DOUBLE
@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_gradient_of_values_and_span(batch, dtype):
    first, columns = randn((*batch, 6, 2), dtype), randn((*batch, 6, 2), dtype, 1).requires_grad_()
    first.requires_grad_()
    values = torch.tensor([3.0, 2.0], dtype=REAL).expand(*batch, 2).clone().requires_grad_()

    def grown(first, values, columns):
        u = torch.linalg.qr(first).Q
        u, s = incremental_svd(u, values, columns)
        return u @ u.mH, s

    assert gradcheck(grown, (first, values, columns))


@FIELDS
def test_zeros_give_finite_values_and_gradients(dtype):
    u = torch.eye(6, 2, dtype=dtype)
    values, columns = (
        torch.zeros(2, dtype=dtype.to_real()).requires_grad_(),
        torch.zeros(6, 2, dtype=dtype).requires_grad_(),
    )
    found, s = incremental_svd(u, values, columns, 4)
    assert orthogonality_defect(found.detach()) <= 100 * torch.finfo(dtype).eps
    assert not s.any() or s.max() < 1e-100
    grads = torch.autograd.grad((found * randn(found.shape, dtype)).sum().abs() + s.sum(), (values, columns))
    assert all(g.isfinite().all() for g in grads)


def test_errors_state_the_interval():
    u = torch.eye(5, 3, dtype=REAL)
    with pytest.raises(ValueError, match=r"values of shape \(3,\), not \(2,\)"):
        incremental_svd(u, torch.ones(2), randn((5, 1)))
    with pytest.raises(ValueError, match=r"count = 5 is outside \[1, 4\]"):
        incremental_svd(u, torch.ones(3), randn((5, 1)), 5)
    with pytest.raises(ValueError, match=r"n = 3 new columns are outside \[0, 2\]"):
        incremental_svd(u, torch.ones(3), randn((5, 3)))
    with pytest.raises(TypeError, match="one dtype"):
        incremental_svd(u, torch.ones(3), randn((5, 1), torch.float32))
