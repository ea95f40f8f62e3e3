"""Leading left singular vectors: against the SVD in double precision, and their gradient at degenerate spectra."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from comoving.decompositions import leading_left_vectors
from comoving.linalg import orthogonality_defect
from contract.support import COMPLEX, REAL, randn

WIDE = {torch.float32: REAL, torch.complex64: COMPLEX, REAL: REAL, COMPLEX: COMPLEX}
ALL = pytest.mark.parametrize("dtype", WIDE, ids=str)
DOUBLE = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
SIZES = pytest.mark.parametrize("size", [(4, 9), (9, 4), (5, 5), (2, 4, 9), (2, 1, 9, 4)], ids=str)


def with_spectrum(d, m, values, dtype=REAL):
    u, v = torch.linalg.qr(randn((d, len(values)), dtype)).Q, torch.linalg.qr(randn((m, len(values)), dtype, 1)).Q
    return u, (u * torch.tensor(values, dtype=REAL)) @ v.mH


def projector(a, count):
    u, _ = leading_left_vectors(a, count)
    return u @ u.mH


@ALL
@SIZES
def test_vectors_are_those_of_the_svd_in_their_gauge(size, dtype):
    a = randn(size, dtype)
    u, s = leading_left_vectors(a, 3)
    expected_u, expected_s, _ = torch.linalg.svd(a.to(WIDE[dtype]), full_matrices=False)
    eps = torch.finfo(dtype).eps
    assert u.dtype is dtype
    torch.testing.assert_close(s.double(), expected_s[..., :3], atol=20 * eps, rtol=50 * eps)
    overlap = (u.to(WIDE[dtype]).mH @ expected_u[..., :3]).abs()
    torch.testing.assert_close(overlap, torch.eye(3, dtype=REAL).expand_as(overlap), atol=1e3 * eps, rtol=0)
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    assert (largest.real > 0).all()
    assert not u.is_complex() or (largest.imag.abs() <= 2 * eps).all()


@ALL
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_the_sketched_range_gives_the_same_as_everything(noise, dtype):
    _, a = with_spectrum(120, 90, [4.0, 3.0, 2.0, 1.0], WIDE[dtype])
    a = a + noise * randn(a.shape, WIDE[dtype], 5) / 100
    u, s = leading_left_vectors(a.to(dtype), 4)
    expected = torch.linalg.svd(a, full_matrices=False)
    eps = torch.finfo(dtype).eps
    assert orthogonality_defect(u) <= 100 * eps
    kept = expected.U[:, :4]
    assert (u @ u.mH - kept @ kept.mH).abs().max() <= 100 * eps
    torch.testing.assert_close(s.double(), expected.S[:4], rtol=100 * eps, atol=0)


@DOUBLE
@pytest.mark.parametrize("size", [(4, 6), (6, 4), (4, 4), (2, 4, 5), (2, 1, 5, 4)], ids=str)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_gradients_once_and_twice(size, count, dtype):
    a = randn(size, dtype, 3).requires_grad_()
    assert gradcheck(lambda a: leading_left_vectors(a, count), a)
    assert gradgradcheck(lambda a: leading_left_vectors(a, count), a, fast_mode=len(size) > 2)


def test_gradients_through_a_sketched_range():
    left, right = randn((60, 2)).requires_grad_(), randn((2, 56), seed=1).requires_grad_()
    weight = randn((60, 60), seed=2)

    def loss(left, right):
        u, s = leading_left_vectors(left @ right, 2)  # 4 (2 2 + 8) <= 56: the range is sketched
        return (u @ u.mT * weight).sum() + s.square().sum()

    assert gradcheck(loss, (left, right), fast_mode=True)


DEGENERATE = {
    "equal pair": (6, 8, [3.0, 2.0, 2.0, 1.0]),
    "all equal": (6, 8, [2.0] * 6),
    "all equal, tall": (8, 5, [2.0] * 5),
    "rank 2": (6, 8, [3.0, 1.0]),
    "rank 2, tall": (20, 5, [3.0, 1.0]),
    "rank 1, wide": (5, 30, [1.0]),
    "zero": (6, 8, [0.0]),
    "zero, large": (100, 90, [0.0]),
}


@ALL
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_spectra_give_finite_values_and_gradients(kind, dtype):
    d, m, values = DEGENERATE[kind]
    a = with_spectrum(d, m, values, WIDE[dtype])[1].to(dtype).requires_grad_()
    u, s = leading_left_vectors(a, 3)
    assert u.isfinite().all() and s.isfinite().all()
    assert orthogonality_defect(u.detach()) <= 100 * torch.finfo(dtype).eps
    weight = randn(u.shape, dtype, 4)
    (grad,) = torch.autograd.grad((u * weight).sum().abs() + s.sum(), a)
    assert grad.isfinite().all()
    assert grad.abs().max() <= 1e6


@DOUBLE
@pytest.mark.parametrize(("d", "m"), [(5, 6), (6, 5), (4, 11), (11, 4)])
def test_the_projector_on_a_whole_cluster_has_its_gradient(d, m, dtype):
    """A cluster of equal values has no vectors of its own to differentiate; its span does."""
    _, a = with_spectrum(d, m, [3.0, 3.0, 1.0, 1.0], dtype)
    assert gradcheck(lambda a: projector(a, 2), a.requires_grad_(), eps=1e-6, atol=1e-5)


@DOUBLE
def test_rotations_inside_a_cluster_get_no_gradient(dtype):
    u0, a = with_spectrum(6, 8, [3.0, 3.0, 1.0], dtype)
    a.requires_grad_()
    u, _ = leading_left_vectors(a, 2)
    inside = u0[:, :2] @ randn((2, 2), dtype, 7)  # a gradient of U within the span: only the rotation sees it
    (grad,) = torch.autograd.grad(u, a, inside @ (inside.mH @ u).detach())
    scale = (grad.mH @ grad).diagonal().real.sum().sqrt()
    assert scale <= 1e-12


@ALL
@pytest.mark.parametrize("size", [(4, 9), (9, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("factor", [1e-25, 1e15])
def test_the_gradient_scales_as_one_over_the_tensor(size, factor, dtype):
    """U(c A) = U(A), so that the gradient at c A is 1 / c of that at A, also where s^2 underflows."""
    a, weight = randn(size, dtype), randn((size[0], 2), dtype, 1)
    grads = []
    for x in (a, a * factor):
        x.requires_grad_()
        u, _ = leading_left_vectors(x, 2)
        grads += torch.autograd.grad((u * weight).sum().abs(), x)
    torch.testing.assert_close(grads[1] * factor, grads[0], rtol=1e-3, atol=1e-3)


def test_errors():
    with pytest.raises(ValueError, match=r"count = 5 is outside \[1, 4\]"):
        leading_left_vectors(randn((4, 9)), 5)
    with pytest.raises(TypeError, match="bfloat16"):
        leading_left_vectors(torch.ones(4, 9, dtype=torch.bfloat16), 1)
