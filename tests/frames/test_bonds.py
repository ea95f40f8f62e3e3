"""Frames at a bond against their explicit bases, their ranks and what they store."""

from dataclasses import FrozenInstanceError
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bonded import SHAPES, SPECS, explicit, matrix, random_frame
from comoving.clock import Clock
from comoving.frames import Overlap
from comoving.frames.bond import BondFrame
from comoving.frames.interface import Interface
from comoving.frames.train import Trains
from comoving.frames.tree import Trees
from comoving.slots import Kind, Slot
from comoving.transport import Carry, Rotate
from contract.support import COMPLEX, REAL, close, randn

EVERY = pytest.mark.parametrize("layout", SPECS.values(), ids=SPECS)
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, REAL, torch.complex64, COMPLEX], ids=str)
RULE = (Slot("m", Kind.LINEAR), Slot("v", Kind.VARIANCE, mean="m"))


def tolerance(dtype):
    return 1e-11 if dtype in (REAL, COMPLEX) else 2e-5


@EVERY
@SHAPED
@DTYPES
@pytest.mark.parametrize("rank", [1, 2, 3, 100])
def test_it_is_its_explicit_basis(layout, shape, dtype, rank):
    frame, older = random_frame(layout, shape, rank, dtype, 1), random_frame(layout, shape, 2, dtype, 2)
    basis, eps = explicit(frame), tolerance(dtype)
    core = (frame.left.rank, frame.right.rank)
    close(basis.mH @ basis, torch.eye(basis.shape[1], dtype=COMPLEX), eps)
    x, z, wide = randn(shape, dtype, 3), randn(core, dtype, 4), COMPLEX if dtype.is_complex else REAL

    def same(a, b):
        b = b if dtype.is_complex else b.real
        assert a.dtype is dtype
        close(a.to(wide).flatten(), b.flatten(), eps)

    assert frame.project(x).shape == core
    assert frame.lift(z).shape == shape
    same(frame.project(x), basis.mH @ x.to(COMPLEX).flatten())
    lifted = basis @ z.to(COMPLEX).flatten()
    same(frame.lift(z), lifted)
    for out in (x.clone(), x.clone().transpose(0, 1).contiguous().transpose(0, 1)):
        assert frame.add_lift(out, z, -0.7, 0.3) is out
        same(out, 0.3 * x.to(COMPLEX).flatten() - 0.7 * lifted)
    sides = (frame.left, frame.right), (older.left, older.right)
    for new, old, r in zip(*sides, frame.overlap(older).matrices, strict=True):
        if r is None:
            assert new.basis is old.basis is None
        else:
            same(r, matrix(new).mH @ matrix(old))


@EVERY
@SHAPED
def test_projection_undoes_the_lift_on_views_too(layout, shape):
    frame = random_frame(layout, shape, 2, COMPLEX)
    z = randn((frame.left.rank, frame.right.rank), COMPLEX, 1)
    strided = frame.lift(z).movedim(0, -1).contiguous().movedim(-1, 0)
    close(frame.project(strided), z)


@EVERY
@SHAPED
@pytest.mark.parametrize("dtype", [torch.float32, COMPLEX])
def test_the_defect_is_that_of_the_explicit_bases(layout, shape, dtype):
    frame = random_frame(layout, shape, 2, dtype)
    assert frame.tensors()
    assert frame.defect() <= 20 * torch.finfo(dtype).eps
    bent = BondFrame(
        *(
            side.rebuild([u.basis if u.basis is None else u.basis * 1.1 for u in side.edges()])
            for side in (frame.left, frame.right)
        )
    )
    defects = [float((b.mH @ b - torch.eye(b.shape[1])).abs().max()) for b in (matrix(bent.left), matrix(bent.right))]
    assert max(defects) > 0.2
    assert float(bent.defect()) == pytest.approx(max(defects), rel=1e-5)


@EVERY
@SHAPED
@DTYPES
@pytest.mark.parametrize("rank", [1, 2, 3, 100, 0.2])
def test_state_and_parts(layout, shape, dtype, rank):
    ranks = layout.ranks(shape, rank)
    frame = random_frame(layout, shape, rank, dtype)
    assert frame.ranks == ranks
    assert layout.core_shape(shape, ranks) == (frame.left.rank, frame.right.rank)
    state = frame.tensors()
    assert {name: (tuple(u.shape), u.dtype) for name, u in state.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in layout.schema(shape, ranks, dtype).items()
    }
    assert all(name.startswith("frame.") for name in state)
    assert all(u.is_contiguous() for u in state.values())
    again = layout.load({**state, "moment.first": torch.zeros(3)}, shape)
    assert again.ranks == ranks
    z = randn(layout.core_shape(shape, ranks), dtype, 1)
    assert torch.equal(again.lift(z), frame.lift(z))
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), state.values(), strict=True))


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that are made, but for those in the given storage."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.made = {x.untyped_storage().data_ptr() for x in known}, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.made.append(result.numel())
        return result


@pytest.mark.parametrize("layout", [Trains(), Trains(bond=1), Trains(bond=3), Trees()], ids=str)
def test_nothing_of_full_size_is_made(layout):
    shape, rank = (8, 8, 8, 8), 3
    frame, older = random_frame(layout, shape, rank, REAL, 1), random_frame(layout, shape, rank, REAL, 2)
    x, z = randn(shape), randn((rank, rank))
    with Sizes(x) as sizes:
        frame.add_lift(x, z, 0.5, 0.9)
    assert 0 < max(sizes.made) <= x.numel() * 3 // 8
    with Sizes(x) as sizes:
        frame.project(x)
    assert 0 < max(sizes.made) <= x.numel() * 3 // 8
    with Sizes() as sizes:
        frame.overlap(older)
    assert 0 < max(sizes.made) <= 8 * rank**2


@pytest.mark.parametrize("rank", [2, 4])
def test_costs_in_multiplications(rank):
    """An overlap at most 4 N d r^3, a projection about 2 r d^N."""
    shape = (6,) * 8
    frame, older = random_frame(Trains(), shape, rank, REAL, 1), random_frame(Trains(), shape, rank, REAL, 2)
    x, z = torch.zeros(shape, dtype=REAL), torch.zeros((rank, rank), dtype=REAL)
    for run, most in (
        (lambda: frame.overlap(older), 4 * 8 * 6 * rank**3),
        (lambda: frame.project(x), 2 * rank * 6**8),
        (lambda: frame.add_lift(x, z, 1.0), 2 * rank * 6**8),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert 0 < counter.get_total_flops() / 2 <= most


def test_names_count_from_the_outer_ends():
    shapes = {n: tuple(u.shape) for n, u in random_frame(Trains(bond=3), (6, 7, 8, 9, 10), 4).tensors().items()}
    assert shapes == {
        "frame.left.0": (6, 4),
        "frame.left.1": (4, 7, 4),
        "frame.left.2": (4, 8, 4),
        "frame.right.0": (10, 4),
        "frame.right.1": (9, 4, 4),
    }
    shapes = {n: tuple(u.shape) for n, u in random_frame(Trees(bond=2), (6, 7, 8, 9, 10), 4).tensors().items()}
    assert shapes == {
        "frame.left.0": (6, 4),
        "frame.left.1": (7, 4),
        "frame.left.2": (4, 4, 4),
        "frame.right.0": (10, 4),
        "frame.right.1": (9, 4),
        "frame.right.2": (8, 4),
        "frame.right.3": (4, 4, 4),
        "frame.right.4": (4, 4, 4),
    }


@pytest.mark.parametrize("order", range(3, 9))
def test_a_train_stores_numbers_linear_in_the_order(order):
    """2 d r + (N - 2) d r^2 beside a core of r x r; a tree N d r + (N - 2) r^3."""
    d, r, shape = 6, 4, (6,) * order
    layout = Trains()
    ranks = layout.ranks(shape, r)
    assert ranks == (r,) * (order - 1)
    schema = layout.schema(shape, ranks, REAL)
    assert sum(prod(spec.shape) for spec in schema.values()) == 2 * d * r + (order - 2) * d * r * r
    assert layout.core_shape(shape, ranks) == (r, r)
    tree = Trees().schema(shape, Trees().ranks(shape, r), REAL)
    assert sum(prod(spec.shape) for spec in tree.values()) == order * d * r + (order - 2) * r**3


@pytest.mark.parametrize("layout", [Trains(), Trees()], ids=["train", "tree"])
def test_a_matrix_has_a_frame_of_two_sides(layout):
    frame = random_frame(layout, (7, 9), 3, COMPLEX)
    u, v = frame.left.basis, frame.right.basis
    assert (u.shape, v.shape) == ((7, 3), (9, 3))
    x = randn((7, 9), COMPLEX, 1)
    close(frame.project(x), u.mH @ x @ v.conj())
    close(frame.lift(frame.project(x)), u @ u.mH @ x @ (v @ v.mH).mT)


def test_a_full_rank_is_whole_and_stores_nothing():
    layout, shape = Trains(), (3, 4, 20, 3)
    ranks = layout.ranks(shape, 12)
    frame = random_frame(layout, shape, 12)
    assert ranks == (3, 12, 3)
    assert frame.tensors().keys() == {"frame.right.1"}  # (20, 3, 12): the other end is whole as well
    everything = random_frame(layout, (4, 4), 4)
    assert everything.tensors() == {}
    assert float(everything.defect()) == 0
    x = randn((4, 4))
    assert torch.equal(everything.project(x), x)
    assert torch.equal(everything.lift(x), x)
    assert everything.overlap(everything).matrices == (None, None)


@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=6).map(tuple),
    st.sampled_from([Trains(), Trees(), Trains(bond=1), Trees(bond=1)]),
    st.data(),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_with_any_ranks_that_fit(shape, layout, data):
    limits = layout.ranks(shape, (None,) * len(layout.ranks(shape, 1)))
    wanted = tuple(data.draw(st.one_of(st.none(), st.integers(1, top))) for top in limits)
    try:
        ranks = layout.ranks(shape, wanted)
    except ValueError:
        assert any(w is not None and w > 1 for w in wanted)
        ranks = layout.ranks(shape, tuple(None if w is None else 1 for w in wanted))
    assert layout.ranks(shape, ranks) == ranks
    frame = layout.start(torch.zeros(shape, dtype=COMPLEX), ranks, None, 0)
    assert frame.ranks == ranks
    basis, x = explicit(frame), randn(shape, COMPLEX)
    close(basis.mH @ basis, torch.eye(basis.shape[1], dtype=COMPLEX), 1e-12)
    close(frame.project(x).flatten(), basis.mH @ x.flatten(), 1e-12)
    close(frame.lift(frame.project(x)).flatten(), basis @ (basis.mH @ x.flatten()), 1e-12)


@EVERY
@SHAPED
def test_start_keeps_pads_and_cuts(layout, shape):
    for dtype, before, after in product((torch.float32, COMPLEX), (1, 2, 3, 100), (1, 2, 3, 100)):
        check_start(layout, shape, dtype, before, after)


def check_start(layout, shape, dtype, before, after):
    older = random_frame(layout, shape, before, dtype, 1)
    ranks, like = layout.ranks(shape, after), torch.zeros(shape, dtype=dtype)
    kept = {name: u.clone() for name, u in older.tensors().items()}
    frame = layout.start(like, ranks, older, 5)
    assert frame.ranks == ranks
    assert float(frame.defect()) <= 100 * torch.finfo(dtype).eps
    assert all(torch.equal(u, kept[name]) for name, u in older.tensors().items())
    if all(a == b for a, b in zip(ranks, older.ranks, strict=True)):
        assert frame == older
    if all(a >= b for a, b in zip(ranks, older.ranks, strict=True)):  # nothing is lost
        x = older.lift(randn((older.left.rank, older.right.rank), dtype, 3))
        close(frame.lift(frame.project(x)), x, tolerance(dtype))
    elif older.left.rank > frame.left.rank and len(shape) == 2 and older.left.basis is not None:
        close(frame.left.basis, older.left.basis[:, : frame.left.rank], tolerance(dtype))


@EVERY
def test_start_is_seeded_and_leaves_the_global_generator_alone(layout):
    shape = (3, 4, 2, 5)
    state = torch.random.get_rng_state()
    one, two, other = (random_frame(layout, shape, 2, REAL, seed).tensors() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, u in one.items():
        assert torch.equal(u, two[name])
        assert not torch.equal(u, other[name])


@EVERY
@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("transport", [Rotate(), Carry()], ids=str)
def test_transports_run_on_its_overlap(layout, dtype, transport):
    """As between the explicit bases; and a frame that has not changed leaves the moments as they are."""
    shape = (3, 4, 2, 5)
    older, frame = random_frame(layout, shape, 3, dtype, 1), random_frame(layout, shape, 2, dtype, 2)
    clock = Clock(torch.tensor(5), 0.9, 0.999)
    core = (older.left.rank, older.right.rank)
    m = randn(core, dtype, 3)
    state = {"m": m, "v": 4 * m.abs() ** 2 + randn(core, REAL, 4).abs(), "v.mass": torch.full(core, 0.004).double()}
    state["v.bound"] = torch.tensor(9.0, dtype=REAL)
    state = {name: x for name, x in state.items() if name in "mv" or isinstance(transport, Carry)}
    same = transport.move(state, RULE, older.overlap(older), clock)
    for name, x in state.items():
        close(same[name], x, 1e-10)
    moved = transport.move(state, RULE, frame.overlap(older), clock)
    close(moved["m"], frame.project(older.lift(m)))
    assert moved["v"].shape == (frame.left.rank, frame.right.rank)
    sides = zip((frame.left, frame.right), (older.left, older.right), strict=True)
    bases = [matrix(a).mH @ matrix(b) for a, b in sides]
    expected = transport.move(state, RULE, Overlap([r if dtype.is_complex else r.real for r in bases]), clock)
    for name, x in moved.items():
        close(x, expected[name], 1e-10)


def test_overlaps_of_different_trees_are_refused():
    with pytest.raises(ValueError, match=r"no overlap .*\(3, 4\).*\(3,\)"):
        random_frame(Trains(bond=2), (3, 4, 5), 2).overlap(random_frame(Trains(bond=1), (3, 4, 5), 2))


def test_ranks_of_each_kind():
    assert Trains().ranks((6, 6, 6, 6), 4) == (4, 4, 4)
    assert Trains().ranks((6, 6, 6, 6), 40) == (6, 36, 6)
    assert Trains().ranks((2, 9, 9, 9), 5) == (2, 5, 5)
    assert Trains().ranks((6, 6, 6, 6), (None, 3, 2)) == (6, 3, 2)
    assert Trains().ranks((6, 6, 6, 6), (None, None, None)) == (6, 36, 6)
    assert Trains().ranks((6, 6, 6, 6), (2, None, 3)) == (2, 12, 3)  # at most 2 * 6 from the left
    assert Trees().ranks((6, 6, 6, 6), 4) == (4, 4, 4, 4, 4)
    assert Trees().ranks((6, 6, 6, 6), (None, 3, 4, None, 2)) == (6, 3, 4, 6, 2)
    assert Trees().ranks((6, 6, 6, 6), (2, 2, None, 3, 3)) == (2, 2, 4, 3, 3)
    for fraction in (0.01, 0.1, 0.3):
        r = Trains().ranks((8, 8, 8, 8), fraction)[1]
        assert abs(r * r - fraction * 4096) <= min(abs(s * s - fraction * 4096) for s in (r - 1, r + 1))
    assert Trains().ranks((8, 8, 8, 8), 0.01) == (6, 6, 6)
    assert Trains().ranks((8, 8, 8, 8), 1e-9) == (1, 1, 1)


@pytest.mark.parametrize(
    ("layout", "rank", "error", "says"),
    [
        (Trains(), (4, 4), ValueError, r"\(4, 4\) has 2 entries.*needs 3"),
        (Trees(), (4, 4, 4), ValueError, r"has 3 entries.*needs 5"),
        (Trains(), (7, 4, 4), ValueError, r"7 directions at edge 0 .*allow 6: use 1\.\.6"),
        (Trains(), (2, 13, 4), ValueError, r"13 directions at edge 1 .*allow 12: use 1\.\.12"),
        (Trains(), (6, 37, 6), ValueError, r"37 directions at edge 1 .*allow 36"),
        (Trees(), (2, 2, 5, 3, 3), ValueError, r"5 directions at edge 2 .*allow 4: use 1\.\.4"),
        (Trees(), (4, 1, 2, 1, 2), ValueError, r"4 directions at edge 0 .*allow 2"),
        (Trains(), (0, 1, 1), ValueError, ">= 1 or None, got 0"),
        (Trains(), 0, ValueError, ">= 1, got 0"),
        (Trains(), 1.5, ValueError, r"\(0, 1\], got 1.5"),
        (Trees(), True, TypeError, "True"),
        (Trains(), (1, 2.0, 1), TypeError, "2.0"),
    ],
    ids=str,
)
def test_ranks_that_do_not_fit_are_refused(layout, rank, error, says):
    with pytest.raises(error, match=says):
        layout.ranks((6, 6, 6, 6), rank)


@pytest.mark.parametrize("layout", [Trains, Trees])
def test_bonds_that_do_not_exist_are_refused(layout):
    with pytest.raises(ValueError, match="bond must be >= 1, got 0"):
        layout(bond=0)
    with pytest.raises(TypeError, match="bond must be an int, got 1.0"):
        layout(bond=1.0)
    with pytest.raises(ValueError, match=r"bond must lie in \[1, N - 1\], got 3 .*\(4, 5, 6\)"):
        layout(bond=3).ranks((4, 5, 6), 2)
    with pytest.raises(ValueError, match=r"bond must lie in \[1, N - 1\], got 1 .*\(4,\)"):
        layout().ranks((4,), 2)
    with pytest.raises(ValueError, match="side must be one of .*'up'"):
        layout().ranks((4, 5), 2, side="up")
    with pytest.raises(FrozenInstanceError):
        layout().bond = 2
    assert hash(layout(bond=2)) == hash(layout(bond=2))


def test_the_default_bond_balances_the_entries():
    assert random_frame(Trains(), (2, 3, 4, 20), 1).bond == 3
    assert random_frame(Trees(), (20, 2, 3, 2), 1).bond == 1
    assert random_frame(Trains(), (5, 5, 5), 1).bond == 1


def test_given_trees():
    tree = (((0, 1), 2), (3, 4))
    frame = random_frame(Trees(tree=tree), (3, 4, 5, 3, 4), 2)
    assert frame.bond == 3
    left = frame.left.children
    assert (left[0].sizes, left[1].sizes) == ((3, 4), (5,))
    assert Trees(tree=tree, bond=3).ranks((3, 4, 5, 3, 4), 2) == frame.ranks == (2,) * 7
    x = randn((3, 4, 5, 3, 4))
    close(frame.project(x).flatten(), explicit(frame).mH.real @ x.flatten())
    with pytest.raises(ValueError, match="bond must be 3 as in the tree .*got 2"):
        Trees(tree=tree, bond=2)
    with pytest.raises(ValueError, match=r"in this order, got \(1, 0\)"):
        Trees(tree=(1, 0))
    with pytest.raises(TypeError, match="pairs and ints, got 'x'"):
        Trees(tree=(0, "x"))
    with pytest.raises(TypeError, match=r"pairs and ints, got \(0, 1, 2\)"):
        Trees(tree=(0, 1, 2))
    with pytest.raises(ValueError, match=r"has 5 modes, shape \(3, 4\) has 2"):
        Trees(tree=tree).ranks((3, 4), 2)


@pytest.mark.parametrize("mirrored", [False, True])
def test_products_along_the_middle_axis(mirrored):
    """down and up take (..., n, c), whichever axes are long."""
    template = Interface.train((3, 4, 2), mirrored)
    bases = [
        torch.linalg.qr(randn(s, COMPLEX)).Q for s in ((2 if mirrored else 3, 2), (8, 3), ((9 if mirrored else 6), 4))
    ]
    rows = [(2,), (4, 2), (3, 3)] if mirrored else [(3,), (2, 4), (3, 2)]
    train = template.rebuild([b.reshape(*s, -1) for b, s in zip(bases, rows, strict=True)], mirrored)
    b = matrix(train)
    for lead in ((), (5,), (2, 3), (1,)):
        for c in (1, 4):
            x, z = randn((*lead, 24, c), COMPLEX, 1), randn((*lead, 4, c), COMPLEX, 2)
            close(train.down(x), b.mH @ x)
            close(train.up(z), b @ z)
            out = randn((max(1, len(lead) and lead[0]), 24, c), COMPLEX, 3)
            small = randn((out.shape[0], 4, c), COMPLEX, 4)
            expected = 0.5 * out + 2 * (b @ small)
            close(train.add_up(out, small, 2.0, 0.5), expected)
