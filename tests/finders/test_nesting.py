"""Finders inside another and in blocks, under each cadence: what is accepted steps, and goes on from a file."""

import io

import pytest
import torch

from comoving import LowRankOptimizer
from comoving.cadence import Every, Growing, Lazy
from comoving.finders import (
    Amortized,
    BlockSelection,
    Correlation,
    CosineSelection,
    Exact,
    Grassmann,
    IncrementalSVD,
    Nystroem,
    Oja,
    Power,
    Randomized,
    RandomProjection,
    RandomWalk,
    StreamingTucker,
    TrainSVD,
    TreeSVD,
)
from comoving.frames import Blocks, Cosines, Modes, Seeded, SparseModes, Trains, Trees

BASE = [
    Exact(), Power(), Oja(), Nystroem(), Randomized(), IncrementalSVD(), Correlation(), Amortized(),
    Exact(sweeps=1, sequential=True, warm=True), Randomized(sequential=True), Nystroem(columns="slices"),
    StreamingTucker(), Grassmann(), RandomWalk(),
]  # fmt: skip
ELSEWHERE = [CosineSelection(), RandomProjection(), TrainSVD(), TreeSVD(), BlockSelection(), Exact, None, 3]
RARER = [Lazy(patience=1, threshold=0.0), Growing(base=2.0)]


def steps_and_resumes(frame, finder, shape, cadence=Every()):  # noqa: B008  (frozen)
    def new(start):
        p = torch.nn.Parameter(start)
        return p, LowRankOptimizer([p], 1e-2, 3, frame=frame, finder=finder, cadence=cadence, refresh_every=1)

    def run(p, optimizer, steps):
        for t in steps:
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()

    p, optimizer = new(torch.randn(shape, generator=torch.Generator().manual_seed(99)))
    assert optimizer.sites[p].projected
    run(p, optimizer, range(6))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q, again = new(p.detach().clone())
    again.load_state_dict(torch.load(file, weights_only=True))
    refreshes = []
    optimizer.refresh_scope = lambda: refreshes.append(0) or torch.no_grad()
    run(p, optimizer, range(6, 12))
    run(q, again, range(6, 12))
    assert p.isfinite().all()
    assert torch.equal(p, q)
    return len(refreshes)


@pytest.mark.parametrize("inner", BASE, ids=lambda f: type(f).__name__)
def test_every_mode_wise_finder_may_stand_inside_another(inner):
    steps_and_resumes(SparseModes(), BlockSelection(inner), (6, 7, 8))


@pytest.mark.parametrize("cadence", RARER, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("finder", BASE, ids=lambda f: type(f).__name__)
def test_every_mode_wise_finder_under_rarer_refreshes(finder, cadence):
    assert steps_and_resumes(Modes(), finder, (6, 7, 8), cadence) < 6 == steps_and_resumes(Modes(), finder, (6, 7, 8))


@pytest.mark.parametrize("cadence", RARER, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("blocks", [False, True])
def test_blocks_of_a_core_are_selected_when_the_cadence_says(cadence, blocks):
    frame, shape = (Blocks(inner=SparseModes()), (2, 6, 7, 8)) if blocks else (SparseModes(), (6, 7, 8))
    one = 2 if blocks else 1
    assert steps_and_resumes(frame, BlockSelection(), shape, cadence) < 6 * one
    assert steps_and_resumes(frame, BlockSelection(), shape) == 6 * one


@pytest.mark.parametrize(
    ("frame", "finder"),
    [(Cosines(), CosineSelection()), (Seeded(), RandomProjection()), (Trains(), TrainSVD()), (Trees(), TreeSVD())],
    ids=lambda x: type(x).__name__,
)
def test_frames_that_cannot_be_compared_are_refused_by_a_cadence_that_compares(frame, finder):
    made = type(frame).makes.__name__
    for layout, shape in ((frame, (6, 7, 8)), (Blocks(inner=frame), (2, 6, 7, 8))):
        with pytest.raises(TypeError, match=rf"cadence Lazy\(.*compares a ModeFrame or SparseFrame, .* is a {made}"):
            steps_and_resumes(layout, finder, shape, Lazy())
        assert steps_and_resumes(layout, finder, shape, Growing(base=2.0)) < 6 * (2 if layout is not frame else 1)


@pytest.mark.parametrize("inner", ELSEWHERE, ids=str)
def test_other_finders_are_no_inner_ones(inner):
    with pytest.raises(ValueError, match="inner must be a finder that fills a ModeFrame"):
        BlockSelection(inner=inner)


@pytest.mark.parametrize(
    ("inner", "finder"),
    [(Modes(), f) for f in BASE]
    + [(Cosines(), CosineSelection()), (Seeded(), RandomProjection()), (Trains(), TrainSVD()), (Trees(), TreeSVD())],
    ids=lambda x: type(x).__name__,
)
def test_every_layout_with_every_finder_may_stand_inside_blocks(inner, finder):
    steps_and_resumes(Blocks(1, inner), finder, (10, 2, 12))


@pytest.mark.parametrize("inner", [3, Modes, None, "modes", Blocks(), Exact()], ids=str)
def test_blocks_need_a_layout_inside(inner):
    with pytest.raises(ValueError if isinstance(inner, Blocks) else TypeError, match="inner must be a layout"):
        Blocks(inner=inner)
