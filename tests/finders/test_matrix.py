"""The finders beyond power iteration and exact factors, against the exact SVD, and in training."""

import copy
import io
from dataclasses import dataclass
from math import cos, pi, sqrt
from typing import ClassVar

import pytest
import torch

import comoving
from comoving import LowRankOptimizer, state_bytes
from comoving.decompositions import turning
from comoving.draws import gaussian, scramble
from comoving.finders import (
    CosineSelection,
    Exact,
    IncrementalSVD,
    Memoryless,
    Nystroem,
    Oja,
    Operand,
    Power,
    Randomized,
    RandomProjection,
)
from comoving.frames import CosineFrame, Cosines, ModeFrame, Modes, Seeded
from comoving.linalg import cosine_columns, cosine_transform, unfold
from comoving.parts import part
from comoving.residual import Feedback
from comoving.transport import Carry, Keep, Rotate
from contract import test_finders as contract
from contract.support import COMPLEX, REAL, cells, close, known_rank, lone, memory_of, randn, search, step

FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
NEW = [
    (Randomized(), Modes()),
    (Nystroem(), Modes()),
    (Nystroem(columns="energy", samples=3.0), Modes()),
    (Oja(), Modes()),
    (IncrementalSVD(), Modes()),
    (CosineSelection(), Cosines()),
    (RandomProjection(), Seeded()),
]
FREE = NEW[:5]


@pytest.fixture(autouse=True)
def no_global_randomness():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


def decaying(shape, power=1.0, dtype=REAL, seed=0):
    """A matrix with singular values 1, 2^-power, 3^-power, ..."""
    d = min(shape)
    u = torch.linalg.qr(randn((shape[0], d), dtype, seed)).Q
    v = torch.linalg.qr(randn((shape[1], d), dtype, seed + 1)).Q
    return u * (1 / torch.arange(1, d + 1, dtype=REAL) ** power).to(dtype) @ v.mH


def captured(frame, x, ranks):
    """Energy in the frame, as a share of what the best frame of these ranks holds (matrices with one whole side)."""
    r = max(rank for rank in ranks if rank is not None)
    return float(frame.project(x).norm() ** 2 / torch.linalg.svdvals(x)[:r].square().sum())


# ---------------------------------------------------------------------------------------------- against the exact SVD


@pytest.mark.parametrize("finder", [finder for finder, _ in FREE], ids=str)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
@FIELDS
def test_a_matrix_of_known_rank_is_recovered_from_either_side(finder, shape, dtype):
    """F F^H g = g, and the frame is the space of the exact factors."""
    for ranks in ((5, None), (None, 5), (5, 5)):
        g = known_rank(shape, (5, 5), dtype)
        _, frame = search(finder, g, ranks, warm=False)
        assert (frame.lift(frame.project(g)) - g).norm() < 1e-7 * g.norm()
        exact = Exact(method="svd").find(Operand(g), frame, False, {})
        for u, v in zip(frame.factors, exact.factors, strict=True):
            if u is not None:
                close(u @ u.mH, v @ v.mH, 1e-7)


@pytest.mark.parametrize(
    ("finder", "share"),
    [
        (Randomized(reads=1), 0.95),
        (Randomized(reads=4), 0.999),
        (Randomized(reads=8, oversampling=16), 0.99999),
        (Nystroem(samples=2.0), 0.95),
        (Nystroem(samples=4.0), 0.98),
        (Nystroem(columns="energy"), 0.95),
        (Nystroem(columns="slices"), 0.95),
        (Nystroem(samples=60), 0.9999999),
        (IncrementalSVD(), 0.97),
    ],
    ids=str,
)
@FIELDS
def test_captured_energy_on_a_decaying_spectrum(finder, share, dtype):
    x, ranks = decaying((48, 60), 1.0, dtype), (8, None)
    _, frame = search(finder, x, ranks, warm=False)
    assert share < captured(frame, x, ranks) <= 1 + 1e-9


def test_reads_and_oversampling_help():
    x, ranks = decaying((64, 64), 0.4), (8, None)
    shares = [
        sum(captured(search(Randomized(0.0, extra, reads, seed=s), x, ranks, False)[1], x, ranks) for s in range(5))
        for extra, reads in ((0, 1), (8, 1), (8, 2), (8, 4), (8, 8))
    ]
    assert shares == sorted(shares)
    assert shares[-1] - shares[0] > 0.5


def test_oversampling_that_spans_the_space_is_exact():
    x, ranks = decaying((12, 20)), (4, None)
    exact = Exact(method="svd").find(Operand(x), Modes().start(x, ranks, None, 0), False, {}).factors[0]
    for finder in (Randomized(reads=1), IncrementalSVD()):
        u = search(finder, x, ranks, False)[1].factors[0]
        close(u @ u.mH, exact @ exact.mH, 1e-7)


# ------------------------------------------------------------------------------------------------- Brand's updates


@pytest.mark.parametrize("dtype", [torch.float32, REAL, COMPLEX], ids=str)
def test_incremental_svd_is_the_batch_svd_where_nothing_is_cut_or_forgotten(dtype):
    finder, ranks = IncrementalSVD(forgetting=1.0, add=4), (12, None)
    blocks = [randn((20, 3), dtype, s) for s in range(4)]
    frame = Modes().start(blocks[0], ranks, None, 0)
    memory = memory_of(finder, blocks[0], ranks)
    for t, block in enumerate(blocks):
        frame = finder.find(Operand(block), frame, t > 0, memory)
    u, s, _ = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-7
    close(memory["0.singular"], s, tolerance)
    own = frame.factors[0]
    close((own.mH @ u).abs(), torch.eye(12, dtype=s.dtype), tolerance)


@FIELDS
def test_forgetting_weighs_old_blocks_down(dtype):
    finder, ranks = IncrementalSVD(forgetting=0.5, add=4), (6, None)
    blocks = [randn((10, 2), dtype, s) for s in range(3)]
    frame, memory = Modes().start(blocks[0], ranks, None, 0), memory_of(finder, blocks[0], ranks)
    for t, block in enumerate(blocks):
        frame = finder.find(Operand(block), frame, t > 0, memory)
    weighed = torch.cat([0.25 * blocks[0], 0.5 * blocks[1], blocks[2]], dim=1)
    close(memory["0.singular"], torch.linalg.svdvals(weighed), 1e-7)
    before = memory["0.singular"].clone()
    finder.find(Operand(torch.zeros_like(blocks[0])), frame, True, memory)
    close(memory["0.singular"], 0.5 * before)


def test_new_directions_enter_a_few_at_a_time():
    """A signal turns to a space outside the frame: each refresh takes up at most ``add`` directions of it."""
    finder, ranks = IncrementalSVD(forgetting=0.1, add=2), (6, None)
    first, second = known_rank((40, 30), (6, 6), seed=1), 3 * known_rank((40, 30), (6, 6), seed=2)
    second -= torch.linalg.qr(first).Q[:, :6] @ (torch.linalg.qr(first).Q[:, :6].T @ second)
    memory = memory_of(finder, first, ranks)
    frame = finder.find(Operand(first), Modes().start(first, ranks, None, 0), False, memory)
    best = torch.linalg.qr(second).Q[:, :6]
    for t in range(3):
        frame = finder.find(Operand(second), frame, True, memory)
        cosines = torch.linalg.svdvals(best.T @ frame.factors[0])
        assert int((cosines > 0.9).sum()) == 2 * (t + 1)


def test_thousands_of_updates_leave_an_orthonormal_basis():
    finder, ranks = IncrementalSVD(forgetting=0.99, add=1), (3, None)
    x = randn((8, 4), torch.float32)
    memory, frame, largest = memory_of(finder, x, ranks), Modes().start(x, ranks, None, 0), 0.0
    pool = randn((500, 8, 4), torch.float32, 1)
    pool[100:200] = pool[:1] @ torch.eye(4) * 1e-6  # for long stretches nothing lies outside the frame
    for t in range(2_500):
        frame = finder.find(Operand(pool[t % 500]), frame, t > 0, memory)
        if t % 500 == 0:
            largest = max(largest, float(frame.defect()))
    assert max(largest, float(frame.defect())) < 1e-5
    assert int(memory["draws"]) == 2_500
    assert memory["0.singular"].isfinite().all()


def test_a_basis_that_drifted_is_mended():
    finder, ranks, x = IncrementalSVD(), (3, None), randn((12, 9), torch.float32)
    _, frame = search(finder, x, ranks, False)
    crooked = ModeFrame((frame.factors[0] + 1e-3 * randn((12, 3), torch.float32, 5), None))
    assert crooked.defect() > 1e-4
    mended = finder.find(Operand(x), crooked, True, memory_of(finder, x, ranks))
    assert mended.defect() < 1e-5


# -------------------------------------------------------------------------------------------------------------- Oja


@FIELDS
def test_oja_converges_at_the_stated_rate(dtype):
    """Against directions without energy, those of equal energy gain 1 + rate / (share that is captured) per refresh."""
    u = torch.linalg.qr(randn((30, 30), dtype)).Q
    x, ranks = u[:, :4], (4, None)
    frame, expected = ModeFrame((torch.linalg.qr(u[:, :4] + 3 * u[:, 4:8]).Q, None)), 3.0
    for _ in range(40):
        inside, outside = (torch.linalg.svdvals(v.mH @ frame.factors[0])[:4] for v in (u[:, :4], u[:, 4:]))
        close(outside / inside, torch.full((4,), expected, dtype=REAL), 1e-9)
        frame = Oja(rate=0.5).find(Operand(x), frame, True, {})
        expected /= 1 + 0.5 * (1 + expected**2)
    assert expected < 1e-6
    assert frame.ranks == ranks


def test_oja_averages_where_power_iteration_follows_the_last_gradient():
    """Ten noisy views of one space: the averaged frame is nearer to it than the frame of the last view."""
    truth = known_rank((30, 40), (4, 4))
    frames = {}
    for finder in (Oja(inertia=0.0, rate=0.1), Power(inertia=0.0)):
        _, frame = search(finder, truth + randn((30, 40), seed=99), (4, None), warm=False)
        for t in range(60):
            noisy = truth + 3 * truth.norm() / 1200**0.5 * randn((30, 40), seed=t)
            frame = finder.find(Operand(noisy), frame, True, {})
        frames[type(finder)] = captured(frame, truth, (4, None))
    assert frames[Oja] > frames[Power] + 0.01
    assert frames[Oja] > 0.95


# ---------------------------------------------------------------------------------------------------------- cosines


def explicit_cosines(d):
    return torch.tensor(
        [[sqrt((1 if k == 0 else 2) / d) * cos(pi * (2 * i + 1) * k / (2 * d)) for k in range(d)] for i in range(d)],
        dtype=REAL,
    )


@pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 30])
def test_the_cosine_transform_is_that_of_the_explicit_matrix(d):
    matrix = explicit_cosines(d)
    close(matrix.T @ matrix, torch.eye(d, dtype=REAL), 1e-12)
    close(cosine_columns(d, torch.arange(d), REAL), matrix, 1e-13)
    for dtype in (REAL, COMPLEX):
        x = randn((3, d, 4), dtype, d)
        close(cosine_transform(x, 1), torch.einsum("ik,aib->akb", matrix.to(dtype), x), 1e-12)
        close(cosine_transform(x.movedim(1, 0), 0), torch.einsum("ik,aib->kab", matrix.to(dtype), x), 1e-12)
        close(cosine_transform(x.movedim(1, 2), -1), torch.einsum("ik,aib->abk", matrix.to(dtype), x), 1e-12)
    single = cosine_transform(randn((d, 2), torch.float32), 0)
    assert single.dtype is torch.float32
    assert cosine_columns(4096, torch.tensor([4095]), torch.float32).norm() == pytest.approx(1, abs=1e-6)


@FIELDS
@pytest.mark.parametrize(("shape", "ranks"), [((9, 14), (4, None)), ((14, 9), (None, 4)), ((6, 7, 5), (2, 3, None))])
def test_selection_is_that_of_brute_force(shape, ranks, dtype):
    for seed in range(5):
        x = randn(shape, dtype, seed)
        _, frame = search(CosineSelection(), x, ranks, warm=True, layout=Cosines())
        for n, (d, r, chosen) in enumerate(zip(shape, ranks, frame.indices, strict=True)):
            if r is None:
                assert chosen is None
                continue
            matrix = explicit_cosines(d).to(dtype)
            energy = (matrix.T @ unfold(x, n, len(shape))).abs().square().sum(1)
            assert set(chosen.tolist()) == set(energy.topk(r).indices.tolist())
            close(frame.factors[n], matrix[:, chosen])


def test_columns_keep_their_places_and_ties_go_to_those_that_are_there():
    matrix = explicit_cosines(8)
    start = CosineFrame.of((torch.tensor([5, 2, 7]), None), (8, 3), REAL)
    found = CosineSelection().find(Operand(matrix[:, [2, 0, 7]] * torch.tensor([1.0, 2.0, 3.0])), start, True, {})
    assert found.indices[0].tolist() == [0, 2, 7]
    constant = CosineSelection().find(Operand(torch.ones(8, 3, dtype=REAL)), start, True, {})
    assert constant.indices[0].tolist() == [5, 2, 0]  # all columns but 0 have no energy at all
    zero = CosineSelection().find(Operand(torch.zeros(8, 3, dtype=REAL)), start, True, {})
    assert zero.indices[0].tolist() == [5, 2, 7]


def test_a_larger_or_smaller_cosine_frame_keeps_the_first_columns():
    like, old = torch.zeros(8, 3), CosineFrame.of((torch.tensor([5, 0, 7]), None), (8, 3), torch.float32)
    assert Cosines().start(like, (5, None), old, 0).indices[0].tolist() == [5, 0, 7, 1, 2]
    assert Cosines().start(like, (2, None), old, 0).indices[0].tolist() == [5, 0]
    assert Cosines().start(like, (3, None), old, 0) is old
    assert Cosines().start(like, (8, None), None, 0).indices[0].tolist() == list(range(8))


# ------------------------------------------------------------------------------------------------ random projections


def test_scrambled_seeds_are_those_of_splitmix():
    """The first outputs of SplitMix64 from state 0, halved to 63 bits."""
    assert scramble(0) == 0xE220A8397B1DCDAF >> 1
    assert len({scramble(a, b) for a in range(100) for b in range(100)}) == 10_000
    x = gaussian((2000, 10), torch.zeros(0, dtype=COMPLEX), 1, 2)
    assert x.abs().square().mean() == pytest.approx(1, abs=0.03)


def test_a_random_frame_is_drawn_from_its_seed():
    like = torch.zeros(20, 12, dtype=REAL)
    frame = Seeded().start(like, (5, 3), None, 7)
    state = frame.tensors() | {"moment": torch.zeros(5, 3, dtype=REAL)}
    again = Seeded().load(state, (20, 12), state["moment"])
    assert again.seeds == frame.seeds == tuple(int(frame.tensors()[f"frame.{n}.seed"]) for n in (0, 1))
    assert all(torch.equal(u, v) for u, v in zip(frame.factors, again.factors, strict=True))
    following = frame.next()
    assert len({*frame.seeds, *following.seeds}) == 4
    assert following.ranks == frame.ranks
    assert following.next().seeds != frame.seeds
    assert Seeded().start(like, (5, 3), None, 8).seeds != frame.seeds
    assert Seeded().start(like, (5, 3), frame, 8) is frame
    assert Seeded().start(like, (6, 3), frame, 8).seeds == frame.seeds
    assert Seeded().start(like, (6, 3), frame, 8).ranks == (6, 3)
    for bad in (None, torch.zeros(5), torch.zeros(21, 3)):
        with pytest.raises(ValueError, match="core"):
            Seeded().load(state, (20, 12), bad)
    without = {name: x for name, x in state.items() if name != "frame.1.rank"}
    with pytest.raises(ValueError, match="core"):
        Seeded().load(without, (20, 12), state["moment"])


def test_the_random_frame_changes_at_refreshes_only():
    p, optimizer = lone(torch.zeros(12, 20), rank=4, frame=Seeded(), finder=RandomProjection(), refresh_every=3)
    seeds = []
    for t in range(10):
        step(optimizer, p, randn((12, 20), torch.float32, t))
        seeds.append(int(optimizer.state[p]["frame.0.seed"]))
    assert [b != a for a, b in zip(seeds, seeds[1:], strict=False)] == [False, False, True] * 3
    assert len(set(seeds)) == 4


def test_a_random_frame_that_is_stored_steps_as_one_that_is_drawn():
    """Bit for bit, through refreshes, a checkpoint, and a checkpoint of another rank."""
    ways = {stored: Seeded(stored=stored) for stored in (False, True)}
    weights = {}
    for stored, frame in ways.items():
        given = {"frame": frame, "finder": RandomProjection(), "refresh_every": 3}
        p, optimizer = lone(torch.zeros(12, 20), rank=4, **given)
        for t in range(8):
            step(optimizer, p, randn((12, 20), torch.float32, t))
        layout = {"frame.0.seed", "frame.0" if stored else "frame.0.rank"}
        assert {name for name in optimizer.state[p] if name.startswith("frame")} == layout
        if stored:
            kept = {**optimizer.state[p], "frame.0.rank": torch.tensor(4)}
            drawn = Seeded().load(kept, (12, 20), torch.zeros(4, 20))
            assert torch.equal(optimizer.state[p]["frame.0"], drawn.factors[0])
        for rank in (4, 6):
            q, other = lone(p.detach().clone(), rank=rank, **given)
            other.load_state_dict(optimizer.state_dict())
            for t in range(4):
                step(other, q, randn((12, 20), torch.float32, 20 + t))
            weights[stored, rank] = q.detach().clone()
    for rank in (4, 6):
        assert torch.equal(weights[False, rank], weights[True, rank])
    with pytest.raises(ValueError, match="stored"):
        Seeded(stored="yes")


# ------------------------------------------------------------------------------------------------ awkward operands


@pytest.mark.parametrize(("finder", "layout"), NEW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, COMPLEX], ids=str)
@pytest.mark.parametrize("kind", ["identity", "equal pairs", "rank one", "zero", "constant"])
def test_awkward_operands_yield_a_frame_with_the_energy_there_is(finder, layout, dtype, kind):
    d, ranks = 12, (4, None)
    u = torch.linalg.qr(randn((d, d), dtype)).Q
    x = {
        "identity": torch.eye(d, dtype=dtype),
        "equal pairs": u * torch.tensor([3.0, 3, 2, 2] + [0.1] * 8).to(dtype) @ u.mH,
        "rank one": u[:, :1] @ u[:1],
        "zero": torch.zeros(d, d, dtype=dtype),
        "constant": torch.ones(d, d, dtype=dtype),
    }[kind]
    for warm in (False, True):
        _, frame = search(finder, x, ranks, warm, layout=layout)
        assert frame.ranks == ranks
        assert frame.defect() < 100 * torch.finfo(dtype).eps
        energy = {"identity": 4.0, "equal pairs": 26.0, "rank one": 1.0, "zero": 0.0, "constant": 144.0}[kind]
        if isinstance(finder, Randomized | IncrementalSVD):
            assert frame.project(x).norm() ** 2 >= 0.98 * energy
        exactly = {Nystroem: ("identity", "rank one", "zero", "constant"), CosineSelection: ("zero", "constant")}
        if kind in exactly.get(type(finder), ()):
            assert frame.project(x).norm() ** 2 == pytest.approx(energy, rel=1e-3)


def test_small_problems_are_solved_in_double_precision():
    """Singular values of 1e-5 of the largest, whose squares float32 would lose."""
    u, v = torch.linalg.qr(randn((6, 6))).Q, torch.linalg.qr(randn((9, 6), seed=1)).Q
    a = (u * torch.tensor([1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5], dtype=REAL) @ v.T).float()
    vectors, values = turning(a, 5)
    close(values.double(), torch.tensor([1, 1e-1, 1e-2, 1e-3, 1e-4], dtype=REAL), 1e-6)
    assert (vectors.double().T @ u[:, :5]).abs().diagonal().min() > 1 - 1e-4
    assert vectors.dtype is values.dtype is torch.float32


# --------------------------------------------------------------------------------------------- in the optimizer


def train(model, optimizer, start, stop):
    for t in range(start, stop):
        for i, p in enumerate(model.parameters()):
            field = torch.complex64 if p.is_complex() else torch.float32
            p.grad = p.detach() + 0.3 * randn(p.shape, field, 10 * t + i).to(p.dtype)
        optimizer.step()


def model_of(dtype=torch.float32):
    parameters = {
        "wide": randn((16, 24), torch.float32, 1).to(dtype),
        "tall": randn((24, 12), torch.float32, 2).to(dtype),
        "tensor": randn((10, 12, 9), torch.float32, 3).to(dtype),
        "spectral": randn((12, 16), torch.complex64, 4),
    }
    return torch.nn.ParameterDict({name: torch.nn.Parameter(x) for name, x in parameters.items()})


def build(model, finder, layout, rank=4, **options):
    options = {"residual": Feedback(), "refresh_every": 3, "lr": 0.05, **options}
    return LowRankOptimizer(model.named_parameters(), rank=rank, frame=layout, finder=finder, **options)


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(one, other):
    """Models and states of two (model, optimizer) pairs agree bit by bit, with dtypes."""
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
        first, second = one[1].state[a], other[1].state[b]
        assert first.keys() == second.keys()
        for name, x in first.items():
            if isinstance(x, torch.Tensor):
                assert x.dtype == second[name].dtype
                assert torch.equal(x, second[name]), name
            else:
                assert x == second[name]


def loss(model):
    return sum(float(p.detach().abs().float().square().sum()) for p in model.parameters())


@pytest.mark.parametrize(("finder", "layout"), NEW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_resumes_bitwise_across_refreshes(finder, layout, dtype):
    """From a file, from a deep copy, with bf16 parameters too: draws, energies, singular values, indices and seeds."""
    model = model_of(dtype)
    optimizer = build(model, finder, layout)
    start, saved = loss(model), {}
    for t in range(12):
        if t in ((1, 4) if dtype is torch.float32 else (3, 8)):
            saved[t] = copy.deepcopy(model), through_file(optimizer.state_dict()), copy.deepcopy((model, optimizer))
        train(model, optimizer, t, t + 1)
    assert loss(model) < 0.98 * start
    for t, (resumed, state, twins) in saved.items():
        other = build(resumed, finder, layout, lr=1.0)
        other.load_state_dict(state)
        train(resumed, other, t, 12)
        assert_same((model, optimizer), (resumed, other))
        train(*twins, t, 12)
        assert_same((model, optimizer), twins)
    for p in model.parameters():
        for x in optimizer.state[p].values():
            assert not isinstance(x, torch.Tensor) or x.dtype != torch.bfloat16


@pytest.mark.parametrize(("finder", "layout"), NEW, ids=str)
def test_distributed_checkpoints_carry_what_is_remembered(finder, layout):
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for flatten in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        model = model_of()
        optimizer = build(model, finder, layout)
        train(model, optimizer, 0, 4)
        resumed = copy.deepcopy(model)
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        other = build(resumed, finder, layout)
        set_optimizer_state_dict(resumed, other, state, options=options)
        train(model, optimizer, 4, 8)
        train(resumed, other, 4, 8)
        assert_same((model, optimizer), (resumed, other))


@pytest.mark.parametrize(("finder", "layout"), NEW, ids=str)
@pytest.mark.parametrize(("old", "new"), [(3, 6), (6, 3)])
def test_a_checkpoint_of_another_rank_is_carried_over(finder, layout, old, new):
    model = model_of()
    source = build(model, finder, layout, rank=old, transport=Carry())
    train(model, source, 0, 5)
    target = build(model, finder, layout, rank=new, transport=Carry())
    target.load_state_dict(through_file(source.state_dict()))
    before = loss(model)
    train(model, target, 5, 12)
    for p, site in target.sites.items():
        assert cells(target, p)[0].frame.ranks == site.ranks
        assert target.state[p]["moment.first"].shape == site.core_shape
        assert max(r for r in site.ranks if r is not None) == new
    assert loss(model) < 0.98 * before


@pytest.mark.parametrize(("finder", "layout"), NEW, ids=str)
def test_the_state_of_torchs_adamw_is_carried_over(finder, layout):
    model = model_of()
    source = torch.optim.AdamW(model.parameters(), lr=0.02)
    train(model, source, 0, 4)
    target = build(model, finder, layout)
    target.load_state_dict(through_file(source.state_dict()))
    before = loss(model)
    train(model, target, 4, 10)
    assert loss(model) < before


@pytest.mark.parametrize(("finder", "layout"), NEW, ids=str)
def test_a_step_with_a_bad_gradient_changes_nothing(finder, layout):
    """At a refresh too: the flag on the device puts draws, seeds and indices back."""
    model, alike = model_of(), model_of()
    optimizer, other = (build(m, finder, layout, on_nonfinite="skip") for m in (model, alike))
    train(model, optimizer, 0, 3)
    train(alike, other, 0, 3)
    before = {p: copy.deepcopy(optimizer.state[p]) for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alike.parameters(), strict=True))
    for p, slots in before.items():
        for name, x in slots.items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, optimizer.state[p][name]), name


def test_only_indices_and_seeds_are_stored():
    p = torch.nn.Parameter(torch.zeros(64, 80))
    bytes_of = {}
    for finder, layout in ((Power(), Modes()), (CosineSelection(), Cosines()), (RandomProjection(), Seeded())):
        optimizer = LowRankOptimizer([p], rank=16, frame=layout, finder=finder, diagnostics=False)
        step(optimizer, p, randn((64, 80), torch.float32))
        state = optimizer.state[p]
        stored = {name: x for name, x in state.items() if name.startswith("frame.")}
        bytes_of[type(layout)] = state_bytes(optimizer)
        assert state_bytes(optimizer) == comoving.explain(optimizer).state_bytes
        assert bytes_of[type(layout)] == 2 * 16 * 80 * 4 + 4 + sum(x.nbytes for x in stored.values())
        if layout == Cosines():
            assert {n: (x.shape, x.dtype) for n, x in stored.items()} == {"frame.0.indices": ((16,), torch.int64)}
        if layout == Seeded():
            one = ((), torch.int64)
            assert {n: (x.shape, x.dtype) for n, x in stored.items()} == {"frame.0.seed": one, "frame.0.rank": one}
            assert {x.device.type for x in stored.values()} == {"cpu"}
    assert bytes_of[Modes] - bytes_of[Cosines] == 64 * 16 * 4 - 16 * 8
    assert bytes_of[Modes] - bytes_of[Seeded] == 64 * 16 * 4 - 2 * 8


def test_a_state_on_another_device_leaves_seeds_and_counts_on_the_host():
    """On the meta device, where nothing could be read back."""
    from comoving.codecs import Spec  # noqa: PLC0415
    from comoving.state import zeros  # noqa: PLC0415

    meta = torch.device("meta")
    parts = {
        "seed": Spec((), torch.int64, scalar=True),
        "step": Spec((), torch.float32, scalar=True),
        "indices": Spec((3,), torch.int64),
    }
    made = zeros(parts, meta, meta)
    assert {name: x.device.type for name, x in made.items()} == {"seed": "cpu", "step": "meta", "indices": "meta"}
    assert int(made["seed"]) == 0


@pytest.mark.parametrize("finder", [finder for finder, _ in [*FREE, (Exact(), None), (Power(), None)]], ids=str)
@pytest.mark.parametrize("layout", [Cosines(), Seeded()], ids=str)
def test_finders_and_frames_that_do_not_fit_are_refused_with_both_names(finder, layout):
    p = torch.nn.Parameter(torch.zeros(16, 24))
    for wrong, place in ((finder, layout), (CosineSelection(), Modes()), (RandomProjection(), Cosines())):
        says = rf"{type(wrong).__name__}\(.*{type(place).__name__}\(.*{place.makes.__name__}"
        with pytest.raises(TypeError, match=says):
            LowRankOptimizer([p], rank=4, frame=place, finder=wrong)
        start = place.start(p.detach(), (4, None), None, 0)
        with pytest.raises(TypeError, match=rf"{type(wrong).__name__}\(.*got a {type(start).__name__}"):
            wrong.find(Operand(randn((16, 24), torch.float32)), start, True, {})
    optimizer = LowRankOptimizer([p], rank=4)
    with pytest.raises(TypeError, match="cannot fill"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(16, 24))], "frame": layout})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("randomized(reads=2)", Randomized(reads=2)), ("nystroem(columns='energy')", Nystroem(columns="energy")),
        ("oja(rate=0.5)", Oja(rate=0.5)), ("incremental(add=4)", IncrementalSVD(add=4)),
        ("cosine", CosineSelection()), ("random", RandomProjection()),
    ],
)  # fmt: skip
def test_finders_by_name(text, expected):
    assert part("finder", text) == expected
    assert (part("frame", "cosines"), part("frame", "seeded")) == (Cosines(), Seeded())


# ------------------------------------------------------------------------------------------------- one of one's own


@dataclass(frozen=True)
class Toy(Memoryless):
    """Left singular vectors, and nothing else: all that a finder of one's own takes."""

    batched: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    ahead: ClassVar[int] = 0
    fills = (ModeFrame,)
    inertia: float = 0.5

    def find(self, operand, start, warm, memory):
        x = operand.full()
        x = x / x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
        if not x.any():
            return start
        factors = (
            None if u is None else torch.linalg.svd(unfold(x, n, x.ndim)).U[:, : u.shape[1]].contiguous()
            for n, u in enumerate(start.factors)
        )
        return ModeFrame(tuple(factors))


@pytest.mark.parametrize("side", contract.SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, COMPLEX], ids=str)
def test_a_finder_of_ones_own_passes_the_contract(side, dtype):
    """What mode-wise finders promise beyond the contract of subspaces, which has a toy of its own."""
    for size in (1e-27, 1e27):
        contract.test_the_size_of_the_operand_does_not_matter(Toy(), side, dtype, size)
    if side != "more than the columns":
        contract.test_an_operand_in_two_terms_is_the_sum(Toy(), Modes(), side, COMPLEX)


@pytest.mark.parametrize("transport", [Keep(), Rotate(), Carry()], ids=str)
def test_a_finder_of_ones_own_trains(transport):
    model = model_of()
    optimizer = build(model, Toy(), Modes(), transport=transport)
    before = loss(model)
    train(model, optimizer, 0, 40)
    assert loss(model) < 0.8 * before
