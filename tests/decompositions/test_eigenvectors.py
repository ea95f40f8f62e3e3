"""Eigenvectors of Hermitian matrices: the leading ones, and their gradient where eigenvalues coincide."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from comoving.decompositions import eigenvectors, leading_eigenvectors
from comoving.linalg import orthogonality_defect
from contract.support import COMPLEX, REAL, randn

ALL = pytest.mark.parametrize("dtype", [torch.float32, REAL, torch.complex64, COMPLEX], ids=str)
DOUBLE = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)


def with_values(values, dtype=REAL):
    q = torch.linalg.qr(randn((len(values), len(values)), dtype)).Q
    return q, (q * torch.tensor(values, dtype=REAL)) @ q.mH


@ALL
@pytest.mark.parametrize("batch", [(), (3,)])
def test_leading_eigenvectors(batch, dtype):
    half = randn((*batch, 8, 8), dtype)
    hermitian = half @ half.mH
    vectors = leading_eigenvectors(hermitian, 3)
    assert vectors.untyped_storage().nbytes() == vectors.numel() * vectors.element_size()  # a copy, not a slice
    assert vectors.is_contiguous()
    values = torch.linalg.eigvalsh(hermitian).flip(-1)[..., :3]
    assert (hermitian @ vectors - vectors * values.unsqueeze(-2)).abs().max() <= 1e3 * torch.finfo(
        dtype
    ).eps * values.max()
    assert orthogonality_defect(vectors).max() <= 100 * torch.finfo(dtype).eps


@DOUBLE
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_once_and_twice(batch, dtype):
    """Of the values, and of what does not depend on the vectors' phases."""
    half = randn((*batch, 4, 4), dtype).requires_grad_()

    def found(half):
        values, vectors = eigenvectors(half + half.mH)
        leading = leading_eigenvectors(half + half.mH, 2)
        return values, vectors[..., :1] @ vectors[..., :1].mH, leading @ leading.mH

    assert gradcheck(found, half)
    assert gradgradcheck(found, half, fast_mode=True)


@DOUBLE
def test_it_is_torchs_gradient_where_eigenvalues_are_apart(dtype):
    half, weight = randn((5, 5), dtype), randn((5, 5), dtype, 1)
    grads = []
    for decompose in (eigenvectors, torch.linalg.eigh):
        x = half.clone().requires_grad_()
        values, vectors = decompose(x @ x.mH)
        loss = (values * torch.arange(5)).sum() + (vectors.mH @ weight @ vectors).diagonal().abs().square()[:2].sum()
        grads += torch.autograd.grad(loss, x)
    torch.testing.assert_close(*grads)


@DOUBLE
def test_the_projector_on_a_whole_cluster_has_its_gradient_and_rotations_inside_have_none(dtype):
    q, a = with_values([1.0, 1.0, 3.0, 3.0, 3.0], dtype)

    def projector(a):
        u = leading_eigenvectors((a + a.mH) / 2, 3)
        return u @ u.mH

    assert gradcheck(projector, a.requires_grad_(), atol=1e-5)
    u = leading_eigenvectors(a, 3)
    inside = q[:, 2:] @ randn((3, 3), dtype, 7)
    (grad,) = torch.autograd.grad(u, a, inside @ (inside.mH @ u).detach())
    assert grad.abs().max() <= 1e-12


@ALL
@pytest.mark.parametrize("values", [[0.0] * 4, [1.0] * 4, [0.0, 0.0, 0.0, 2.0], [-1.0, -1.0, 1.0, 1.0]], ids=str)
def test_degenerate_spectra_give_finite_gradients(values, dtype):
    x = with_values(values, COMPLEX if dtype.is_complex else REAL)[1].to(dtype).requires_grad_()
    u = leading_eigenvectors(x, 2)
    (grad,) = torch.autograd.grad((u * randn(u.shape, dtype, 4)).sum().abs(), x)
    assert grad.isfinite().all() and grad.abs().max() <= 1e6


def test_errors():
    with pytest.raises(TypeError, match="bfloat16"):
        eigenvectors(torch.eye(3, dtype=torch.bfloat16))
