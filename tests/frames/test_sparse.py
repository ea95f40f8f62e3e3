"""Block-sparse Tucker frames against the Kronecker basis's own columns, and whole optimizers with them."""

import io
from dataclasses import dataclass
from itertools import product
from math import prod

import pytest
import torch

from comoving import explain, state_bytes
from comoving.clock import Clock
from comoving.codecs import Int8
from comoving.finders import BlockSelection, Exact, Oja, Operand, Power, StreamingTucker, TrainSVD
from comoving.frames import Blocks, ModeFrame, Modes, SparseFrame, SparseModes
from comoving.ranks import Energy
from comoving.residual import Discard, Feedback, Passage
from comoving.rules import Adam
from comoving.slots import Kind, Slot
from comoving.transport import Carry, Reset, Rotate
from contract.support import COMPLEX, REAL, close, known_rank, lone, randn, random_frame, step
from references.algebra import basis

CASES = {
    "3-D": (SparseModes(block=2, density=0.4), (6, 5, 8), (4, 3, 6), REAL),
    "3-D, a whole mode": (SparseModes(block=3, density=0.3), (6, 4, 5), (3, None, 4), COMPLEX),
    "a matrix": (SparseModes(block=2, density=0.5), (6, 8), (4, None), COMPLEX),
    "4-D, modes of 1": (SparseModes(block=2, density=0.5), (8, 1, 3, 4), (6, None, None, 2), COMPLEX),
    "rank 1": (SparseModes(block=4, density=0.1), (5, 4, 3), (1, 1, 1), COMPLEX),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def some_frame(layout, shape, ranks, dtype, seed=0):
    """Random factors and random blocks."""
    start = layout.start(torch.zeros(shape, dtype=dtype), ranks, None, seed)
    modes, kept = random_frame(shape, ranks, dtype, seed), start.kept
    total = prod(r // b for r, b in zip(kept.shape, kept.lengths, strict=True))
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: len(kept.blocks)].sort().values
    return layout.load({**modes.tensors(), "frame.blocks": chosen}, shape)


def whole(layout, shape):
    return layout.load({}, shape)


def columns_of(frame, shape, dtype):
    """Of the Kronecker basis, the columns of the kept blocks, found entry by entry."""
    every = basis(frame.modes.factors, shape, dtype)
    if frame.kept is None:
        return every
    core, lengths = frame.kept.shape, frame.kept.lengths
    places = list(product(*(range(r // b) for r, b in zip(core, lengths, strict=True))))
    numbers = []
    for block in frame.kept.blocks.tolist():
        for entry in product(*map(range, lengths)):
            index = [k * b + i for k, b, i in zip(places[block], lengths, entry, strict=True)]
            number = 0
            for r, i in zip(core, index, strict=True):
                number = number * r + i
            numbers.append(number)
    return every[:, numbers]


@EVERY_CASE
def test_coordinates_are_those_of_the_kept_columns(case):
    layout, shape, ranks, dtype = CASES[case]
    frame = some_frame(layout, shape, ranks, dtype, 1)
    f, x, z = columns_of(frame, shape, dtype), randn(shape, dtype, 2), randn(layout.core_shape(shape, ranks), dtype, 3)
    close(f.mH @ f, torch.eye(f.shape[1], dtype=dtype))
    close(frame.project(x).flatten(), f.mH @ x.flatten())
    close(frame.lift(z).flatten(), f @ z.flatten())
    close(frame.add_lift(x.clone(), z, 0.5, 2.0), 2 * x + 0.5 * frame.lift(z))
    assert all(r % b == 0 and b <= layout.block for r, b in zip(frame.kept.shape, frame.kept.lengths, strict=True))
    assert len(frame.kept.blocks) == max(1, round(layout.density * prod(frame.kept.shape) / prod(frame.kept.lengths)))


def pairs(case):
    """New and old frames: of the same ranks, of others, and one of them whole."""
    layout, shape, ranks, dtype = CASES[case]
    other = tuple(None if r is None else max(1, r - 1) for r in ranks)
    a, b = (some_frame(layout, shape, ranks, dtype, seed) for seed in (1, 2))
    c = some_frame(layout, shape, other, dtype, 3)
    return [(a, b), (a, c), (c, a), (a, whole(layout, shape)), (whole(layout, shape), a)]


def masses(frame, layout, shape, seed):
    return 0.2 + torch.rand(
        layout.mass_shape(shape, frame.ranks), dtype=REAL, generator=torch.Generator().manual_seed(seed)
    )


@EVERY_CASE
@pytest.mark.parametrize("which", range(5))
def test_the_overlap_moves_as_the_explicit_matrix(case, which):
    layout, shape, _, dtype = CASES[case]
    new, old = pairs(case)[which]
    r, overlap = columns_of(new, shape, dtype).mH @ columns_of(old, shape, dtype), new.overlap(old)
    z = old.project(randn(shape, dtype, 5))
    v = torch.rand(z.shape, dtype=REAL, generator=torch.Generator().manual_seed(6))
    core = layout.core_shape(shape, new.ranks)
    assert tuple(overlap.moved_shape(z)) == tuple(overlap.move(z).shape) == core
    close(overlap.move(z).flatten(), r @ z.flatten())
    close(overlap.move_squares(v).flatten(), r.abs().square() @ v.flatten())
    assert overlap.spread(masses(old, layout, shape, 7)).shape == z.shape


@EVERY_CASE
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("transport", [Rotate(), Carry(), Reset()], ids=str)
def test_moments_move_as_the_explicit_matrix_says(case, which, transport):
    layout, shape, _, dtype = CASES[case]
    new, old = pairs(case)[which]
    r, clock = columns_of(new, shape, dtype).mH @ columns_of(old, shape, dtype), Clock(torch.tensor(7.0), 0.8, 0.95, 7)
    m, kappa, bound = 0.3 * old.project(randn(shape, dtype, 5)), masses(old, layout, shape, 8), torch.tensor(2.0)
    v = torch.rand(m.shape, dtype=REAL, generator=torch.Generator().manual_seed(6))
    state = {"moment.first": m, "moment.second": v, "moment.second.mass": kappa, "moment.second.bound": bound}
    moved = transport.move(state, Adam().slots(tuple(m.shape)), new.overlap(old), clock)
    core, c1, c2 = layout.core_shape(shape, new.ranks), 1 - 0.8**7, 1 - 0.95**7
    assert all(tuple(x.shape) == core for name, x in moved.items() if x.ndim > 0)
    if transport == Reset():
        assert not any(x.any() for x in moved.values())
        return
    m, v, kappa, squares = m.flatten(), v.flatten(), kappa.expand(m.shape).flatten(), r.abs().square()
    after = r @ m
    close(moved["moment.first"].flatten(), after)
    if transport == Rotate():
        spread = v / c2 - m.abs().square() / c1**2
        expected = c2 * (squares @ spread + after.abs().square() / c1**2).abs()
    else:
        mass = squares @ kappa
        close(moved["moment.second.mass"].flatten(), mass)
        spread = squares @ (v - kappa * m.abs().square() / c1**2)
        share = torch.where(mass > 0, spread / mass, 0)
        expected = torch.maximum(mass * (share + after.abs().square() / c1**2), after.abs().square() / 2)
    close(moved["moment.second"].flatten(), expected)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("order", [2, 3])
def test_a_block_sparse_core_is_recovered_exactly(dtype, order):
    """A sum of orthogonal terms: in its principal directions the core is diagonal, so that diagonal blocks hold it."""
    shape, ranks = (9, 8, 10)[:order], (6,) * order
    weights = torch.tensor([9.0, 7.0, 5.0, 3.0, 2.0, 1.0], dtype=dtype)
    core = torch.zeros(ranks, dtype=dtype)
    core[(range(6),) * order] = weights
    x = random_frame(shape, ranks, dtype, 1).lift(core)
    layout = SparseModes(block=2, density=3 / 3**order)
    frame = BlockSelection(Exact()).find(Operand(x), layout.start(x, ranks, None, 0), False, {})
    assert frame.kept.blocks.tolist() == [sum(i * 3**n for n in range(order)) for i in range(3)]
    close(frame.lift(frame.project(x)), x)
    assert frame.project(x).numel() == 3 * 2**order


@EVERY_CASE
def test_the_blocks_of_most_energy_are_kept(case):
    layout, shape, ranks, dtype = CASES[case]
    x, old = known_rank(shape, ranks, dtype, 3) + 0.1 * randn(shape, dtype, 4), some_frame(layout, shape, ranks, dtype)
    w = old.project(randn(shape, dtype, 5))
    for operand in (Operand(x), Operand(x, 0.3, old, w)):
        frame = BlockSelection().find(operand, old, True, {})
        core, kept = frame.modes.project(operand.full()), frame.kept
        total = prod(r // b for r, b in zip(kept.shape, kept.lengths, strict=True))
        energies = [
            float(layout_of_one(kept, block).gather(core).abs().square().sum()) for block in torch.arange(total)
        ]
        best = sorted(energies, reverse=True)[: len(kept.blocks)]
        assert sorted((energies[i] for i in kept.blocks.tolist()), reverse=True) == pytest.approx(best)
        assert kept.blocks.tolist() == sorted(set(kept.blocks.tolist()))
        assert frame.project(operand.full()).norm() ** 2 == pytest.approx(sum(best))


def layout_of_one(kept, block):
    return type(kept)(kept.shape, kept.lengths, block[None])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_energies_stay_in_range(size):
    layout, x = SparseModes(density=0.25), known_rank((8, 9), (4, 6), torch.float32, 1)
    start = layout.start(x, (4, 6), None, 0)
    frame, same = (BlockSelection(Exact()).find(Operand(s * x), start, False, {}) for s in (1.0, size))
    assert torch.equal(frame.kept.blocks, same.kept.blocks)


def test_ties_go_to_the_blocks_that_are_there_and_then_to_the_first():
    layout, x = SparseModes(density=0.5), torch.eye(4, dtype=REAL)
    modes = ModeFrame((torch.eye(4, dtype=REAL), torch.eye(4, dtype=REAL)))

    @dataclass(frozen=True)
    class Fixed(Power):
        def find(self, operand, start, warm, memory):
            return modes

    def kept(x, *blocks):
        start = layout.load({**modes.tensors(), "frame.blocks": torch.tensor(blocks)}, (4, 4))
        return BlockSelection(Fixed()).find(Operand(x), start, True, {}).kept.blocks.tolist()

    assert kept(x, 1, 2) == [0, 3]
    assert kept(0 * x, 1, 2) == [1, 2]
    assert kept(x + x.flip(0), 2, 3) == [2, 3]
    x[2:] = 0
    assert kept(x, 2, 3) == [0, 2]
    assert kept(x, 0, 1) == [0, 1]


# ------------------------------------------------------------------------------------------------- whole optimizers


def run(shape, steps, dtype=REAL, start=0, **options):
    """A parameter and its optimizer after some steps of random gradients that share a part."""
    p, optimizer = lone(randn(shape, dtype, 1), **options)
    advance(p, optimizer, range(start, start + steps))
    return p, optimizer


def advance(p, optimizer, steps):
    shared = known_rank(p.shape, tuple(min(2, d) for d in p.shape), p.dtype, 3)
    for t in steps:
        step(optimizer, p, shared + randn(p.shape, p.dtype, 50 + t))


OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "refresh_every": 2}


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize(("shape", "rank"), [((8, 9, 10), (4, 3, 6)), ((8, 9), 4), ((9, 1, 8, 3), (6, None, 4, None))])
@pytest.mark.parametrize("transport", [Rotate(), Carry()], ids=str)
@pytest.mark.parametrize("residual", [Discard(), Feedback()], ids=str)
def test_with_all_blocks_it_is_the_dense_core(dtype, shape, rank, transport, residual):
    options = OPTIONS | {"rank": rank, "transport": transport, "residual": residual}
    p, dense = run(shape, 9, dtype, **options)
    layout, finder = SparseModes(density=1.0), BlockSelection()
    q, sparse = run(shape, 9, dtype, frame=layout, finder=finder, **options)
    assert sparse.sites[q].ranks == dense.sites[p].ranks
    close(q.detach(), p.detach(), 1e-12)
    kept = layout.load(sparse.state[q], shape).kept
    for name in ("moment.first", "moment.second"):
        close(kept.scatter(sparse.state[q][name]), dense.state[p][name], 1e-12)


@pytest.mark.parametrize("rank", [0.05, 0.2, 0.5])
def test_a_share_at_full_density_is_that_of_modes(rank):
    assert SparseModes(density=1.0).ranks((24, 24, 16, 9), rank) == Modes().ranks((24, 24, 16, 9), rank)


@pytest.mark.parametrize("transport", [Rotate(), Carry(), Reset()], ids=str)
def test_feedback_telescopes(transport):
    shape, layout = (9, 8, 10), SparseModes(block=2, density=0.25)
    p, optimizer = lone(
        torch.zeros(shape, dtype=COMPLEX),
        **(OPTIONS | {"rank": (6, 4, 6), "frame": layout, "finder": BlockSelection(), "transport": transport}),
        residual=Feedback(),
    )
    group, state, zero = optimizer.param_groups[0], optimizer.state[p], torch.zeros(shape, dtype=COMPLEX)
    used, given = zero, zero
    for t in range(7):
        gradient = 2**t * randn(shape, COMPLEX, t)
        step(optimizer, p, gradient)
        m, frame = state["moment.first"], layout.load(state, shape)
        used, given = used + frame.lift(m), given + gradient
        remembered = {n: x.clone() for n, x in state.items() if n.startswith("feedback.")}
        passage = Passage(frame, m, 0.8, 0.2, frame, m, tick=t + 1)
        kept = group["residual"].restore(zero, passage, True, remembered, group["codec"]).full()
        close(used + 4 * frame.lift(m) + kept, given)


@pytest.mark.parametrize("inner", [Power(), Oja(), StreamingTucker()], ids=str)
def test_it_resumes_bit_for_bit(inner):
    options = OPTIONS | {
        "rank": (6, 4, 6), "frame": SparseModes(density=0.25), "finder": BlockSelection(inner), "transport": Carry(),
        "residual": Feedback(), "codec": Int8(), "moments": Int8(),
    }  # fmt: skip
    p, straight = run((9, 8, 10), 9, COMPLEX, **options)
    q, first = run((9, 8, 10), 5, COMPLEX, **options)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other, second = lone(q.detach(), **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    advance(other, second, range(5, 9))
    assert torch.equal(p, other)
    for name, x in straight.state[p].items():
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(second.state[other][name])), name
    assert second.state[other]["frame.blocks"].dtype is torch.int64
    assert state_bytes(second) == explain(second).state_bytes


@pytest.mark.parametrize("transport", [Rotate(), Carry()], ids=str)
def test_state_of_adamw_and_of_other_ranks_is_carried_in(transport):
    shape, layout = (9, 8, 10), SparseModes(density=0.25)
    options = OPTIONS | {"transport": transport, "frame": layout, "finder": BlockSelection(), "weight_decay": 0.0}
    p, other_ranks = run(shape, 5, rank=(3, 8, 4), **options)
    dense = torch.optim.AdamW([q := torch.nn.Parameter(p.detach().clone())], lr=0.01, betas=(0.8, 0.95))
    advance(q, dense, range(5))
    for before, saved in ((p, other_ranks), (q, dense)):
        p2, optimizer = lone(p.detach(), rank=(6, 4, 6), **options)
        optimizer.load_state_dict(saved.state_dict())
        old = saved.state[before]
        m = old["exp_avg"] if saved is dense else layout.load(old, shape).lift(old["moment.first"])
        gradient = randn(shape, REAL, 9)
        step(optimizer, p2, gradient)
        state = optimizer.state[p2]
        frame = layout.load(state, shape)
        assert frame.ranks == (6, 4, 6)
        assert state["moment.first"].shape == (round(0.25 * 18), 2, 2, 2)
        close(state["moment.first"], 0.8 * frame.project(m) + 0.2 * frame.project(gradient))
        assert all(torch.as_tensor(x).isfinite().all() for x in state.values())


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("rank", [1, (1, None, 1, 1), (8, None, None, 3)])
def test_rank_one_and_modes_of_one_and_zero_gradients_give_no_nan(dtype, rank):
    shape = (8, 1, 9, 3)
    p, optimizer = lone(randn(shape, dtype), frame=SparseModes(), finder=BlockSelection(), rank=rank, transport=Carry())
    before = p.detach().clone()
    for gradient in (torch.zeros(shape, dtype=dtype), randn(shape, dtype, 1), torch.zeros(shape, dtype=dtype)):
        step(optimizer, p, gradient)
        assert all(torch.as_tensor(x).isfinite().all() for x in (p.detach(), *optimizer.state[p].values()))
    assert not torch.equal(p, before)


def test_experts_can_have_sparse_cores():
    options = OPTIONS | {"rank": 0.2, "frame": Blocks(0, SparseModes()), "finder": BlockSelection()}
    p, optimizer = run((3, 16, 12), 4, residual=Feedback(), **options)
    assert optimizer.sites[p].projected
    assert optimizer.state[p]["0.frame.blocks"].dtype is torch.int64
    assert state_bytes(optimizer) == explain(optimizer).state_bytes


# ------------------------------------------------------------------------------------------------- ranks, and bad input


@pytest.mark.parametrize("shape", [(24, 24, 16, 9), (64, 64, 16, 9), (128, 352), (100, 37), (30, 12, 12)])
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize(("rank", "density"), [(0.2, 0.5), (0.1, 0.25), (0.05, 0.125)])
def test_a_float_is_the_share_of_the_entries_that_are_kept(shape, block, rank, density):
    layout = SparseModes(block=block, density=density)
    ranks = layout.ranks(shape, rank)
    core = layout.core_shape(shape, ranks)
    assert prod(core) / prod(shape) == pytest.approx(rank, rel=0.1 if block < 4 else 0.2)
    assert all(r is None or r < block or r % block == 0 for r in ranks)
    assert layout.ranks(shape, ranks) == ranks
    assert layout.mass_shape(shape, ranks) == core


def test_one_block_is_as_small_as_was_asked():
    layout = SparseModes(block=8, density=0.125)
    assert layout.ranks((24, 24, 16, 9), 0.01) == Modes().ranks((24, 24, 16, 9), 0.01)
    assert layout.core_shape((24, 24, 16, 9), (7, 7, 5, 3)) == (1, 7, 7, 5, 3)


@pytest.mark.parametrize(
    ("rank", "density", "error", "says"),
    [
        (0.25, 0.25, ValueError, "rank 0.25 at density 0.25 asks for more blocks than there are"),
        (0.3, 0.25, ValueError, "more blocks than there are"),
        (1.5, 0.5, ValueError, r"\(0, 1\], got 1.5"),
        (0, 0.5, ValueError, ">= 1, got 0"),
        ((9, None, 2), 0.5, ValueError, "9 directions in mode 0"),
        ("4", 0.5, TypeError, "'4'"),
    ],
    ids=str,
)
def test_ranks_that_do_not_fit_are_refused(rank, density, error, says):
    with pytest.raises(error, match=says):
        SparseModes(density=density).ranks((8, 8, 8), rank)


def test_whole_tensors_have_no_blocks():
    layout = SparseModes()
    for rank in (1.0, (None, None, None), 100):
        assert layout.ranks((8, 8, 8), rank) == (None, None, None)
    assert layout.core_shape((8, 8, 8), (None,) * 3) == (8, 8, 8)
    assert layout.schema((8, 8, 8), (None,) * 3, REAL) == {}
    assert layout.ranks((3, 4, 5), 0.2) == (None, None, None)  # no mode is long enough


@dataclass(frozen=True)
class Factored(Adam):
    def slots(self, core_shape):
        return (*super().slots(core_shape), Slot("rows", Kind.FACTORED, mode=0))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ranks": Energy()}, ValueError, "no spectrum for each mode to choose ranks by"),
        ({"rule": Factored()}, ValueError, "statistics of single modes of the core"),
        ({"finder": Power()}, TypeError, "finds a ModeFrame, the frame is a SparseFrame"),
        ({"frame": Modes()}, TypeError, "finds a SparseFrame, the frame is a ModeFrame"),
        ({"rank": 0.5}, ValueError, "more blocks than there are"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, error, says):
    with pytest.raises(error, match=says):
        lone(randn((16, 16, 16)), **({"frame": SparseModes(), "finder": BlockSelection(), "rank": 0.1} | options))


@pytest.mark.parametrize("inner", [TrainSVD(), BlockSelection(), Power, None, "power"], ids=str)
def test_the_inner_finder_fills_mode_frames(inner):
    with pytest.raises(ValueError, match="inner must be a finder that fills a ModeFrame"):
        BlockSelection(inner)


def test_a_start_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="fills a SparseFrame, got a ModeFrame"):
        BlockSelection().find(Operand(randn((8, 8))), random_frame((8, 8), (4, 4)), False, {})


def test_starts_are_drawn_and_take_the_first_blocks():
    layout, like = SparseModes(), torch.zeros((8, 9, 10), dtype=COMPLEX)
    frame, other = (layout.start(like, (4, 4, 4), None, seed) for seed in (1, 2))
    assert isinstance(frame, SparseFrame)
    assert frame.kept.blocks.tolist() == [0, 1, 2, 3]
    for n in range(3):
        assert not torch.equal(frame.modes.factors[n], other.modes.factors[n])
    grown = layout.start(like, (6, 4, 4), frame, 3)
    close(grown.modes.factors[0][:, :4], frame.modes.factors[0])


def test_the_memory_is_the_inner_finders():
    finder, shape, ranks = BlockSelection(StreamingTucker()), (8, 9, 10), (4, 4, 4)
    assert finder.inertia == StreamingTucker().inertia
    assert finder.schema(shape, ranks, REAL) == StreamingTucker().schema(shape, ranks, REAL) != {}
