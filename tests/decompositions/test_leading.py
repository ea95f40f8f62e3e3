"""Leading directions of unfoldings, by Gram matrices or the SVD: of batches, and with a gradient."""

import pytest
import torch
from torch.autograd import gradcheck

from comoving.decompositions import leading_directions, leading_left_vectors, spanning
from comoving.linalg import orthogonality_defect, unfold, unit_size
from contract.support import COMPLEX, REAL, close, known_rank, randn

FIELDS = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.complex64], ids=str)
DOUBLE = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
METHODS = pytest.mark.parametrize("method", ["gram", "svd"])


def close_to(dtype):
    slack = 1e-10 if dtype in (torch.float64, torch.complex128) else 1e-4
    return {"rtol": slack, "atol": slack}


@FIELDS
@METHODS
@pytest.mark.parametrize("shape", [(7, 9), (9, 2), (5, 6, 4), (30, 2, 3)], ids=str)
def test_leading_directions_of_a_batch(dtype, method, shape):
    x = unit_size(torch.randn(4, *shape, dtype=dtype, generator=torch.Generator().manual_seed(3)), 1)
    x[1] = 0
    x[2] = torch.einsum("i,...j->i...j", x[2].flatten(1)[:, 0], torch.ones_like(x[2, 0])) / shape[0]
    for mode in range(len(shape)):
        found = leading_directions(x, mode, 2, method, 1)
        assert found.shape == (4, shape[mode], 2)
        assert orthogonality_defect(found).max() < 100 * torch.finfo(dtype).eps
        for b in (0, 3):
            alone = leading_directions(x[b], mode, 2, method)
            torch.testing.assert_close(found[b] @ found[b].mH, alone @ alone.mH, **close_to(dtype))


@FIELDS
@METHODS
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (40, 150), (150, 40), (3000, 4), (4, 3000)], ids=str)
def test_they_span_what_the_differentiable_left_vectors_do(shape, method, dtype):
    """Whichever way is the cheapest for a shape."""
    x = unit_size(known_rank(shape, (2, 2), dtype) + 0.01 * randn(shape, dtype, 3))
    u, expected = leading_directions(x, 0, 2, method), leading_left_vectors(x, 2)[0]
    assert orthogonality_defect(u) < 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(u @ u.mH, expected @ expected.mH, **close_to(dtype))
    q, r = torch.linalg.qr(spanning(x, 2))
    torch.testing.assert_close(q @ q.mH, expected @ expected.mH, **close_to(dtype))


@FIELDS
@METHODS
def test_missing_directions_are_completed(method, dtype):
    for x in (torch.zeros(5, 7, dtype=dtype), randn((5, 2), dtype), known_rank((5, 7), (1, 1), dtype)):
        u = leading_directions(x, 0, 4, method)
        assert u.shape == (5, 4)
        assert orthogonality_defect(u) < 100 * torch.finfo(dtype).eps


@DOUBLE
@METHODS
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 4, 2), (2, 6, 3)], ids=str)
def test_the_gradient_of_the_span(shape, method, dtype):
    """Also through the orthonormal basis of the images of the right vectors, where the other side is the small one."""
    x, rows = randn(shape, dtype, 2).requires_grad_(), len(shape) == 3

    def projector(x):
        u = leading_directions(x, 0, 2, method, rows=int(rows))
        return u @ u.mH

    assert gradcheck(projector, x)


@FIELDS
@METHODS
@pytest.mark.parametrize("kind", ["zero", "ones", "rank 1"])
@pytest.mark.parametrize("shape", [(4, 6), (9, 4)], ids=str)
def test_degenerate_matrices_have_finite_gradients(shape, kind, method, dtype):
    x = {
        "zero": lambda: torch.zeros(shape, dtype=dtype),
        "ones": lambda: torch.ones(shape, dtype=dtype),
        "rank 1": lambda: known_rank(shape, (1, 1), dtype),
    }[kind]().requires_grad_()
    u = leading_directions(x, 0, 3, method)
    (grad,) = torch.autograd.grad((u * randn(u.shape, dtype, 4)).sum().abs(), x)
    assert grad.isfinite().all()


def test_an_unfolding_is_decomposed_as_a_matrix():
    x = randn((4, 5, 6))
    for n in range(3):
        a, b = leading_directions(x, n, 2), leading_directions(unfold(x, n, 3), 0, 2)
        close(a @ a.mT, b @ b.mT)
