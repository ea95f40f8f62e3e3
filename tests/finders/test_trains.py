"""Finders of frames at a bond, trains first: exact recovery, energy, degenerate operands, and increments."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bonded import SHAPES, SPECS, energy, known_ranks, matrix, random_frame, stream
from comoving.decompositions import tt_svd
from comoving.finders import Operand
from comoving.finders.bonds import energy_of, extend, prune
from comoving.finders.train import TrainIncrement, TrainRandomized, TrainSVD
from comoving.frames.train import Trains
from comoving.frames.tree import Trees
from contract.support import COMPLEX, REAL, close, randn

FINDERS = [
    TrainSVD(),
    TrainSVD(method="svd"),
    TrainRandomized(),
    TrainRandomized(reads=1, oversampling=3),
    TrainRandomized(oversampling=0),
    TrainIncrement(),
    TrainIncrement(columns=3, add=2),
]
FINDER = pytest.mark.parametrize("finder", FINDERS, ids=str)
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
WARM = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
OPERANDS = {
    "plain": lambda spec, shape, dtype: randn(shape, dtype, 3),
    "deficient": lambda spec, shape, dtype: known_ranks(spec, shape, 1, dtype, 3),
    "zero": lambda spec, shape, dtype: torch.zeros(shape, dtype=dtype),
    "one entry": lambda spec, shape, dtype: torch.zeros(shape, dtype=dtype).index_fill_(0, torch.tensor(0), 1).tril(),
    "constant": lambda spec, shape, dtype: torch.ones(shape, dtype=dtype),
    "repeated spectrum": lambda spec, shape, dtype: (
        torch.eye(shape[0] * shape[1], dtype=dtype)
        .flatten()[: torch.Size(shape).numel()]
        .repeat(100)[: torch.Size(shape).numel()]
        .reshape(shape)
    ),
    "tiny": lambda spec, shape, dtype: randn(shape, dtype, 3) * 1e-27,
    "huge": lambda spec, shape, dtype: randn(shape, dtype, 3) * 1e27,
}


def eps(dtype):
    return torch.finfo(dtype).eps


def bases(frame):
    return list(frame.tensors().values())


def best_energy(x, k, r):
    """What the best two-sided frame of this bond holds: the leading r singular values, as shares."""
    s = torch.linalg.svdvals(x.reshape(int(torch.Size(x.shape[:k]).numel()), -1)) ** 2
    return float(s[:r].sum() / s.sum())


@FINDER
@pytest.mark.parametrize("kind", OPERANDS)
def test_finite_orthonormal_and_of_the_asked_ranks(finder, kind):
    cases = product(("train", "tree, bond 1"), SHAPES[:5], (torch.float32, torch.complex64, COMPLEX), (False, True))
    for name, shape, dtype, warm in cases:
        spec = SPECS[name]
        x, start = OPERANDS[kind](spec, shape, dtype), random_frame(spec, shape, 2, dtype, 8)
        before, kept = x.clone(), [u.clone() for u in bases(start)]
        frame = finder.find(Operand(x), start, warm, {})
        assert frame.ranks == start.ranks
        assert all(u.isfinite().all() and u.is_contiguous() and u.dtype is dtype for u in bases(frame))
        assert [u.shape for u in bases(frame)] == [u.shape for u in kept]
        for side in (frame.left, frame.right):
            b = matrix(side)
            assert (b.mH @ b - torch.eye(side.rank)).abs().max() <= 100 * eps(dtype)
        assert torch.equal(x, before)
        assert all(torch.equal(u, v) for u, v in zip(bases(start), kept, strict=True))
        if kind == "zero":
            assert all(torch.equal(u, v) for u, v in zip(bases(frame), kept, strict=True))


@FINDER
@pytest.mark.parametrize("size", [1e-27, 1.0, 1e27])
def test_a_tensor_of_known_ranks_is_recovered_exactly(finder, size):
    """By an increment too, as long as it may add as many directions as are new."""
    for spec, shape, dtype in product(SPECS.values(), [*SHAPES, (4, 3, 4, 3, 4)], (REAL, COMPLEX)):
        x = known_ranks(spec, shape, 2, dtype, 4) * size
        start = random_frame(spec, shape, 2, dtype, 9)
        for warm in (False,) if finder == TrainIncrement(columns=3, add=2) else (False, True):
            frame = finder.find(Operand(x), start, warm, {})
            assert (frame.lift(frame.project(x)) - x).norm() <= 1e-10 * x.norm()


@FINDER
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("size", [1e-27, 1e-15, 1e15, 1e27])
def test_the_size_of_the_operand_does_not_matter_in_single_precision(finder, dtype, size):
    x = known_ranks(Trains(), (4, 5, 3, 4), 2, dtype, 4)
    frame = random_frame(Trains(), x.shape, 2, dtype, 9)
    for _ in range(3):
        frame = finder.find(Operand(x * size), frame, True, {})
    assert (frame.lift(frame.project(x)) - x).norm() <= 2e-3 * x.norm()


@FINDER
@WARM
def test_deterministic_and_without_the_global_generator(finder, warm):
    shape = (4, 5, 3, 4)
    x, start = randn(shape, torch.complex64), random_frame(Trains(), shape, 3, torch.complex64)
    state = torch.random.get_rng_state()
    first = finder.find(Operand(x), start, warm, {})
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    again = finder.find(Operand(x), start, warm, {})
    assert all(torch.equal(u, v) for u, v in zip(bases(first), bases(again), strict=True))


@FINDER
@EVERY
@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
def test_it_finds_the_energy(finder, spec, dtype):
    """A signal with decaying energies in noise: nearly what the best matrix of this rank holds, from a random start."""
    shape, rank = (6, 5, 4, 6), 3
    signal = known_ranks(spec, shape, rank, dtype, 4)
    x = signal / signal.norm() + 0.2 * randn(shape, dtype, 6) / signal.numel() ** 0.5
    start = random_frame(spec, shape, rank, dtype, 9)
    frame = finder.find(Operand(x), start, False, {})
    for _ in range(2):  # nothing but increments may need it
        frame = finder.find(Operand(x), frame, True, {})
    best = best_energy(x, frame.bond, rank)
    assert energy(frame, x) <= best + 1e-12
    lowest = 0.85 if isinstance(finder, TrainRandomized) else 0.98
    assert energy(frame, x) >= lowest * best
    assert energy(start, x) < 0.3 * best


@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
def test_a_matrix_has_its_singular_vectors(method, dtype):
    for shape in ((7, 9), (9, 7)):
        x = randn(shape, dtype)
        frame = TrainSVD(method=method).find(Operand(x), random_frame(Trains(), shape, 3, dtype), False, {})
        svd = torch.linalg.svd(x, full_matrices=False)
        for side, vectors in ((frame.left, svd.U), (frame.right, svd.Vh.mT)):
            close(side.basis @ side.basis.mH, vectors[:, :3] @ vectors[:, :3].mH)


@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
def test_the_first_interface_of_a_train_is_that_of_tt_svd(method, dtype):
    """Of the tensor where the left is the first side, and of the one with its modes reversed where the right is."""
    for shape, bond in (((4, 3, 2, 5), 3), ((5, 2, 3, 4), 1)):
        x = randn(shape, dtype)
        start = random_frame(Trains(bond=bond), shape, (3, 4, 4) if bond == 3 else (4, 4, 3), dtype)
        frame = TrainSVD(method=method).find(Operand(x), start, False, {})
        assert start.left_first == (bond == 3)
        first = frame.left if bond == 3 else frame.right
        cores = tt_svd(x if bond == 3 else x.permute(3, 2, 1, 0), (3, 4, 4))[:3]
        b = torch.einsum("zia,ajb,bkc->ijkc" if bond == 3 else "zia,ajb,bkc->kjic", *cores).reshape(24, 4)
        close(matrix(first) @ matrix(first).mH, (b @ b.mH).to(COMPLEX), 1e-9)


def test_the_svd_sees_small_singular_values():
    """1, 1e-10 and six times half of that: the squares of all but the first are lost in the Gram matrix."""
    singular, kept = torch.tensor([1.0, 1e-10, *[0.5e-10] * 6], dtype=REAL), {"gram": [], "svd": []}
    for seed in range(5):
        u, v = random_frame(Trains(), (20, 24), 8, REAL, seed).tensors().values()
        x, start = (u * singular) @ v.mT, random_frame(Trains(), (20, 24), 2, REAL, 9)
        for method, found in kept.items():
            basis = TrainSVD(method=method).find(Operand(x), start, False, {}).left.basis
            found.append(float((basis.mT @ u[:, 1]).norm()))
    assert min(kept["svd"]) > 0.999
    assert min(kept["gram"]) < 0.95


def test_two_reads_hold_more_than_one():
    one, two = [], []
    for seed in range(5):
        x = randn((6, 5, 4, 6), seed=seed)
        start = random_frame(Trains(), x.shape, 4)
        one.append(energy(TrainRandomized(reads=1, seed=seed).find(Operand(x), start, False, {}), x))
        two.append(energy(TrainRandomized(reads=2, seed=seed).find(Operand(x), start, False, {}), x))
    assert sum(one) < 0.9 * sum(two)


def test_the_seed_of_a_sketch_counts():
    x, start = randn((8, 9, 8, 9)), random_frame(Trains(), (8, 9, 8, 9), 2)
    for kind, warm in ((TrainRandomized, False), (TrainIncrement, True)):
        frames = [kind(seed=seed).find(Operand(x), start, warm, {}) for seed in (0, 1)]
        assert not torch.equal(bases(frames[0])[0], bases(frames[1])[0])


@FINDER
def test_an_operand_in_two_terms_is_the_sum(finder):
    x, start = randn((4, 5, 3, 4), COMPLEX), random_frame(Trains(), (4, 5, 3, 4), 2, COMPLEX)
    half = finder.find(Operand(x, share=0.25), start, True, {})
    whole = finder.find(Operand(x * 0.25), start, True, {})
    for u, v in zip(bases(half), bases(whole), strict=True):
        close(u, v)


def grown(spec, shape, rank, dtype, add, seed=0):
    frame = random_frame(spec, shape, rank, dtype, seed)
    x = randn(shape, dtype, seed + 1).reshape(1, frame.left.size, -1)
    return frame, x, *extend(frame.left, x, add)


@EVERY
@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
@pytest.mark.parametrize("add", [None, 1, 2, 100])
def test_extending_keeps_the_old_directions_first(spec, dtype, add):
    for shape in ((6, 7, 5, 3), (3, 4, 2, 3, 5, 2)):
        frame, x, wider, y = grown(spec, shape, 2, dtype, add)
        old, new = matrix(frame.left), matrix(wider)
        close(new.mH @ new, torch.eye(wider.rank, dtype=COMPLEX), 1e-12)
        close(new[:, : old.shape[1]], old, 1e-12)
        close(y[0].to(COMPLEX), new.mH @ x[0].to(COMPLEX), 1e-11)
        for a, b in zip(wider.edges(), frame.left.edges(), strict=True):
            assert b.rank <= a.rank <= b.rank + (b.rank if add is None else add)
        if frame.left.basis is not None:
            assert wider.rank > frame.left.rank  # there is always something to add here


@EVERY
def test_extending_by_enough_takes_in_the_data(spec):
    shape = (3, 4, 2, 5)
    frame = random_frame(spec, shape, 1, COMPLEX)
    x = known_ranks(spec, shape, 2, COMPLEX, 5).reshape(1, frame.left.size, -1)
    wider, _ = extend(frame.left, x, 2)
    b = matrix(wider)
    close(b @ (b.mH @ x[0]), x[0], 1e-11)
    b = matrix(frame.left)
    assert (b @ (b.mH @ x[0]) - x[0]).norm() > 0.1 * x.norm()


@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
def test_what_is_taken_in_is_the_residual_not_the_strongest(dtype):
    """Of two new directions the stronger one, though the weaker one goes with what the old ones hold."""
    frame = random_frame(Trains(), (9, 8), 3, dtype, 1)
    b = frame.left.basis
    new = randn((9, 2), dtype, 2)
    new = torch.linalg.qr(new - b @ (b.mH @ new)).Q
    rows = torch.linalg.qr(randn((8, 4), dtype, 3)).Q.mH
    x = 100 * b @ rows[:3] + new @ torch.stack([rows[3], 0.3 * rows[:3].sum(0)])
    wider, _ = extend(frame.left, x.unsqueeze(0), 1)
    assert wider.rank == 4
    assert (wider.basis.mH @ new[:, 0]).norm() > 0.999


@EVERY
@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
def test_pruning_drops_what_has_no_energy(spec, dtype):
    """Data of rank 2 in an interface of rank up to 4 are still in it at rank 2."""
    for shape in ((6, 7, 5, 4), (3, 4, 2, 3, 5, 2)):
        inner = random_frame(spec, shape, 2, dtype, 3)
        x = inner.lift(randn((inner.left.rank, inner.right.rank), dtype, 4)).reshape(1, inner.left.size, -1)
        wider, y = extend(random_frame(spec, shape, 2, dtype, 5).left, x, 2)
        less, turn = prune(wider, tuple(edge.rank for edge in inner.left.edges()), energy_of(y))
        assert [edge.rank for edge in less.edges()] == [edge.rank for edge in inner.left.edges()]
        b = matrix(less)
        close(b.mH @ b, torch.eye(less.rank, dtype=COMPLEX), 1e-12)
        close(b @ (b.mH @ x[0].to(COMPLEX)), x[0].to(COMPLEX), 1e-9)
        if turn is not None:
            close(turn.to(COMPLEX), b.mH @ matrix(wider), 1e-11)


@pytest.mark.parametrize("mirrored", [False, True])
def test_pruning_without_energy_keeps_the_first_directions(mirrored):
    frame = random_frame(Trains(), (5, 6, 6, 5), 4, REAL, 1)
    side = frame.right if mirrored else frame.left
    less, _ = prune(side, (4, 2), torch.zeros(4, 4, dtype=REAL), mirrored)
    assert [edge.rank for edge in less.edges(mirrored)] == [4, 2]
    first = matrix(side)[:, :2]
    close(matrix(less) @ matrix(less).mH, first @ first.mH, 1e-9)


def test_ranks_can_differ_along_an_interface_when_pruned():
    frame = random_frame(Trees(bond=4), (4, 5, 3, 4, 30), (4, 4, 6, 3, 4, 5, 8), REAL, 1)
    ranks = (2, 3, 4, 3, 2, 3, 5)
    less, _ = prune(frame.left, ranks, torch.eye(8, dtype=REAL))
    assert tuple(edge.rank for edge in less.edges()) == ranks
    assert float(less.defect()) < 1e-12


@given(st.integers(0, 10**6), st.sampled_from([(5, 4), (4, 3, 5), (3, 4, 2, 5), (4, 1, 3, 2, 3)]), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_an_increment_never_leaves_the_best_behind(seed, shape, rank):
    """The first side keeps all that the old one held: energies are exact, so pruning can only gain on one edge."""
    spec = Trains(bond=1)  # a single edge on the left, so that pruning is optimal there
    start = random_frame(spec, shape, rank, REAL, seed)
    x = randn(shape, REAL, seed + 1)
    frame = TrainIncrement(columns=3).find(Operand(x), start, True, {})
    rows, old, new = x.reshape(shape[0], -1), matrix(start.left).real, matrix(frame.left).real
    if start.left_first or start.right.basis is None:
        assert (new.mT @ rows).norm() >= (old.mT @ rows).norm() * (1 - 1e-9)
    assert energy(frame, x) >= energy(start, x) * (1 - 1e-9)


@pytest.mark.parametrize("kind", ["train", "tree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_increments_track_a_subspace_that_turns(kind, dtype):
    spec, shape = SPECS[kind], (8, 6, 6, 8)
    source = random_frame(spec, shape, 3, dtype, 1)
    frame = start = TrainSVD().find(
        Operand(next(stream(source, 1, 0, 0.3))), random_frame(spec, shape, 3, dtype), False, {}
    )
    own, best, stale = [], [], []
    for x in stream(source, 40, 0.15, 0.3, seed=2):
        frame = TrainIncrement().find(Operand(x), frame, True, {})
        own.append(energy(frame, x))
        best.append(energy(TrainSVD().find(Operand(x), frame, True, {}), x))
        stale.append(energy(start, x))
    assert sum(own) >= 0.95 * sum(best)
    assert sum(stale[-20:]) < 0.5 * sum(best[-20:])  # so there was something to track


def test_a_direction_new_on_both_sides_is_seen():
    """u v^T with u and v outside both interfaces: only the sketch can see it."""
    spec, shape = Trains(), (36, 36)
    old, new = random_frame(spec, shape, 2, REAL, 1), random_frame(spec, shape, 1, REAL, 2)
    u, v = (matrix(side).real[:, :1] for side in (new.left, new.right))
    for b, side in ((matrix(old.left).real, "left"), (matrix(old.right).real, "right")):
        if side == "left":
            u = u - b @ (b.mT @ u)
        else:
            v = v - b @ (b.mT @ v)
    x = (u / u.norm() @ (v / v.norm()).mT).reshape(shape)
    assert energy(old, x) < 1e-20
    x = x + old.lift(torch.diag(torch.tensor([2.0, 0.0], dtype=REAL)))
    assert energy(TrainIncrement().find(Operand(x), old, True, {}), x) > 0.999
    assert energy(old, x) < 0.81


def test_the_defect_stays_small_over_a_thousand_increments():
    shape, spec = (3, 3, 3), Trains()
    frame = random_frame(spec, shape, 2, torch.float32)
    generator = torch.Generator().manual_seed(0)
    finder = TrainIncrement(columns=2, add=1)
    gradients = torch.randn((1_000, *shape), generator=generator)
    first = frame
    for x in gradients:
        frame = finder.find(Operand(x), frame, True, {})
    worst = max(float((b.mH @ b - torch.eye(2)).abs().max()) for b in (matrix(frame.left), matrix(frame.right)))
    assert worst < 1e-6
    assert not torch.equal(bases(frame)[0], bases(first)[0])


def test_an_increment_costs_a_fraction_of_a_decomposition():
    """Counted, not timed: multiplications of one increment against those of TT-SVD, at a rank that matters."""
    shape, rank = (32, 32, 32, 32), 16
    start = random_frame(Trains(), shape, rank, torch.float32)
    x = randn(shape, torch.float32)
    counts = []
    for finder in (TrainSVD(), TrainIncrement()):
        with FlopCounterMode(display=False) as counter:
            finder.find(Operand(x), start, True, {})
        counts.append(counter.get_total_flops())
    reads = counts[1] / (2 * rank * x.numel())
    assert reads < 5
    assert counts[1] < 0.25 * counts[0]


def test_where_the_operand_reaches_nothing_the_old_directions_stay():
    """A rank-one operand leaves the rest of the interfaces to what they held."""
    spec, shape = Trains(), (6, 6, 6)
    start = random_frame(spec, shape, 3, REAL, 1)
    x = random_frame(spec, shape, 1, REAL, 2).lift(torch.ones(1, 1, dtype=REAL))
    frame = TrainIncrement().find(Operand(x), start, True, {})
    assert energy(frame, x) > 1 - 1e-10
    old, new = matrix(start.left), matrix(frame.left)
    assert torch.linalg.svdvals(new.mH @ old)[1] > 0.99  # two of three, at least


@pytest.mark.parametrize(
    ("kind", "field", "value", "interval"),
    [
        (TrainSVD, "inertia", 1.0, r"\[0, 1\)"),
        (TrainSVD, "method", "qr", "'gram', 'svd'"),
        (TrainRandomized, "inertia", -0.1, r"\[0, 1\)"),
        (TrainRandomized, "oversampling", -1, ">= 0"),
        (TrainRandomized, "reads", 3, "1, 2"),
        (TrainRandomized, "seed", -1, ">= 0"),
        (TrainIncrement, "inertia", 2.0, r"\[0, 1\)"),
        (TrainIncrement, "columns", 0, ">= 1"),
        (TrainIncrement, "add", 0, ">= 1"),
        (TrainIncrement, "seed", -2, ">= 0"),
    ],
)
def test_a_value_outside_its_interval_is_named_with_it(kind, field, value, interval):
    with pytest.raises(ValueError, match=f"{field} must .*{interval}.*{str(value).replace('.', '[.]')}"):
        kind(**{field: value})
