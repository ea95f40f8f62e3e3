"""What finders of mode-wise frames promise beyond the contract of subspaces: any size, operands in two terms."""

import pytest
import torch

from comoving.finders import Operand, RandomProjection
from comoving.frames import ModeFrame, Modes
from contract.support import (
    COMPLEX,
    FINDERS,
    PATIENCE,
    REAL,
    SAMPLED,
    close,
    known_rank,
    memory_of,
    randn,
    random_frame,
    search,
)

SIDES = {
    "left": ((7, 9), (3, None)),
    "right": ((9, 7), (None, 3)),
    "both": ((8, 9), (3, 3)),
    "more than the columns": ((9, 2), (4, None)),
    "3-D": ((6, 4, 5), (2, None, 3)),
    "4-D": ((4, 5, 3, 4), (2, 2, 1, 2)),
}
KINDS = {
    "plain": lambda shape, ranks, dtype: randn(shape, dtype, 3),
    "deficient": lambda shape, ranks, dtype: known_rank(shape, tuple(r and 1 for r in ranks), dtype, 3),
    "zero": lambda shape, ranks, dtype: torch.zeros(shape, dtype=dtype),
    "one entry": lambda shape, ranks, dtype: torch.zeros(shape, dtype=dtype).index_put_(
        tuple(torch.tensor([1]) for _ in shape), torch.ones(1, dtype=dtype)
    ),
    "tiny": lambda shape, ranks, dtype: randn(shape, dtype, 3) * 1e-15,
    "huge": lambda shape, ranks, dtype: randn(shape, dtype, 3) * 1e15,
    "vanishing": lambda shape, ranks, dtype: randn(shape, dtype, 3) * 1e-27,
    "overflowing": lambda shape, ranks, dtype: randn(shape, dtype, 3) * 1e27,
}
MODES = Modes()
SEARCHERS = pytest.mark.parametrize("finder", FINDERS, ids=str)
EVERY = pytest.mark.parametrize(("finder", "layout"), [*((finder, MODES) for finder in FINDERS), *SAMPLED], ids=str)
SIDED = pytest.mark.parametrize("side", SIDES)
WARM = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)


@EVERY
@SIDED
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_finite_orthonormal_and_of_the_asked_ranks(finder, layout, side, warm, dtype, kind):
    shape, ranks = SIDES[side]
    x = KINDS[kind](shape, ranks, dtype)
    start, frame = search(finder, x, ranks, warm, layout=layout)
    assert type(frame) is type(start) is layout.makes
    assert frame.ranks == ranks
    for d, u in zip(shape, frame.factors, strict=True):
        if u is not None:
            assert u.shape[0] == d
            assert u.dtype is dtype
            assert u.isfinite().all()
            wide = u.to(COMPLEX)
            assert (wide.mH @ wide - torch.eye(u.shape[1])).abs().max() <= 100 * torch.finfo(dtype).eps


@EVERY
@SIDED
@WARM
def test_deterministic_without_the_global_generator_and_without_side_effects(finder, layout, side, warm):
    shape, ranks = SIDES[side]
    x = randn(shape, torch.complex64)
    before, generator = x.clone(), torch.random.get_rng_state()
    start, first = search(finder, x, ranks, warm, layout=layout)
    kept = [None if u is None else u.clone() for u in start.factors]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        again = finder.find(Operand(x), start, warm, memory_of(finder, x, ranks))
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.equal(x, before)
    for u, v, old, new in zip(first.factors, again.factors, kept, start.factors, strict=True):
        if u is not None:
            assert torch.equal(u, v)
            assert torch.equal(old, new)


@EVERY
@SIDED
@WARM
@DTYPES
def test_a_zero_operand_keeps_the_frame(finder, layout, side, warm, dtype):
    shape, ranks = SIDES[side]
    start, frame = search(finder, torch.zeros(shape, dtype=dtype), ranks, warm, layout=layout)
    if finder == RandomProjection() and warm:
        return  # it sees no operand
    for old, new in zip(start.factors, frame.factors, strict=True):
        if old is not None:
            close(new, old, 50 * torch.finfo(dtype).eps)


@SEARCHERS
@SIDED
@DTYPES
@pytest.mark.parametrize("size", [1e-27, 1e-15, 1e15, 1e27])
def test_the_size_of_the_operand_does_not_matter(finder, side, dtype, size):
    """The span is that of the same operand at unit size: no square under- or overflows."""
    shape, ranks = SIDES[side]
    ranks = tuple(r and 1 for r in ranks)
    x = known_rank(shape, ranks, dtype, 4)
    _, scaled = search(finder, x * size, ranks, warm=True, patience=PATIENCE.get(type(finder), 1))
    gap = x - scaled.lift(scaled.project(x))
    assert gap.norm() <= (2e-3 if dtype in (torch.float32, torch.complex64) else 1e-6) * x.norm()


@SEARCHERS
@SIDED
@WARM
@DTYPES
def test_it_finds_the_energy(finder, side, warm, dtype):
    """A strong signal in noise: the frame holds nearly as much as the best frame does, and more than a random one."""
    shape, ranks = SIDES[side]
    signal = known_rank(shape, ranks, dtype, 4)
    x = signal + 0.02 * signal.norm() / signal.numel() ** 0.5 * randn(shape, dtype, 6)
    start, frame = search(finder, x, ranks, warm, patience=PATIENCE.get(type(finder), 1))
    best = random_frame(shape, ranks, dtype, 4)
    assert frame.project(x).norm() >= 0.97 * best.project(x).norm()
    if side != "more than the columns":
        assert frame.project(x).norm() > 1.05 * start.project(x).norm()


@EVERY
@pytest.mark.parametrize("side", [side for side in SIDES if side != "more than the columns"])
@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_an_operand_in_two_terms_is_the_sum(finder, layout, side, dtype):
    """share x + F w, of which finders see contractions only, against the same tensor formed at once."""
    shape, ranks = SIDES[side]
    x, other = randn(shape, dtype, 1), random_frame(shape, ranks, dtype, 8)
    frame = random_frame(shape, ranks, dtype, 2)
    if layout != MODES:
        frame, other = layout.start(x, ranks, None, 2), layout.start(x, ranks, None, 8)
    w = frame.project(randn(shape, dtype, 3)) * 3
    whole = 0.3 * x + frame.lift(w)
    twice = Operand(x, 1.0, frame, 2 * w).measured().mix(0.3, frame, 0.4 * w)
    operands = (Operand(x, 0.3, frame, w), Operand(x).mix(0.3, frame, w), twice)
    for start in (frame, other):  # the warm start is the very frame of the second term
        for operand in operands:
            found = finder.find(operand, start, True, memory_of(finder, whole, ranks))
            expected = finder.find(Operand(whole), start, True, memory_of(finder, whole, ranks))
            for u, v in zip(found.factors, expected.factors, strict=True):
                if u is not None:
                    close(u @ u.mH, v @ v.mH, 1e-8)
        for n, u in enumerate(start.factors):
            if u is not None:
                contracted = [None] * len(shape)
                contracted[n] = u
                z = ModeFrame(tuple(contracted)).project(whole)
                close(operand.contract(n, u), z)
                close(Operand(x, 0.3, frame, w).contract(n, u), z)
                unfolded = whole.movedim(n, 0).flatten(1) @ z.movedim(n, 0).flatten(1).mH
                close(Operand(x, 0.3, frame, w).correlate(n, z), unfolded)
                close(
                    Operand(x, 0.3, frame, w).gram(n),
                    whole.movedim(n, 0).flatten(1) @ whole.movedim(n, 0).flatten(1).mH,
                )
    close(Operand(x, 0.3, frame, w).full(), whole)
    for operand in operands:
        close(operand.norm(), whole.norm())
        for other in (frame, random_frame(shape, ranks, dtype, 8)):
            overlap = None if other is frame else other.overlap(frame)
            if operand.frame is not None or overlap is not None:
                close(operand.project(other, overlap), other.project(whole))
