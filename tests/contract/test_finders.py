"""What finders of mode-wise frames promise beyond the contract of subspaces: any size, operands in two terms."""

import pytest
import torch

from comoving.finders import Operand
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
MODES = Modes()
SEARCHERS = pytest.mark.parametrize("finder", FINDERS, ids=str)
EVERY = pytest.mark.parametrize(("finder", "layout"), [*((finder, MODES) for finder in FINDERS), *SAMPLED], ids=str)
SIDED = pytest.mark.parametrize("side", SIDES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)


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
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("size", [1e-27, 1e27])
def test_it_is_orthonormal_where_squares_leave_the_range(finder, warm, dtype, size):
    for shape, ranks in SIDES.values():
        _, frame = search(finder, randn(shape, dtype, 3) * size, ranks, warm)
        assert frame.ranks == ranks
        assert frame.defect() <= 100 * torch.finfo(dtype).eps


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
