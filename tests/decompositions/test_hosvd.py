"""Tucker factors from unfoldings: exact on tensors of known rank, within the bounds, of batches, and differentiable."""

import pytest
import torch
from torch.autograd import gradcheck

from comoving.decompositions import by_shrinkage, hosvd
from comoving.finders import Exact, Operand
from comoving.frames import Modes
from comoving.linalg import multilinear, orthogonality_defect, unfold
from contract.support import COMPLEX, REAL, known_rank, randn

ALL = pytest.mark.parametrize("dtype", [torch.float32, REAL, torch.complex64, COMPLEX], ids=str)
DOUBLE = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
VARIANTS = [{"sequential": s, "sweeps": n, "method": m} for s in (False, True) for n in (0, 2) for m in ("gram", "svd")]
EACH = pytest.mark.parametrize("options", VARIANTS, ids=str)


def error(x, ranks, **options):
    core, factors = hosvd(x, ranks, **options)
    return float((multilinear(core, factors) - x).norm())


@ALL
@EACH
def test_a_tensor_of_known_rank_is_recovered(options, dtype):
    x = known_rank((9, 8, 7), (2, 3, 4), dtype)
    x = x / x.abs().max()
    core, factors = hosvd(x, (2, 3, 4), **options)
    assert core.shape == (2, 3, 4)
    assert all(orthogonality_defect(u) <= 100 * torch.finfo(dtype).eps for u in factors)
    assert (multilinear(core, factors) - x).norm() <= 1e3 * torch.finfo(dtype).eps * x.norm()


@DOUBLE
@EACH
def test_the_error_is_within_the_bound(options, dtype):
    x = randn((7, 6, 5), dtype)
    tails = [torch.linalg.svdvals(unfold(x, n, 3))[r:].square().sum() for n, r in enumerate((3, 2, 4))]
    assert max(tails) ** 0.5 <= error(x, (3, 2, 4), **options) <= float(sum(tails)) ** 0.5


@DOUBLE
@pytest.mark.parametrize("sequential", [False, True])
def test_sweeps_lower_the_error(sequential, dtype):
    x = randn((7, 6, 5), dtype)
    errors = [error(x, 2, sequential=sequential, sweeps=n) for n in range(4)]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < errors[0]


@DOUBLE
@EACH
def test_batches_are_done_one_by_one(options, dtype):
    x = randn((2, 3, 5, 4, 3), dtype)
    core, factors = hosvd(x, (3, 2, 2), order=3, **options)
    back = multilinear(core, factors)
    for i in range(2):
        for j in range(3):
            alone = multilinear(*hosvd(x[i, j], (3, 2, 2), **options))
            torch.testing.assert_close(back[i, j], alone, atol=1e-8, rtol=0)


@DOUBLE
@EACH
def test_gradients_of_what_is_kept(options, dtype):
    x = randn((3, 4, 3), dtype, 2).requires_grad_()
    assert gradcheck(lambda x: multilinear(*hosvd(x, 2, **options)), x)


@ALL
@EACH
@pytest.mark.parametrize("kind", ["zero", "ones"])
def test_degenerate_tensors_give_finite_values_and_gradients(kind, options, dtype):
    x = (torch.zeros if kind == "zero" else torch.ones)(5, 4, 6, dtype=dtype).requires_grad_()
    back = multilinear(*hosvd(x, 3, **options))
    assert (back - x).detach().abs().max() <= 1e3 * torch.finfo(dtype).eps
    (grad,) = torch.autograd.grad((back * randn(back.shape, dtype)).sum().abs(), x)
    assert grad.isfinite().all()


@DOUBLE
@EACH
def test_it_is_what_the_finder_finds(options, dtype):
    x, layout = randn((6, 5, 4), dtype), Modes(min_size=2)
    start = layout.start(x, (3, 2, 2), None, 0)
    found = Exact(**options).find(Operand(x), start, False, {})
    for u, v in zip(found.factors, hosvd(x, (3, 2, 2), **options)[1], strict=True):
        torch.testing.assert_close(u @ u.mH, v @ v.mH, atol=1e-8, rtol=0)


def test_errors_and_the_order_of_modes():
    x = randn((4, 3, 5))
    assert by_shrinkage((4, 3, 5), (3, None, 1)) == [2, 0]
    with pytest.raises(ValueError, match=r"ranks\[1\] = 4 is outside \[1, 3\]"):
        hosvd(x, 4)
    with pytest.raises(ValueError, match="sweeps = -1"):
        hosvd(x, 2, sweeps=-1)
    with pytest.raises(ValueError, match=r"order = 1 is outside \[2, 3\]"):
        hosvd(x, 2, order=1)
    with pytest.raises(TypeError, match="float16"):
        hosvd(x.half(), 2)
