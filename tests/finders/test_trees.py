"""Finders of hierarchical Tucker frames."""

import pytest
import torch

from bonded import SHAPES, energy, known_ranks, matrix, random_frame, stream
from comoving.finders import Operand
from comoving.finders.train import TrainSVD
from comoving.finders.tree import TreeIncrement, TreeSVD
from comoving.frames.tree import Trees
from contract.support import COMPLEX, REAL, close, randn

TREES = {
    "balanced": (Trees(), (3, 4, 3, 4, 3)),
    "given": (Trees(tree=((0, (1, 2)), (3, 4))), (3, 4, 3, 4, 3)),
    "caterpillar": (Trees(tree=((((0, 1), 2), 3), 4)), (3, 3, 2, 3, 8)),
    "deep": (Trees(), (2, 3, 2, 3, 2, 3, 2, 2)),
}
TREE = pytest.mark.parametrize("tree", TREES)
DTYPES = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)


@pytest.mark.parametrize("finder", [TreeSVD(), TreeSVD(method="svd"), TreeIncrement()], ids=str)
@TREE
@DTYPES
def test_a_tensor_of_known_ranks_is_recovered_exactly(finder, tree, dtype):
    spec, shape = TREES[tree]
    for rank in (1, 2, 3):
        x = known_ranks(spec, shape, rank, dtype, 4)
        frame = finder.find(Operand(x), random_frame(spec, shape, rank, dtype, 9), True, {})
        assert frame.ranks == spec.ranks(shape, rank)
        assert float(frame.defect()) < 1e-12
        assert (frame.lift(frame.project(x)) - x).norm() <= 1e-10 * x.norm()


@DTYPES
def test_leaves_hold_the_leading_vectors_of_their_unfoldings(dtype):
    """The first leaf exactly those of the data, as in the textbook."""
    spec, x = Trees(), randn((5, 4, 3, 4), dtype)
    start = random_frame(spec, x.shape, 2, dtype)
    frame = TreeSVD().find(Operand(x), start, False, {})
    leaf = next(iter(frame.left.edges())) if start.left_first else frame.right.children[1]
    mode = 0 if start.left_first else 3
    u = torch.linalg.svd(x.movedim(mode, 0).flatten(1), full_matrices=False).U[:, :2]
    close(leaf.basis @ leaf.basis.mH, u @ u.mH)


@TREE
def test_the_error_is_within_the_bound_of_the_truncation(tree):
    """Grasedyck's bound: the squared error is at most the sum over all edges of the tails of their unfoldings."""
    spec, shape = TREES[tree]
    for seed in range(3):
        x = known_ranks(spec, shape, 2, REAL, seed) + 0.3 * randn(shape, REAL, seed)
        frame = TreeSVD().find(Operand(x), random_frame(spec, shape, 2), False, {})
        error = float((x - frame.lift(frame.project(x))).norm() ** 2)
        tails, best = 0.0, 0.0
        for side, first in ((frame.left, 0), (frame.right, frame.bond)):
            for edge, (begin, end) in zip(side.edges(), spans(side, first), strict=True):
                order = [*range(begin, end), *(n for n in range(len(shape)) if not begin <= n < end)]
                s = torch.linalg.svdvals(x.permute(order).reshape(edge.size, -1))
                tail = float((s[edge.rank :] ** 2).sum())
                tails, best = tails + tail, max(best, tail)
        assert best * (1 - 1e-9) <= error <= tails
        assert best > 0


def spans(side, first):
    """The modes of each edge in the order of its edges."""
    if side.children:
        left, right = side.children
        yield from spans(left, first)
        yield from spans(right, first + len(left.sizes))
    yield first, first + len(side.sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_degenerate_operands_give_orthonormal_frames(dtype):
    for shape in SHAPES:
        start = random_frame(Trees(), shape, 2, dtype, 1)
        rank_one = known_ranks(Trees(), shape, 1, dtype)
        for x in (torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype), rank_one, rank_one * 1e27):
            for finder in (TreeSVD(), TreeIncrement()):
                frame = finder.find(Operand(x), start, True, {})
                assert frame.ranks == start.ranks
                for side in (frame.left, frame.right):
                    b = matrix(side)
                    assert (b.mH @ b - torch.eye(side.rank)).abs().max() < 2e-5


def test_increments_follow_a_stream_that_turns():
    spec, shape = Trees(), (6, 5, 5, 6)
    source = random_frame(spec, shape, 3, torch.float32, 1)
    frame = random_frame(spec, shape, 3, torch.float32)
    own, best = 0.0, 0.0
    for t, x in enumerate(stream(source, 40, 0.1, 0.5, seed=4)):
        frame = TreeIncrement().find(Operand(x), frame, t > 0, {})
        if t >= 5:
            own += energy(frame, x)
            best += energy(TreeSVD().find(Operand(x), frame, True, {}), x)
    assert own >= 0.95 * best
    assert best < 35 * 0.95  # the noise is there


def test_on_a_caterpillar_it_is_the_train_of_its_leaves():
    """A tree finder is the train's procedure on another tree: on the same frame, the same result."""
    x, start = randn((3, 4, 3, 4, 3)), random_frame(Trees(), (3, 4, 3, 4, 3), 2)
    a, b = TreeSVD().find(Operand(x), start, False, {}), TrainSVD().find(Operand(x), start, False, {})
    assert all(torch.equal(u, v) for u, v in zip(a.tensors().values(), b.tensors().values(), strict=True))
    assert TreeSVD() != TrainSVD()


@pytest.mark.parametrize("kind", [TreeSVD, TreeIncrement])
def test_momentum_is_validated(kind):
    with pytest.raises(ValueError, match=r"inertia must lie in \[0, 1\), got 1.0"):
        kind(inertia=1.0)
    assert kind(inertia=0.5).inertia == 0.5
