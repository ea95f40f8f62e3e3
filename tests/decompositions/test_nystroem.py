"""Tucker factors from sampled fibres: exact on tensors of known rank, unbiased, and differentiable."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from comoving.decompositions import fibres, leading_left_vectors, nystroem_tucker
from comoving.linalg import multilinear, orthogonality_defect, unfold
from contract.support import COMPLEX, REAL, known_rank, randn

ALL = pytest.mark.parametrize("dtype", [torch.float32, REAL, torch.complex64, COMPLEX], ids=str)
DOUBLE = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def tensors(draw):
    order = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(2, 6), min_size=order, max_size=order))
    most = [min(d, 3, max(1, torch.tensor(sizes).prod().item() // d)) for d in sizes]
    rank = draw(st.integers(1, min(most)))
    return sizes, [rank] * order, draw(st.sampled_from([REAL, COMPLEX])), draw(st.integers(0, 99))


@settings(max_examples=30, deadline=None)
@given(tensors())
def test_a_tensor_of_known_rank_is_recovered(case):
    sizes, ranks, dtype, seed = case
    x = known_rank(sizes, ranks, dtype, seed)
    samples = [min(x.numel() // d, 24) for d in sizes]
    core, factors = nystroem_tucker(x, ranks, samples, generator=seeded(seed))
    assert core.shape == tuple(ranks)
    for n, u in enumerate(factors):
        assert orthogonality_defect(u) <= 1e-12
        drawn = fibres(x, n, torch.arange(x.numel() // sizes[n]))
        assert torch.equal(drawn, unfold(x, n, len(sizes)))
    spanned = all(
        torch.linalg.matrix_rank(u.mH @ unfold(x, n, len(sizes)), rtol=1e-9) == ranks[n] for n, u in enumerate(factors)
    )
    if spanned:
        back = multilinear(core, factors)
        assert (back - x).abs().max() <= 1e-7 * x.abs().max()


@DOUBLE
@pytest.mark.parametrize("shape", [(9, 8, 7), (6, 5, 4, 6), (4, 5, 4, 3, 5)], ids=str)
def test_recovery_without_exception(shape, dtype):
    x = known_rank(shape, (2,) * len(shape), dtype)
    core, factors = nystroem_tucker(x, 2, 12, generator=seeded())
    torch.testing.assert_close(multilinear(core, factors), x, atol=1e-11, rtol=0)


@ALL
def test_factors_are_the_leading_vectors_of_the_scaled_columns(dtype):
    x = randn((2, 5, 4, 3), dtype)
    weights = [torch.arange(n, dtype=torch.float32) for n in (12, 15, 20)]
    indices = [torch.tensor([3, 11, 3, 7]), torch.tensor([14, 1, 2, 9]), torch.tensor([5, 6, 19, 1])]
    core, factors = nystroem_tucker(x, (3, 2, 2), 4, indices=indices, weights=weights, order=3)
    for n, (j, r) in enumerate(zip(indices, (3, 2, 2), strict=True)):
        p = (weights[n] / weights[n].sum())[j]
        columns = unfold(x, n, 3)[..., j] / (4 * p).sqrt()
        expected, _ = leading_left_vectors(columns, r)
        torch.testing.assert_close(factors[n], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(core, multilinear(x, [u.mH for u in factors]))
    single = nystroem_tucker(x[1], (3, 2, 2), 4, indices=indices, weights=weights)
    torch.testing.assert_close(single[0], core[1], atol=1e-4, rtol=1e-4)


def test_the_scaled_sample_is_unbiased_for_the_gram_matrix():
    """E[C C^H] = X X^H, from the columns and weights that the function itself uses, over many draws."""
    from comoving.decompositions.nystroem import _draw, _worth  # noqa: PLC0415

    x = randn((3, 10))
    for weight in (None, x.square().sum(0), torch.arange(10.0)):
        j = _draw(10, 40000, weight, seeded())
        c = x[:, j] * _worth(torch.ones(10) if weight is None else weight, j, 40000).sqrt()
        exact = x @ x.mT if weight is None or weight[0] > 0 else x[:, 1:] @ x[:, 1:].mT
        assert (c @ c.mT - exact).abs().max() <= 0.05 * exact.abs().max()


def test_weights_steer_the_draw_and_zero_weights_are_never_drawn():
    x = torch.zeros(4, 6, 5)
    x[:, 2, 3] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # mode 0 has one fibre that is not zero
    weights = [torch.zeros(30), torch.ones(20), torch.ones(24)]
    weights[0][2 * 5 + 3] = 1.0
    _, factors = nystroem_tucker(x, 1, 2, weights=weights, generator=seeded())
    torch.testing.assert_close(factors[0][:, 0], x[:, 2, 3] / x[:, 2, 3].norm())


def test_the_generator_is_the_only_randomness():
    x = randn((6, 5, 4))
    before = torch.get_rng_state()
    first, again, other = (nystroem_tucker(x, 2, 3, generator=seeded(s))[0] for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@DOUBLE
def test_gradients_once_and_twice(dtype):
    x = randn((3, 4, 3), dtype, 2).requires_grad_()
    indices = [torch.tensor([0, 5, 7, 2, 11]), torch.tensor([0, 1, 5, 8, 3]), torch.tensor([2, 3, 9, 11, 4])]

    def parts(x):
        core, factors = nystroem_tucker(x, 2, 5, indices=indices)
        return core, *factors

    assert gradcheck(parts, x)
    assert gradgradcheck(parts, x, fast_mode=True)


@ALL
@pytest.mark.parametrize("kind", ["zero", "rank 1", "ones"])
def test_degenerate_tensors_give_finite_values_and_gradients(kind, dtype):
    x = {
        "zero": lambda: torch.zeros(5, 4, 6, dtype=dtype),
        "rank 1": lambda: known_rank((5, 4, 6), (1, 1, 1), dtype),
        "ones": lambda: torch.ones(5, 4, 6, dtype=dtype),
    }[kind]().requires_grad_()
    core, factors = nystroem_tucker(x, 3, 8, generator=seeded())
    back = multilinear(core, factors)
    assert (back - x).detach().abs().max() <= 100 * torch.finfo(dtype).eps
    loss = core.abs().square().sum() + sum((u * randn(u.shape, dtype)).sum().abs() for u in factors)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.isfinite().all()


def test_errors_state_the_interval():
    x = randn((4, 3, 5))
    with pytest.raises(ValueError, match=r"ranks\[1\] = 4 is outside \[1, 3\]"):
        nystroem_tucker(x, 4, 6, generator=seeded())
    with pytest.raises(ValueError, match=r"samples\[2\] = 13 is outside \[1, 12\]"):
        nystroem_tucker(x, 2, 13, generator=seeded())
    with pytest.raises(ValueError, match=r"samples\[0\] = 1 is outside \[2, 15\]"):
        nystroem_tucker(x, 2, 1, generator=seeded())
    with pytest.raises(ValueError, match="2 values for 3 places"):
        nystroem_tucker(x, (2, 2), 5, generator=seeded())
    with pytest.raises(ValueError, match="exactly one of generator and indices"):
        nystroem_tucker(x, 2, 5)
    with pytest.raises(ValueError, match="indices of lengths"):
        nystroem_tucker(x, 2, 5, indices=[torch.arange(5)] * 2)
    with pytest.raises(ValueError, match="weights of lengths"):
        nystroem_tucker(x, 2, 5, generator=seeded(), weights=[torch.ones(5)] * 3)
    with pytest.raises(ValueError, match="not all zero"):
        nystroem_tucker(x, 2, 5, generator=seeded(), weights=[torch.zeros(15), torch.ones(20), torch.ones(12)])
    with pytest.raises(ValueError, match=r"order = 1 is outside \[2, 3\]"):
        nystroem_tucker(x, 2, 5, generator=seeded(), order=1)
    with pytest.raises(TypeError, match="float16"):
        nystroem_tucker(x.half(), 2, 5, generator=seeded())
