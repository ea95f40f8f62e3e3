"""A frame of a tensor of which each process has some entries projects and lifts as that of the whole tensor."""

import pytest
import torch

from comoving.frames import ModeFrame, SharedFrame
from contract.support import COMPLEX, REAL, close, core_of, randn, random_frame
from contract.threads import Split, Table

CASES = {
    "matrix": ((12, 7), (3, None), 0),
    "last": ((5, 6, 9), (None, 2, 4), 2),
    "middle": ((6, 5, 9, 4), (3, 4, 5, None), 1),
    "whole there": ((6, 5, 9), (3, None, 4), 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
@pytest.mark.parametrize("rows", [0, 2])
def test_processes_project_and_lift_what_is_here(case, dtype, rows):
    """By processes with few entries, none, and all others."""
    shape, ranks, mode = CASES[case]
    frames = [random_frame(shape, ranks, dtype, seed) for seed in range(rows or 1)]
    frame, lead = ModeFrame.stack(frames) if rows else frames[0], (rows,) if rows else ()
    x, z = randn((*lead, *shape), dtype, 1), randn((*lead, *core_of(shape, ranks)), dtype, 2)
    table, dim = Table(3), mode - len(shape)
    comms = [Split(table, r, mode, [1, 0, shape[mode] - 1]) for r in range(3)]

    def work(rank):
        comm = comms[rank]
        own = SharedFrame(frame.factors, comm)
        if rows:
            own = SharedFrame.stack([SharedFrame(one.factors, comm) for one in frames])
        out = comm.here(x, dim).clone()
        return own.project(comm.here(x, dim)), own.lift(z), own.add_lift(out, z, -0.5, 0.9)

    for comm, (core, lifted, added) in zip(comms, table.run(work), strict=True):
        close(core, frame.project(x), 1e-12)
        close(lifted, comm.here(frame.lift(z), dim), 1e-12)
        close(added, comm.here(0.9 * x - 0.5 * frame.lift(z), dim), 1e-12)


def test_what_processes_have_is_known_by_all():
    shape, ranks = (12, 7), (3, None)
    older, newer = (random_frame(shape, ranks, REAL, seed) for seed in range(2))
    a, b = (SharedFrame(f.factors, Split(Table(1), 0, 0, [12])) for f in (older, newer))
    assert torch.equal(b.overlap(a).matrices[0], newer.overlap(older).matrices[0])
    assert torch.equal(b.defect(), newer.defect()) and b.ranks == ranks
