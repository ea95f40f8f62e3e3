"""Finders of Tucker factors: what each of them is for, beyond what the contract asks of all."""

import copy
import io
from dataclasses import replace

import pytest
import torch

import comoving
from comoving import LowRankOptimizer
from comoving.finders import (
    Exact,
    Nystroem,
    Operand,
    Power,
    Randomized,
    StreamingTucker,
)
from comoving.finders.kronecker import widths
from comoving.frames import ModeFrame, Modes
from comoving.linalg import all_but_one, multilinear, unfold
from comoving.parts import part
from comoving.residual import Feedback
from comoving.transport import Rotate
from contract.support import COMPLEX, REAL, close, known_rank, lone, look, randn, random_frame, step

HOOI = Exact(sweeps=1, sequential=True, warm=True)
SAMPLED = Nystroem(samples=0.02)
ENERGY = Nystroem(columns="energy")
SLICES = Nystroem(samples=0.02, columns="slices")
TUCKER = [
    Exact(),
    Exact(sequential=True),
    HOOI,
    Randomized(oversampling=0, reads=1, sequential=True),
    Randomized(reads=2, sequential=True),
    Randomized(reads=2),
    Nystroem(samples=0.2),
    Nystroem(samples=0.2, columns="slices"),
    StreamingTucker(oversampling=0),
    StreamingTucker(),
]
ONE_READ = [TUCKER[3], *TUCKER[-2:]]
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
CORES = [((9, 10, 8), (2, 3, 2)), ((6, 5, 7, 4), (2, None, 3, 2)), ((5, 4, 6, 3, 4), (2, 2, 3, None, 2))]
TENSORS = pytest.mark.parametrize(("shape", "ranks"), CORES, ids=["N=3", "N=4", "N=5"])


def cold(finder, x, ranks):
    return look(finder, Operand(x), Modes().start(x, ranks, None, 0), False)


def memory_of(finder, x, ranks):
    schema = finder.schema(tuple(x.shape), ranks, x.dtype)
    return {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in schema.items()}


def error(frame, x):
    return float((x - frame.lift(frame.project(x))).norm() / x.norm())


def energy(frame, x):
    return float(frame.project(x).norm() ** 2 / x.norm() ** 2)


def decaying(shape, dtype=REAL, rate=0.7, seed=0):
    """A tensor whose mode-wise singular values fall, in random bases."""
    x = randn(shape, dtype, seed)
    for n, d in enumerate(shape):
        scale = rate ** torch.arange(d, dtype=REAL)
        x = x * scale.reshape([-1 if m == n else 1 for m in range(len(shape))])
    full = [torch.linalg.qr(randn((d, d), dtype, seed + 50 + n)).Q for n, d in enumerate(shape)]
    return multilinear(x, full)


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("finder", TUCKER, ids=str)
@TENSORS
@FIELDS
def test_a_tensor_of_known_multilinear_rank_is_recovered(finder, shape, ranks, dtype):
    x = known_rank(shape, ranks, dtype, 5)
    frame = cold(finder, x, ranks)
    assert error(frame, x) < 1e-6
    assert error(cold(finder, x, tuple(r and r - 1 for r in ranks)), x) > 1e-2  # one direction fewer is not enough


@pytest.mark.parametrize("finder", TUCKER, ids=str)
@FIELDS
def test_hard_spectra(finder, dtype):
    """Size-1 modes, repeated singular values, fewer columns than directions: an orthonormal frame that holds all."""
    one = known_rank((1, 8, 9, 1, 7), (None, 2, 2, None, 2), dtype)
    assert error(cold(finder, one, (None, 2, 2, None, 2)), one) < 1e-6
    equal = torch.zeros(6, 6, 6, dtype=dtype)
    equal[range(3), range(3), range(3)] = 1.0
    equal = random_frame((6, 6, 6), (6, 6, 6), dtype).lift(equal)
    assert error(cold(finder, equal, (3, 3, 3)), equal) < 1e-6
    narrow = randn((9, 2, 2), dtype)
    frame = cold(finder, narrow, (6, None, None))
    assert error(frame, narrow) < 1e-6
    assert frame.defect() < 1e-12


@pytest.mark.parametrize("finder", TUCKER, ids=str)
@TENSORS
@FIELDS
def test_close_to_the_hosvd_on_a_falling_spectrum(finder, shape, ranks, dtype):
    x = decaying(shape, dtype, 0.5)
    best = energy(cold(Exact(sweeps=20), x, ranks), x)
    assert energy(cold(finder, x, ranks), x) > (0.85 if finder in ONE_READ else 0.95) * best
    assert energy(random_frame(shape, ranks, dtype), x) < 0.8 * best


DRAWING = [Randomized(oversampling=2), Randomized(oversampling=2, sequential=True), SLICES, Nystroem(), ENERGY]


@pytest.mark.parametrize("finder", DRAWING, ids=str)
def test_draws_differ_between_refreshes_and_seeds_and_repeat_from_the_memory(finder):
    x, ranks = randn((12, 11, 10)), (3, 3, 3)
    memory = memory_of(finder, x, ranks)
    finder.observe(x, memory)
    start = Modes().start(x, ranks, None, 0)
    kept = {name: value.clone() for name, value in memory.items()}
    first, second = (finder.find(Operand(x), start, True, memory) for _ in range(2))
    again = finder.find(Operand(x), start, True, kept)
    other = replace(finder, seed=1)
    elsewhere = look(other, Operand(x), start, True)
    assert int(memory["draws"]) == 2
    for u, v, w, z in zip(first.factors, second.factors, again.factors, elsewhere.factors, strict=True):
        assert torch.equal(u, w)
        assert not torch.allclose(u @ u.mH, v @ v.mH)
        assert not torch.allclose(u @ u.mH, z @ z.mH)


RESUMED = [Randomized(sequential=True), SLICES, SAMPLED, StreamingTucker(), HOOI]


@pytest.mark.parametrize("finder", RESUMED, ids=str)
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(finder, stop):
    """Saved before, at and after a refresh, through a file."""
    shape = (12, 10, 9)
    options = {"rank": 3, "finder": finder, "transport": Rotate(), "residual": Feedback(), "refresh_every": 4}
    p, optimizer = lone(randn(shape, torch.complex64), lr=1e-2, **options)
    q = saved = None
    for t in range(10):
        if t == stop:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            q, saved = torch.nn.Parameter(p.detach().clone()), torch.load(file, weights_only=True)
        step(optimizer, p, randn(shape, torch.complex64, t))
    resumed = LowRankOptimizer([q], lr=0.5, **options)
    resumed.load_state_dict(saved)
    for t in range(stop, 10):
        step(resumed, q, randn(shape, torch.complex64, t))
    assert torch.equal(p, q)
    assert any(name.startswith("finder.") for name in optimizer.state[p]) is (finder != HOOI)
    for name, value in optimizer.state[p].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[q][name])), name


@pytest.mark.parametrize("finder", RESUMED, ids=str)
@pytest.mark.parametrize("rank", [(2, 5, None), (None, 4, 2), (6, 6, 6)])
def test_a_checkpoint_of_other_ranks_is_carried_over(finder, rank):
    """Sketches of other sizes start anew; the run goes on, with moments carried."""
    shape = (12, 10, 9)
    p, optimizer = lone(randn(shape), lr=1e-2, rank=(3, 3, None), finder=finder, transport=Rotate(), refresh_every=4)
    for _ in range(3):
        step(optimizer, p, known_rank(shape, (2, 2, 2), seed=7))
    other = LowRankOptimizer([p], 1e-2, rank, finder=finder, transport=Rotate(), refresh_every=4)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(6):
        step(other, p, known_rank(shape, (2, 2, 2), seed=7))
    wanted = {f"finder.{name}": spec.shape for name, spec in finder.schema(shape, rank, REAL).items()}
    state = other.state[p]
    assert {name: tuple(x.shape) for name, x in state.items() if name.startswith("finder.")} == wanted
    frame = Modes().load(state, shape)
    assert frame.ranks == tuple(r if r != d else None for r, d in zip(rank, shape, strict=True))
    assert error(frame, known_rank(shape, (2, 2, 2), seed=7)) < 1e-5


@pytest.mark.parametrize("recipe", ["nystrom-tucker-adam", "streaming-tucker-adam"])
@FIELDS
def test_recipes_descend_like_tucker_adam(recipe, dtype):
    """|W - T|^2 with noisy gradients: within a quarter of the decrease that warm power iteration reaches."""
    shape, target = (12, 10, 9), decaying((12, 10, 9), dtype, 0.6) * 10
    losses = {}
    for name in (recipe, "tucker-adam"):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = comoving.build(name, model, 3e-2, rank=0.2, weight_decay=0.0)
        for t in range(150):
            step(optimizer, model.weight, model.weight.detach() - target + 0.1 * randn(shape, dtype, t))
        losses[name] = float((model.weight.detach() - target).norm() / target.norm())
    assert losses["tucker-adam"] < 0.7
    assert losses[recipe] < 1.25 * losses["tucker-adam"]


def test_by_name():
    assert part("finder", "streaming_tucker(decay=0.5)") == StreamingTucker(decay=0.5)
    assert part("finder", "nystroem(samples=7, columns='slices')") == Nystroem(samples=7, columns="slices")
    assert part("finder", "exact(sweeps=1, sequential=True, warm=True)") == HOOI


# -------------------------------------------------------------------------------------------------- HOSVD and HOOI


@TENSORS
@FIELDS
def test_sequential_truncation_is_near_the_best_and_hooi_no_worse_than_its_start(shape, ranks, dtype):
    compressed = sum(r is not None for r in ranks)
    for seed in range(4):
        x = randn(shape, dtype, seed)  # a flat spectrum, where the methods differ
        tails = [
            float(torch.linalg.svdvals(unfold(x, n, x.ndim))[r:].square().sum())
            for n, r in enumerate(ranks)
            if r is not None
        ]
        sequential = error(cold(Exact(sequential=True), x, ranks), x) * float(x.norm())
        iterated = error(cold(replace(HOOI, sweeps=3), x, ranks), x) * float(x.norm())
        hosvd = error(cold(Exact(), x, ranks), x) * float(x.norm())
        # No approximation is better than the worst mode's tail: a lower bound of the best error.
        assert max(tails) ** 0.5 - 1e-9 <= sequential <= sum(tails) ** 0.5 + 1e-9 <= compressed**0.5 * max(tails) ** 0.5
        assert iterated <= min(sequential, hosvd) + 1e-9
        assert iterated < sequential - 1e-6


@FIELDS
def test_each_sweep_from_the_last_frame_captures_no_less(dtype):
    x, ranks = randn((8, 7, 9), dtype), (3, 2, 3)
    frame, seen = cold(Exact(sequential=True), x, ranks), []
    for _ in range(6):
        seen.append(energy(frame, x))
        frame = HOOI.find(Operand(x), frame, True, {})
    assert all(b >= a - 1e-12 for a, b in zip(seen, seen[1:], strict=False))
    assert seen[-1] > seen[0] + 1e-4
    together = replace(HOOI, sweeps=5).find(Operand(x), cold(Exact(sequential=True), x, ranks), True, {})
    assert energy(together, x) == pytest.approx(seen[5])


def test_a_frame_that_sees_nothing_is_not_warm():
    x = known_rank((9, 8, 7), (2, 2, 2), seed=3)
    blind = ModeFrame(
        tuple(torch.linalg.svd(unfold(x, n, 3)).U[:, -2:].contiguous() for n in range(3))
    )  # orthogonal to all of x
    assert energy(blind, x) < 1e-20
    assert error(HOOI.find(Operand(x), blind, True, {}), x) < 1e-6


def test_going_on_without_a_sweep_is_refused():
    with pytest.raises(ValueError, match="sweeps must be >= 1 where warm=True"):
        Exact(warm=True)


@FIELDS
def test_the_mode_that_shrinks_most_goes_first(dtype):
    """Its factor is the HOSVD's; that of the others is not, for they see what it leaves."""
    x, ranks = randn((6, 8, 7), dtype), (4, 1, 3)
    sequential, hosvd = cold(Exact(sequential=True), x, ranks), cold(Exact(), x, ranks)
    gaps = [float((u @ u.mH - v @ v.mH).norm()) for u, v in zip(sequential.factors, hosvd.factors, strict=True)]
    assert gaps[1] < 1e-9
    assert min(gaps[0], gaps[2]) > 1e-3


@TENSORS
def test_errors_are_those_of_tensorly(shape, ranks):
    tensorly = pytest.importorskip("tensorly")
    decomposition = pytest.importorskip("tensorly.decomposition")
    x = randn(shape)
    rank = [d if r is None else r for d, r in zip(shape, ranks, strict=True)]

    def theirs(sweeps):
        # The backend is global, and another library may have set it.
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            found = decomposition.tucker(x, rank=rank, n_iter_max=sweeps, init="svd", tol=0)
            return float((tensorly.tucker_to_tensor(found) - x).norm() / x.norm())

    for ours in (replace(HOOI, sweeps=30), Exact(sweeps=30)):
        assert error(cold(ours, x, ranks), x) == pytest.approx(theirs(30), rel=2e-2)
    assert error(cold(Exact(sweeps=1), x, ranks), x) == pytest.approx(theirs(1), rel=1e-6)


# ------------------------------------------------------------------------------------------------ streamed sketches


@FIELDS
@pytest.mark.parametrize("shape", [(5,), (5, 6), (4, 3, 5), (4, 3, 5, 2), (3, 2, 4, 2, 3)])
def test_products_over_all_modes_but_one(shape, dtype):
    x = randn(shape, dtype)
    matrices = [None if n == 1 else randn((2, d), dtype, n) for n, d in enumerate(shape)]
    for modes in (range(len(shape)), (0,), (len(shape) - 1,)):
        results = all_but_one(x, matrices, modes)
        assert set(results) == set(modes)
        for n, y in results.items():
            close(y, multilinear(x, [a if m != n else None for m, a in enumerate(matrices)]))
    frame = random_frame(shape, tuple(2 if n % 2 == 0 else None for n in range(len(shape))), dtype, 4)
    w = frame.project(randn(shape, dtype, 5))
    whole = 0.3 * x + frame.lift(w)
    for n, y in Operand(x, 0.3, frame, w).sketches(matrices, range(len(shape))).items():
        close(y, all_but_one(whole, matrices, (n,))[n])


def test_sketches_are_as_wide_as_asked_and_hardly_wider():
    assert widths((24, 24, 16, 9), {0: 20, 1: 20, 2: 17, 3: 13}) == (4, 4, 4, 4)
    assert widths((64, 256), {0: 24}) == (4, 24)
    assert widths((6, 5), {0: 9, 1: 9}) == (6, 5)  # no more than there are columns
    assert widths((1, 7, 9), {1: 4, 2: 5}) == (1, 5, 4)


@FIELDS
def test_without_decay_it_is_the_sketch_of_the_sum(dtype):
    shape, ranks = (9, 7, 8), (3, None, 2)
    finder = StreamingTucker(decay=1.0, newest=0.0)
    stream = [randn(shape, dtype, t) for t in range(12)]
    memory, summed = memory_of(finder, stream[0], ranks), memory_of(finder, stream[0], ranks)
    for g in stream:
        finder.observe(g, memory)
    finder.observe(sum(stream), summed)
    assert set(memory) == {"sketch.0", "sketch.2"}
    for name, sketch in memory.items():
        close(sketch, summed[name], 1e-10)
    start = Modes().start(stream[0], ranks, None, 0)
    for u, v in zip(*(finder.find(Operand(stream[0]), start, True, m).factors for m in (memory, summed)), strict=True):
        if u is not None:
            close(u @ u.mH, v @ v.mH, 1e-7)
    assert all(x.shape[n] == shape[n] for n, x in zip((0, 2), memory.values(), strict=True))


def test_the_newest_gradient_weighs_what_the_decay_says():
    shape, ranks = (9, 7, 8), (2, 2, 2)
    for decay in (0.5, 0.9):
        finder = StreamingTucker(decay=decay)
        old, new = randn(shape, seed=1), randn(shape, seed=2)
        memory, expected = memory_of(finder, old, ranks), memory_of(finder, old, ranks)
        finder.observe(old, memory)
        finder.observe(new, memory)
        finder.observe(decay * old + new, expected)
        for name, sketch in memory.items():
            close(sketch, expected[name], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_it_follows_a_turning_subspace_and_less_decay_follows_sooner(dtype):
    shape, ranks, quarter = (12, 11, 10), (2, 2, 2), 200
    before, after = random_frame(shape, ranks, dtype, 1), random_frame(shape, ranks, dtype, 2)
    core = randn((2, 2, 2), dtype, 3)
    lags = {}
    for decay in (0.8, 0.98):
        finder = StreamingTucker(decay=decay, newest=0.0)
        memory, captured = memory_of(finder, core.new_zeros(shape), ranks), []
        frame = Modes().start(core.new_zeros(shape), ranks, None, 0)
        for t in range(quarter):
            a = torch.tensor(t / quarter * torch.pi / 2)
            turning = tuple(
                torch.linalg.qr(torch.cos(a) * u + torch.sin(a) * v).Q
                for u, v in zip(before.factors, after.factors, strict=True)
            )
            g = ModeFrame(turning).lift(core)
            finder.observe(g + 0.005 * randn(shape, dtype, 10 + t), memory)
            frame = finder.find(Operand(g), frame, t > 0, memory)
            captured.append(energy(frame, g))
        lags[decay] = min(captured[20:])
    assert lags[0.8] > 0.98
    assert lags[0.98] < lags[0.8] - 0.01


def test_the_sketch_is_near_the_hosvd_of_the_decayed_sum():
    shape, ranks = (16, 15, 14), (5, 5, 5)
    finder = StreamingTucker(newest=0.0)
    total, memory = torch.zeros(shape, dtype=REAL), memory_of(finder, torch.zeros(shape, dtype=REAL), ranks)
    for t in range(30):
        g = decaying(shape, rate=0.5) + 0.1 * decaying(shape, rate=0.9, seed=1 + t)
        finder.observe(g, memory)
        total = 0.9 * total + g
    frame = finder.find(Operand(total), Modes().start(total, ranks, None, 0), True, memory)
    assert energy(frame, total) > 0.98 * energy(cold(Exact(), total, ranks), total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_thousands_of_gradients_leave_all_finite_and_orthonormal(dtype, decay):
    shape, ranks = (5, 4, 6), (2, 2, 3)
    finder = StreamingTucker(decay=decay, oversampling=2)
    memory = memory_of(finder, torch.zeros(shape, dtype=dtype), ranks)
    stream = [randn(shape, dtype, t) * 10.0 ** (t % 9 - 4) for t in range(27)]
    frame = Modes().start(stream[0], ranks, None, 0)
    for t in range(2_700):
        finder.observe(stream[t % 27], memory)
        if t % 500 == 499:
            frame = finder.find(Operand(stream[t % 27]), frame, True, memory)
            assert frame.defect() < 1e-5
    assert all(sketch.isfinite().all() for sketch in memory.values())
    assert all(u.isfinite().all() for u in frame.factors)
    total = sum(decay ** (26 - t) * g for t, g in enumerate(stream))
    assert energy(frame, total) > energy(random_frame(shape, ranks, dtype), total)


def test_feedback_that_no_gradient_shows_is_found_by_its_sketch_alone():
    """A steady gradient fills one direction; what error feedback holds outside it comes in by ``newest``."""
    shape, ranks = (8, 9, 7), (1, 1, 1)
    weak, strong = known_rank(shape, ranks, seed=1), known_rank(shape, ranks, seed=2)
    weak, strong = weak / weak.norm(), strong / strong.norm()
    for newest, sees in ((0.0, False), (1.0, True)):
        finder = StreamingTucker(newest=newest)
        memory = memory_of(finder, weak, ranks)
        for _ in range(5):
            finder.observe(weak, memory)
        frame = finder.find(Operand(weak + 40 * strong), Modes().start(weak, ranks, None, 0), True, memory)
        assert (energy(frame, strong) > 0.9) is sees


@FIELDS
def test_no_single_draw_spoils_a_sketch(dtype):
    """A Kronecker product shares the luck of each of its Gaussian vectors among all columns, so there are enough."""
    shape, ranks = (5, 4, 6, 3, 4), (2, 2, 2, 2, 2)
    shares = []
    for seed in range(20):
        x = decaying(shape, dtype, 0.5, seed)
        best = energy(cold(Exact(), x, ranks), x)
        shares.append(energy(cold(StreamingTucker(seed=seed), x, ranks), x) / best)
    assert min(shares) > 0.8
    assert sorted(shares)[10] > 0.95


def test_memory_is_small():
    """No part as large as the tensor, and the whole of it a few columns per mode."""
    shape, ranks = (64, 64, 16, 9), (25, 25, 7, 4)
    schema = StreamingTucker().schema(shape, ranks, torch.complex64)
    assert sum(torch.Size(p.shape).numel() for p in schema.values()) < 0.02 * torch.Size(shape).numel()
    assert {p.dtype for p in schema.values()} == {torch.complex64}
    energies = SLICES.schema(shape, ranks, torch.complex64)
    assert {name: p.shape for name, p in energies.items()} == {
        "draws": (), "energy.0": (64,), "energy.1": (64,), "energy.2": (16,), "energy.3": (9,)
    }  # fmt: skip
    assert set(SAMPLED.schema(shape, ranks, REAL)) == {"draws"}


@pytest.mark.parametrize("warm", [True, False])
def test_power_is_exact_in_short_modes_alone(warm):
    x, start = randn((6, 12, 8)), Modes().start(randn((6, 12, 8)), (3, 4, 2), None, 1)
    found = Power(exact_up_to=8).find(Operand(x), start, warm, {}).factors
    exact = Exact().find(Operand(x), start, warm, {}).factors
    iterated = Power().find(Operand(x), start, warm, {}).factors
    for u, e, p, short in zip(found, exact, iterated, (True, False, True), strict=True):
        assert torch.equal(u, e if short else p)
        assert not torch.equal(e, p)
