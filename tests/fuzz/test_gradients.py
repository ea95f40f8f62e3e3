"""Structured gradients: what each of them is, finite, and a function of its seed."""

import pytest
import torch

from comoving.fuzz import STRUCTURES, sequence

EVERY = pytest.mark.parametrize("name", STRUCTURES)
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bfloat16, torch.float16]
SHAPES = [(7,), (1,), (12, 9), (1, 5), (6, 1, 4), (3, 2, 4, 2), (2, 1, 3, 2, 2)]


def made(name, shape=(20, 30), dtype=torch.float64, steps=8, seed=0):
    return sequence(name, shape, dtype, torch.Generator().manual_seed(seed), steps)


def ranks(gradients):
    return [int(torch.linalg.matrix_rank(x)) for x in gradients]


def live_rows(gradient):
    return gradient.flatten(1).ne(0).any(1)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_dtype_and_size(name, dtype):
    before = torch.random.get_rng_state()
    for shape in SHAPES:
        xs = made(name, shape, dtype, 4)
        assert len(xs) == 4
        for x in xs:
            assert (tuple(x.shape), x.dtype) == (shape, dtype)
            assert x.isfinite().all()
            assert x.is_contiguous()
            assert torch.linalg.vector_norm(x.to(torch.complex128)) < 1.01e18
    assert torch.equal(torch.random.get_rng_state(), before)


@EVERY
def test_the_seed_decides(name):
    assert all(map(torch.equal, made(name), made(name)))
    assert not all(map(torch.equal, made(name), made(name, seed=1)))
    assert any(x.any() for x in made(name))


def test_lines_that_are_always_zero():
    total = sum(x.abs() for x in made("zero-lines"))
    assert 0 < int(total.any(1).sum()) < 20
    assert 0 < int(total.any(0).sum()) < 30


def test_few_rows_and_few_directions():
    rows = torch.stack([live_rows(x) for x in made("live-rows")])
    assert rows.any(0).sum() < 10
    assert ranks(made("rank-one")) == [1] * 8
    assert max(ranks(made("duplicates"))) == 3
    assert max(ranks(made("q-learning"))) <= 8
    assert all(int(x.any(0).sum()) <= 24 for x in made("bag-of-words", (10, 400)))


def test_one_row_a_step():
    assert [int(live_rows(x).nonzero()) for x in made("new-row")] == list(range(8))
    drawn = [int(live_rows(x).nonzero()) for x in made("random-row")]
    assert len(set(drawn)) > 3
    assert len({int(x.flatten().nonzero()) for x in made("one-entry")}) == 1


def test_some_slices_of_a_tensor():
    assert all(1 <= int(live_rows(x).sum()) <= 2 for x in made("gated", (6, 4, 5)))


def test_ends_of_life():
    assert [bool(x.any()) for x in made("dead-then-alive")] == sorted(bool(x.any()) for x in made("dead-then-alive"))
    assert not made("dead-then-alive")[0].any()
    assert made("alive-then-dead")[0].any()


def test_numbers_at_the_edges():
    for dtype in DTYPES:
        assert all(0 < x.abs().amax() < torch.finfo(dtype).tiny for x in made("denormal", (50,), dtype))
    assert max(float(x.abs().amax()) for seed in range(40) for x in made("huge", (4,), steps=1, seed=seed)) > 1e15
    sizes = torch.stack(made("magnitudes", steps=60)).abs().amax((1, 2))
    assert sizes.min() < 1e-8
    assert sizes.max() > 1e8
    rows = made("graded")[0].abs().amax(1)
    assert rows[0] < 1e-18
    assert rows[-1] > 0.1


def test_unknown_structures_are_refused():
    with pytest.raises(ValueError, match="unknown structure 'gausian'; known are gaussian"):
        made("gausian")
