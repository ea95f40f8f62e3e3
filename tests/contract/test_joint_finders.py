"""Processes that have an operand together find the frame that one process finds which has all of it."""

from math import prod

import pytest
import torch

from comoving.finders import (
    Amortized,
    CosineSelection,
    Delayed,
    Exact,
    Grassmann,
    IncrementalSVD,
    Oja,
    Operand,
    Power,
    Randomized,
    RandomProjection,
    RandomWalk,
    Standing,
)
from comoving.frames import Cosines, Modes, Pooled, Seeded, SharedFrame
from contract.support import BOND_FINDERS, COMPLEX, REAL, SUBSPACES, close, core_of, memory_of, randn, random_frame
from contract.threads import Mean, Split, Table

JOINT = [
    (Power(), Modes()),
    (Power(inertia=0.0, iterations=2, exact_up_to=5), Modes()),
    (Power(start="exact"), Modes()),
    (Exact(), Modes()),
    (Exact(sweeps=2, sequential=True), Modes()),
    (Oja(rate=0.3), Modes()),
    (Grassmann(), Modes()),
    (Grassmann(rate=0.01), Modes()),
    (RandomWalk(), Modes()),
    (Amortized(iterations=2), Modes()),
    (Randomized(reads=2), Modes()),
    (Randomized(reads=3, oversampling=1), Modes()),
    (Randomized(sequential=True), Modes()),
    (IncrementalSVD(add=2), Modes()),
    (Delayed(Exact()), Modes()),
    (CosineSelection(), Cosines()),
    (RandomProjection(), Seeded()),
    (Standing(), Pooled()),
]
CASES = {
    "matrix": ((7, 12), (None, 3), 0),
    "second mode": ((7, 12), (3, None), 1),
    "tensor": ((6, 5, 9), (None, 3, 4), 0),
    "middle": ((5, 6, 9), (3, None, None), 1),
    "compressed": ((12, 7), (3, None), 0),
    "compressed last": ((5, 6, 9), (None, 2, 4), 2),
    "all": ((6, 5, 9), (3, 2, 4), 1),
}
DTYPES = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])


def lifted(frame, shape, ranks, dtype):
    """The frame as one matrix on flattened tensors."""
    core = core_of(shape, ranks)
    return torch.stack([frame.lift(z.view(core)).flatten() for z in torch.eye(prod(core), dtype=dtype)], 1)


@pytest.mark.parametrize(("finder", "layout"), JOINT, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shared", ["mean", "split"])
@DTYPES
@pytest.mark.parametrize("count", [2, 3])
def test_a_frame_is_found_together(finder, layout, case, shared, dtype, count):
    """In two refreshes, from a second term too; of parts that are not even, and of none."""
    shape, ranks, mode = CASES[case]
    start = layout.start(randn(shape, dtype), ranks, None, 7)
    sizes = [shape[mode], 0] if count == 2 else [3, 1, shape[mode] - 4]
    table, second = Table(count), random_frame(shape, ranks, dtype, 5)
    terms = [(randn(shape, dtype, 10 + r), randn(core_of(shape, ranks), dtype, 20 + r)) for r in range(count)]
    if shared == "mean":
        whole = Operand(sum(x for x, _ in terms) / count, 0.3, second, sum(w for _, w in terms) / count)
        own = [Operand(x, 0.3, second, w, comm=Mean(table, r)) for r, (x, w) in enumerate(terms)]
    else:
        x, w = terms[0]
        comms = [Split(table, r, mode, sizes) for r in range(count)]
        whole = Operand(x, 0.3, second, w)
        if ranks[mode] is None:
            own = [Operand(comm.here(x, mode), 0.3, second, comm.here(w, mode), comm=comm) for comm in comms]
        else:
            frames = [SharedFrame(second.factors, comm) for comm in comms]
            own = [Operand(comm.here(x, mode), 0.3, f, w, comm=comm) for f, comm in zip(frames, comms, strict=True)]

    def found(operand):
        memory, frame = memory_of(finder, whole.dense, ranks), start
        for refresh in range(2):
            frame = finder.find(operand, frame, refresh > 0, memory)
        return frame

    basis, *bases = (
        lifted(frame, shape, ranks, dtype) for frame in (found(whole), *table.run(lambda r: found(own[r])))
    )
    for other in bases:
        assert torch.equal(other, bases[0])
        close(other @ other.mH, basis @ basis.mH, 1e-7)


def test_the_finders_above_are_all_that_can():
    assert {type(finder) for finder, _ in JOINT} == {
        type(finder) for finder, _ in SUBSPACES if finder.joint and finder not in BOND_FINDERS
    }


def test_power_iteration_sends_no_gradient():
    """Two products for each iteration: with n x r and m x r numbers, and the size of one."""
    table, (m, n, r) = Table(2), (40, 50, 3)
    start = Modes().start(torch.zeros(m, n, dtype=REAL), (None, r), None, 0)
    table.run(lambda rank: Power().find(Operand(randn((m, n)), comm=Mean(table, rank)), start, True, {}))
    assert table.sent == r * (m + n) + 1
