"""Tensor trains: recovery, the error bound, a textbook TT-SVD in double precision, gradients, random variants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from comoving.decompositions import tt_randomized, tt_svd
from comoving.linalg import orthogonality_defect
from contract.support import COMPLEX, REAL, randn

WIDE = {torch.float32: REAL, torch.complex64: COMPLEX, REAL: REAL, COMPLEX: COMPLEX}
ALL = pytest.mark.parametrize("dtype", WIDE, ids=str)
DOUBLE = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def contract(cores):
    """The tensor of a train, without batch dimensions."""
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.tensordot(whole, core, 1)
    return whole.squeeze(0).squeeze(-1)


def known_train(sizes, ranks, dtype=REAL, seed=0):
    bonds = [1, *ranks, 1]
    return contract(
        [randn((bonds[k], d, bonds[k + 1]), dtype, seed + 1000 * k) / bonds[k] ** 0.5 for k, d in enumerate(sizes)]
    )


def textbook(x, ranks):
    """Oseledets' algorithm, one full SVD after the other, in double precision."""
    rest, cores, before = x.to(WIDE[x.dtype]), [], 1
    for d, r in zip(x.shape, ranks, strict=False):
        u, s, vh = torch.linalg.svd(rest.reshape(before * d, -1), full_matrices=False)
        cores.append(u[:, :r].reshape(before, d, -1))
        rest, before = s[:r, None] * vh[:r], min(r, len(s))
    return [*cores, rest.reshape(before, x.shape[-1], 1)]


def is_left_orthogonal(cores, tolerance):
    return all(orthogonality_defect(core.detach().flatten(0, 1)) <= tolerance for core in cores[:-1])


@st.composite
def trains(draw):
    order = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 5), min_size=order, max_size=order))
    whole = torch.tensor(sizes).cumprod(0)
    ranks, before = [], 1
    for k in range(order - 1):
        most = min(before * sizes[k], int(whole[-1] // whole[k]))
        before = draw(st.integers(1, most))
        ranks.append(before)
    return sizes, ranks, draw(st.sampled_from([REAL, COMPLEX])), draw(st.integers(0, 99))


@settings(max_examples=40, deadline=None)
@given(trains())
def test_a_train_is_recovered(case):
    sizes, ranks, dtype, seed = case
    x = known_train(sizes, ranks, dtype, seed)
    variants = [
        tt_svd(x, ranks),
        tt_svd(x, tolerance=1e-10),
        tt_randomized(x, ranks, 4, generator=seeded(seed)),
        tt_randomized(x, ranks, 4, reads=1, generator=seeded(seed)),
    ]
    for cores in variants:
        assert [core.shape[1] for core in cores] == sizes
        assert all(core.shape[-1] <= r for core, r in zip(cores, ranks, strict=False))
        assert is_left_orthogonal(cores, 1e-12)
        assert (contract(cores) - x).norm() <= 1e-8 * x.norm()


@ALL
@pytest.mark.parametrize(("sizes", "ranks"), [((7, 8, 6), (3, 4)), ((4, 5, 6, 3), (2, 3, 2)), ((3, 4, 2, 3, 3), 3)])
def test_truncation_is_that_of_the_textbook(sizes, ranks, dtype):
    x = randn(sizes, dtype)
    cores = tt_svd(x, ranks)
    expected = textbook(x, (ranks,) * 4 if isinstance(ranks, int) else ranks)
    assert all(core.dtype is dtype for core in cores)
    assert [core.shape for core in cores] == [core.shape for core in expected]
    eps = torch.finfo(dtype).eps
    assert is_left_orthogonal(cores, 50 * eps)
    assert (contract(cores) - contract(expected)).norm() <= 500 * eps * x.norm()


@ALL
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_large_unfoldings_are_reduced_without_loss(noise, dtype):
    """Large enough for Gram matrices, trees and sketched ranges to be what is used."""
    x = known_train((12, 80, 40, 16), (3, 3, 3), dtype)
    x = x / x.abs().square().mean().sqrt() + noise * randn(x.shape, dtype, 9)
    cores = tt_svd(x, 3)
    best = contract(textbook(x, (3, 3, 3)))
    error = (contract(cores).to(best.dtype) - x).norm() / x.norm()
    assert error <= (best - x).norm() / x.norm() * 1.0001 + 20 * torch.finfo(dtype).eps
    assert is_left_orthogonal(cores, 100 * torch.finfo(dtype).eps)


@DOUBLE
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("ranks", [None, 3])
def test_tolerance_bounds_the_error_and_no_rank_is_wasted(ranks, tolerance, dtype):
    decay = torch.logspace(0, -5, 6, dtype=REAL)
    x = randn((6, 6, 6, 6), dtype) * decay * decay[:, None] * decay[:, None, None] * decay[:, None, None, None]
    cores = tt_svd(x, ranks, tolerance)
    found = [core.shape[-1] for core in cores[:-1]]
    error = (contract(cores) - x).norm() / x.norm()
    if ranks is None:
        assert error <= tolerance
    assert max(found) <= (ranks or 36)
    share = tolerance / 3**0.5 * x.norm()
    s = torch.linalg.svdvals(x.reshape(6, -1))  # the first bond sees x itself
    assert found[0] == min(max(1, sum(s[k:].norm() > share for k in range(6))), ranks or 6)


def test_the_reading_of_a_tolerance_with_a_sketched_range():
    x = known_train((20, 100, 100), (2, 2)) + 1e-14 * randn((20, 100, 100), seed=5)
    assert [core.shape[-1] for core in tt_svd(x, 5, 1e-8)] == [2, 2, 1]


@DOUBLE
def test_batches_are_done_one_by_one(dtype):
    x = randn((2, 3, 4, 5, 3), dtype)
    cores = tt_svd(x, (3, 2), order=3)
    assert [core.shape for core in cores] == [(2, 3, 1, 4, 3), (2, 3, 3, 5, 2), (2, 3, 2, 3, 1)]
    for i in range(2):
        for j in range(3):
            for core, single in zip(cores, tt_svd(x[i, j], (3, 2)), strict=True):
                torch.testing.assert_close(core[i, j], single, atol=1e-10, rtol=0)
    for reads in (1, 2):
        cores = tt_randomized(x, (3, 2), 2, reads=reads, generator=seeded(), order=3)
        assert [core.shape for core in cores] == [(2, 3, 1, 4, 3), (2, 3, 3, 5, 2), (2, 3, 2, 3, 1)]
        for i in range(2):
            for j in range(3):
                alone = tt_randomized(x[i, j], (3, 2), 2, reads=reads, generator=seeded())
                for core, single in zip(cores, alone, strict=True):
                    torch.testing.assert_close(core[i, j], single, atol=1e-10, rtol=0)
    x[0, 0] = known_train((4, 5, 3), (1, 1), dtype)
    assert [core.shape[-1] for core in tt_svd(x, tolerance=1e-9, order=3)] == [4, 3, 1]


@DOUBLE
@pytest.mark.parametrize(
    ("size", "order", "ranks"), [((3, 3, 3), 3, (2, 2)), ((2, 3, 2, 3), 3, 2), ((2, 3, 3, 2), 4, (2, 3, 1))]
)
def test_gradients_once_and_twice(size, order, ranks, dtype):
    x = randn(size, dtype, 1).requires_grad_()
    assert gradcheck(lambda x: tuple(tt_svd(x, ranks, order=order)), x, fast_mode=dtype.is_complex)
    assert gradgradcheck(lambda x: tuple(tt_svd(x, ranks, order=order)), x, fast_mode=True)


@DOUBLE
@pytest.mark.parametrize("reads", [1, 2])
def test_gradients_of_the_random_variants(reads, dtype):
    x = randn((3, 3, 3), dtype, 1).requires_grad_()
    assert gradcheck(
        lambda x: tuple(tt_randomized(x, 2, 0, reads=reads, generator=seeded())), x, fast_mode=dtype.is_complex
    )


DEGENERATE = {
    "zero": lambda dtype: torch.zeros(4, 5, 6, dtype=dtype),
    "ones": lambda dtype: torch.ones(4, 5, 6, dtype=dtype),
    "rank 1": lambda dtype: known_train((4, 5, 6), (1, 1), dtype),
    "equal singular values": lambda dtype: torch.eye(6, dtype=dtype).reshape(6, 2, 3).repeat(1, 2, 1),
    "large zero": lambda dtype: torch.zeros(12, 80, 90, dtype=dtype),
}


@ALL
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_tensors_give_finite_values_and_gradients(kind, dtype):
    x = DEGENERATE[kind](dtype).requires_grad_()
    ranks = (4, 3) if kind == "equal singular values" else (3, 4)
    for cores in (tt_svd(x, ranks), tt_svd(x, ranks, 1e-4)):
        eps = torch.finfo(dtype).eps
        assert all(core.isfinite().all() for core in cores)
        assert is_left_orthogonal(cores, 100 * eps)
        if kind != "equal singular values":
            assert (contract(cores) - x).detach().abs().max() <= 500 * eps
        loss = sum((core * randn(core.shape, dtype)).sum().abs() for core in cores)
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.isfinite().all()
    for reads in (1, 2):
        cores = tt_randomized(x, ranks, 2, reads=reads, generator=seeded())
        assert all(core.isfinite().all() for core in cores)
        (grad,) = torch.autograd.grad(sum(core.abs().sum() for core in cores), x)
        assert grad.isfinite().all()


@DOUBLE
def test_the_reconstruction_of_a_whole_cluster_has_its_gradient(dtype):
    """The identity's singular values are all equal; kept whole, the train is the tensor and its gradient the weight."""
    x = torch.eye(6, dtype=dtype).reshape(6, 2, 3).requires_grad_()
    weight = randn((6, 2, 3), dtype)
    (grad,) = torch.autograd.grad((contract(tt_svd(x, (6, 3))) * weight.conj()).sum().real, x)
    torch.testing.assert_close(grad, weight)


@DOUBLE
def test_random_variants_are_near_the_best(dtype):
    x = known_train((8, 9, 7, 8), (3, 4, 3), dtype)
    x = x / x.norm() + 1e-3 * randn(x.shape, dtype, 9) / x.numel() ** 0.5
    best = (contract(tt_svd(x, (3, 4, 3))) - x).norm()
    for reads, factor in ((2, 3), (1, 12)):
        cores = tt_randomized(x, (3, 4, 3), 5, reads=reads, generator=seeded())
        assert (contract(cores) - x).norm() <= factor * best


def test_the_generator_is_the_only_randomness():
    x, before = randn((6, 5, 4)), torch.get_rng_state()
    for reads in (1, 2):
        first, again, other = (contract(tt_randomized(x, 2, 1, reads=reads, generator=seeded(s))) for s in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    tt_svd(randn((60, 60, 60)), 2)  # the range sketch of the deterministic one
    assert torch.equal(torch.get_rng_state(), before)


def test_against_tensorly():
    tl = pytest.importorskip("tensorly", exc_type=ImportError)
    from tensorly.decomposition import tensor_train  # noqa: PLC0415

    x = randn((6, 7, 5, 6), torch.float32)
    with tl.backend_context("pytorch", local_threadsafe=True):  # the backend is global
        theirs = tl.tt_to_tensor(tensor_train(x, [1, 3, 4, 3, 1]))
    torch.testing.assert_close(contract(tt_svd(x, (3, 4, 3))), theirs, atol=1e-4, rtol=0)


@DOUBLE
def test_against_torchtt(dtype):
    """On a tensor of known TT rank, with noise: the same approximation, core spaces included."""
    torchtt = pytest.importorskip("torchtt")
    x = known_train((6, 7, 5, 6), (3, 4, 3), dtype)
    noisy = x + 0.01 * randn(x.shape, dtype, 5)
    for tensor in (x, noisy):
        theirs = torchtt.TT(tensor, eps=0, rmax=[1, 3, 4, 3, 1])
        assert theirs.R == [1, 3, 4, 3, 1]
        torch.testing.assert_close(contract(tt_svd(tensor, (3, 4, 3))), theirs.full(), atol=1e-12, rtol=0)


def test_errors_state_the_interval():
    x = randn((3, 4, 5))
    with pytest.raises(ValueError, match="ranks, tolerance or both"):
        tt_svd(x)
    with pytest.raises(ValueError, match=r"ranks\[0\] = 4 is outside \[1, 3\]"):
        tt_svd(x, (4, 5))
    with pytest.raises(ValueError, match=r"ranks = 6 is outside \[1, 5\]"):
        tt_svd(x, 6)
    with pytest.raises(ValueError, match="3 values for 2 places"):
        tt_svd(x, (2, 2, 2))
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"tolerance = {wrong} is outside \[0, 1\)"):
            tt_svd(x, tolerance=wrong)
    with pytest.raises(ValueError, match="order = 1 is outside"):
        tt_svd(randn((4,)), 1)
    with pytest.raises(ValueError, match="size 0"):
        tt_svd(torch.zeros(3, 0, 2), 1)
    with pytest.raises(ValueError, match=r"reads = 3 is outside \[1, 2\]"):
        tt_randomized(x, 2, reads=3, generator=seeded())
    with pytest.raises(ValueError, match="oversampling = -1"):
        tt_randomized(x, 2, -1, generator=seeded())
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match="float32, float64, complex64 or complex128"):
            tt_svd(x.to(dtype), 2)
        with pytest.raises(TypeError, match="float32, float64, complex64 or complex128"):
            tt_randomized(x.to(dtype), 2, generator=seeded())
