"""Published relatives that are compositions of finders and frames, each against its float64 reference."""

import copy
import io

import pytest
import torch

import comoving
from comoving import LowRankOptimizer
from comoving.codecs import Full
from comoving.finders import Correlation, CosineSelection, Operand
from comoving.finders.base import DRAWS
from comoving.frames import Cosines, ModeFrame
from comoving.precondition import Factored
from comoving.residual import Feedback, Passage
from comoving.rules import Momentum
from contract.support import COMPLEX, REAL, Holder, close, frame_of, randn, random_frame, step
from references.adafactor import Adafactor
from references.algebra import every
from references.coap import Coap, calibrated
from references.dct_adamw import DctAdamW
from references.flora import Flora
from references.online_subspace_descent import OnlineSubspaceDescent, oja

HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
STEPS = 50
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
MATRICES = pytest.mark.parametrize("shape", [(9, 12), (12, 9), (10, 10)], ids=["wide", "tall", "square"])


def gradients(shape, dtype, steps=STEPS):
    """A drifting signal in noise."""
    low, high = randn(shape, dtype, 10), randn(shape, dtype, 11)
    return [low * (1 - t / steps) + high * (t / steps) + 0.5 * randn(shape, dtype, 500 + t) for t in range(steps)]


def build(recipe, shape, dtype, **options):
    """One parameter, hence refreshes at multiples of the period."""
    model = Holder(randn(shape, dtype, 1))
    optimizer = comoving.build(recipe, model, rank=3, **(HYPER | options))
    (p,) = model.parameters()
    assert optimizer.sites[p].projected
    return p, optimizer


def ours(optimizer, p, left):
    """The basis as the references have it: G Q = G x_2 U^H needs Q = conj(U)."""
    group, state = optimizer.param_groups[0], optimizer.state[p]
    factors = group["frame"].load(state, tuple(p.shape), state["moment.first"]).factors
    return factors[0].clone() if left else factors[1].conj().resolve_conj().clone()


def same_span(a, b, tolerance=1e-9):
    close(a @ a.mH, b @ b.mH, tolerance)


# ------------------------------------------------------------------------------------------------------------- Flora


def scaled(scale):
    """A reference without a scale: lr times it, and the decay divided by it."""
    return {"lr": HYPER["lr"] * scale, "weight_decay": HYPER["weight_decay"] / scale, "beta": HYPER["betas"][0]}


@FIELDS
@MATRICES
@pytest.mark.parametrize("base", ["adafactor", "sgd"])
def test_flora(base, shape, dtype):
    left = shape[0] <= shape[1]
    precondition = Factored(decay=0.7, floor=1e-4, clip=None) if base == "adafactor" else "plain"
    p, optimizer = build("flora", shape, dtype, precondition=precondition, refresh_every=7, scale=0.6)
    options = {"base": base, "decay_rate": -0.7, "square_eps": 1e-4, "clip": 1e30}
    find = lambda w, old: ours(optimizer, p, left)  # noqa: E731
    reference = Flora(p.detach(), rank=3, refresh_at=every(7), find=find, **options, **scaled(0.6))
    seen = []
    for t, g in enumerate(gradients(shape, dtype)):
        step(optimizer, p, g)
        close(p.detach(), reference.step(g))
        close(optimizer.state[p]["moment.first"], reference.m)
        seen.append(ours(optimizer, p, left))
        close(seen[-1].mH @ seen[-1], torch.eye(3, dtype=dtype))
        assert torch.equal(seen[-1], seen[t - 1]) == (t % 7 != 0 or t == 0)
    if base == "adafactor":
        close(optimizer.state[p]["precondition.0"], reference.row.flatten())
        close(optimizer.state[p]["precondition.1"], reference.column.flatten())


@FIELDS
@pytest.mark.parametrize("shape", [(9, 12), (12, 9)])
def test_flora_accumulates_in_the_subspace(shape, dtype):
    """Algorithm 1 with the frame of Algorithm 2: gradients are compressed as they come."""
    left = shape[0] <= shape[1]
    p, optimizer = build("flora", shape, dtype, precondition="plain", refresh_every=4, scale=0.6)
    find = lambda w, old: ours(optimizer, p, left)  # noqa: E731
    options = {"window": 2, "mean": False, "find": find, "find_accumulator": find}
    reference = Flora(p.detach(), rank=3, refresh_at=every(4), **options, **scaled(0.6))
    series = gradients(shape, dtype)
    for first, second in zip(series[::2], series[1::2], strict=True):
        optimizer.absorb(p, first)
        assert optimizer.state[p]["core"].shape == optimizer.sites[p].core_shape
        optimizer.absorb(p, second)
        optimizer.apply(p)
        reference.step(first)
        close(p.detach(), reference.step(second))


def test_flora_in_the_mean_keeps_a_share_of_its_momentum():
    """Orthonormal, not Gaussian: what a redraw leaves of m has r/d of its energy, and what a step lifts sqrt(r/d)."""
    p, optimizer = build("flora", (24, 40), REAL, precondition="plain", refresh_every=1, scale="match", lr=0.0)
    kept = []
    for t in range(60):
        before = optimizer.state[p]["moment.first"].clone() if t else None
        step(optimizer, p, torch.zeros_like(p) if t else randn((24, 40), REAL, 2))
        if t > 1:
            kept.append(float((optimizer.state[p]["moment.first"] / 0.8).norm().square() / before.norm().square()))
    assert sum(kept) / len(kept) == pytest.approx(3 / 24, rel=0.3)


# --------------------------------------------------------------------------------------------------------- Adafactor


@FIELDS
@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 5), (4, 1, 3, 2)])
@pytest.mark.parametrize("clip", [0.7, None])
def test_factored_preconditioner_with_momentum_is_adafactor(clip, shape, dtype):
    """In the whole frame; the average is of the clipped updates and not corrected, as in Adafactor."""
    p = torch.nn.Parameter(randn(shape, dtype, 1))
    options = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1}
    precondition = Factored(decay=0.7, floor=1e-4, clip=clip)
    optimizer = LowRankOptimizer([p], rank=1.0, precondition=precondition, rule=Momentum(), **options)
    reference = Adafactor(p.detach(), 0.03, decay=-0.7, b1=0.8, eps1=1e-4, d=clip, weight_decay=0.1)
    for g in gradients(shape, dtype, 30):
        step(optimizer, p, g)
        close(p.detach(), reference.step(g))
    for n, factor in enumerate(reference.factors):
        close(optimizer.state[p][f"precondition.{n}"], factor)


@pytest.mark.parametrize("size", [0.0, 1e-15, 1.0, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 1, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("part", [Factored(), Factored(decay=0.5, floor=1e-6, clip=None)], ids=str)
def test_factored_is_finite_real_and_leaves_the_gradient(part, shape, dtype, size):
    state = {n: torch.zeros(x.shape, dtype=x.dtype) for n, x in part.schema(shape, dtype).items()}
    for t in range(1, 5):
        g = randn(shape, dtype, t) * size if t % 2 else torch.zeros(shape, dtype=dtype)
        before = g.clone()
        w = part.apply(g, state, t)
        assert torch.equal(g, before)
        assert w.dtype is dtype
        assert w.isfinite().all()
        assert w.any() == bool(g.any())
        assert all(x.isfinite().all() and not x.is_complex() for x in state.values())
        if t == 1 and size >= 1:
            assert w.abs().square().mean().sqrt() == pytest.approx(1, abs=0.6)
            assert part.clip is None or w.abs().square().mean().sqrt() <= 1 + 1e-5


def test_a_window_after_an_empty_first_gradient():
    """The engine looks again at the next step and sets its count back."""
    p, optimizer = build("flora", (12, 16), REAL)
    optimizer.absorb(p, torch.zeros_like(p))
    optimizer.absorb(p, randn((12, 16)))
    optimizer.apply(p)
    assert p.isfinite().all()


# ---------------------------------------------------------------------------------------------- momentum as it stands


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum(corrected, nesterov, dtype):
    rule = Momentum(corrected, nesterov)
    state, m = {"moment.first": torch.zeros(3, 4, dtype=dtype)}, torch.zeros(3, 4, dtype=COMPLEX)
    for t in range(6):
        z = randn((3, 4), dtype, t)
        clock = comoving.clock.Clock(torch.tensor(t + 1.0), 0.8, 0.95, t + 1)
        rule.absorb(z, state, clock)
        m = 0.8 * m + 0.2 * z
        direction = rule.direction(state, clock, 1e-8)
        assert direction.dtype is dtype
        assert direction.data_ptr() != state["moment.first"].data_ptr()
        ahead, weights = (0.8 * m + 0.2 * z, t + 2) if nesterov else (m, t + 1)
        close(direction.to(COMPLEX), ahead / (1 - 0.8**weights) if corrected else ahead, 1e-6)


@FIELDS
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nesterov_is_that_of_torch(momentum, dtype):
    p, q = (torch.nn.Parameter(randn((6, 8), dtype)) for _ in range(2))
    rule, options = Momentum(nesterov=True), {"betas": (momentum, 0.999), "weight_decay": 0.0}
    optimizer = LowRankOptimizer([p], 0.7 / (1 - momentum), 1.0, rule=rule, **options)
    reference = torch.optim.SGD([q], 0.7, momentum, nesterov=momentum > 0)
    for t in range(5):
        step(optimizer, p, randn((6, 8), dtype, 10 + t))
        step(reference, q, randn((6, 8), dtype, 10 + t))
    close(p.detach(), q.detach(), 1e-12)


def test_corrected_momentum_of_the_same_gradient_is_the_gradient():
    p = torch.nn.Parameter(torch.zeros(6, 8, dtype=REAL))
    optimizer = LowRankOptimizer([p], 1.0, 1.0, rule=Momentum(corrected=True), weight_decay=0.0)
    g = randn((6, 8))
    for _ in range(3):
        step(optimizer, p, g)
    close(p.detach(), -3 * g)


# ------------------------------------------------------------------------------------------- Online Subspace Descent


@FIELDS
@MATRICES
def test_online_subspace_descent(shape, dtype):
    """Every frame is a step of the reference's orthonormal mover from the last one, which moves before it is used."""
    left, d = shape[0] <= shape[1], min(shape)
    p, optimizer = build("online-subspace-descent", shape, dtype, scale=0.3)
    given = {"find": lambda g, old: ours(optimizer, p, left), "advance": lambda g, u: ours(optimizer, p, left)}
    reference = OnlineSubspaceDescent(p.detach(), rank=3, scale=0.3, before=True, from_start=False, **given, **HYPER)
    before = None
    for g in gradients(shape, dtype):
        step(optimizer, p, g)
        close(p.detach(), reference.step(g))
        u = ours(optimizer, p, left)
        if before is None:
            same_span(u, reference.side.leading(g, 3))
        else:
            energy = reference.side.project(before, g).norm() ** 2 / 3 / g.norm() ** 2
            same_span(u, oja(shape, float(0.1 / energy))(g, before))
        close(u.mH @ u, torch.eye(3, dtype=dtype))
        before = u
    assert u.shape == (d, 3)


# -------------------------------------------------------------------------------------------------------------- COAP


@FIELDS
@MATRICES
def test_coap(shape, dtype):
    """Frames are ours, and each is the reference's own step, brought back to an orthonormal basis."""
    left, rate = shape[0] <= shape[1], 0.3
    finder = Correlation(rate=rate, recalibrate=3)
    p, optimizer = build("coap", shape, dtype, finder=finder, refresh_every=4, scale=0.6)
    given = {"period": 4, "factor": 3, "u_lr": rate, "rows": None, "scale": 0.6}
    reference = Coap(p.detach(), rank=3, find=lambda g, old: ours(optimizer, p, left), **given, **HYPER)
    descended, reference.descended = reference.descended, lambda g: ours(optimizer, p, left)
    moves = []
    for t, g in enumerate(gradients(shape, dtype)):
        old, expected = reference.u, None
        if t and t % 4 == 0:
            expected = calibrated(g, old, left) if t % 12 == 0 else descended(g)
        step(optimizer, p, g)
        close(p.detach(), reference.step(g))
        if expected is not None:
            u = ours(optimizer, p, left)
            same_span(u, torch.linalg.qr(expected).Q)
            moves.append(float((u @ u.mH - old @ old.mH).abs().max()))
    assert min(moves) > 1e-3


@FIELDS
@pytest.mark.parametrize("shape", [(9, 12), (12, 9)])
@pytest.mark.parametrize("size", [1e-2, 30.0])
def test_correlation_is_the_reference_s_step_below_and_above_the_clip(size, shape, dtype):
    left, g = shape[0] <= shape[1], randn(shape, dtype, 3) * size
    old = random_frame(shape, (3, None) if left else (None, 3), dtype, 4)
    m = old.project(randn(shape, dtype, 5))
    reference = Coap(torch.zeros(shape, dtype=dtype), 0.1, 3, u_lr=0.7)
    reference.u, reference.m = (old.factors[0] if left else old.factors[1].conj().resolve_conj()), m
    finder, memory = Correlation(rate=0.7, recalibrate=9), {DRAWS: torch.tensor(1)}
    frame = finder.find(Operand(g, past=(old, m)), old, True, memory)
    u = frame.factors[0] if left else frame.factors[1].conj()
    expected = reference.descended(g)
    same_span(u, torch.linalg.qr(expected).Q, 1e-9 if size < 1 else 2e-6)
    assert int(memory[DRAWS]) == 2
    # The step is along the gradient: no turn within the span beyond what orthonormalizing needs.
    assert (u - reference.u).norm() == pytest.approx(float((expected - reference.u).norm()), rel=0.5)


@FIELDS
def test_correlation_mode_by_mode_descends_its_loss(dtype):
    """For a tensor, each factor against its unfolding, the momentum lifted in the other modes."""
    shape, ranks = (8, 9, 10), (3, None, 4)
    g, old = randn(shape, dtype, 3), random_frame(shape, ranks, dtype, 4)
    m = old.project(randn(shape, dtype, 5))
    finder = Correlation(rate=0.05, recalibrate=9)
    frame = finder.find(Operand(g, past=(old, m)), old, True, {DRAWS: torch.tensor(1)})
    assert frame.factors[1] is None
    for n in (0, 2):
        alone = Coap(torch.zeros(shape[n], g.numel() // shape[n], dtype=dtype), 0.1, ranks[n], side="left", u_lr=0.05)
        lifts = tuple(None if k == n else u for k, u in enumerate(old.factors))
        alone.u = old.factors[n]
        alone.m = ModeFrame(lifts).lift(m).movedim(n, 0).reshape(ranks[n], -1)
        x = g.movedim(n, 0).reshape(shape[n], -1)
        same_span(frame.factors[n], torch.linalg.qr(alone.descended(x)).Q)
        assert alone.loss(frame.factors[n], x) < alone.loss(old.factors[n], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-15, 1e15, 1e30])
def test_correlation_of_extreme_gradients_is_orthonormal(size, dtype):
    g, old = randn((9, 12), dtype, 3) * size, random_frame((9, 12), (3, None), dtype, 4)
    for m in (old.project(randn((9, 12), dtype, 5)) * size, torch.zeros(3, 12, dtype=dtype)):
        for count in (0, 1):
            frame = Correlation().find(Operand(g, past=(old, m)), old, True, {DRAWS: torch.tensor(count)})
            assert frame.factors[0].isfinite().all()
            assert frame.defect() < 1e-5
            if size == 0:
                same_span(frame.factors[0], old.factors[0], 1e-5)


def test_correlation_takes_up_a_momentum_of_other_ranks():
    """After a change of rank it is in the frame so far, not in the start."""
    g, old, start = randn((9, 12)), random_frame((9, 12), (2, None), REAL, 4), random_frame((9, 12), (4, None), REAL, 5)
    m = randn((2, 12), REAL, 6)
    finder = Correlation(recalibrate=9)
    one = finder.find(Operand(g, past=(old, m)), start, True, {DRAWS: torch.tensor(1)})
    moved = start.project(old.lift(m))
    other = finder.find(Operand(g, past=(start, moved)), start, True, {DRAWS: torch.tensor(1)})
    close(one.factors[0], other.factors[0])


# --------------------------------------------------------------------------------------------------------- DCT-AdamW


@FIELDS
@MATRICES
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("period", [1, 3])
def test_dct_adamw(period, norm, shape, dtype):
    """The reference selects for itself: the order of columns makes no difference to what is lifted."""
    options = {"finder": CosineSelection(inertia=0.0, norm=norm), "codec": Full(), "refresh_every": period}
    p, optimizer = build("dct-adamw", shape, dtype, scale=1.0, **options)
    given = {"refresh_at": every(period), "basis": "dct2", "norm": norm, "error_feedback": True}
    reference = DctAdamW(p.detach(), rank=3, **given, **HYPER)
    mode, changes = (0 if shape[0] <= shape[1] else 1), 0
    for g in gradients(shape, dtype):
        before = reference.indices
        step(optimizer, p, g)
        close(p.detach(), reference.step(g))
        assert set(optimizer.state[p][f"frame.{mode}.indices"].tolist()) == set(reference.indices.tolist())
        changes += before is not None and set(before.tolist()) != set(reference.indices.tolist())
        close(lost(optimizer, p), reference.e)
    assert changes > 3


def lost(optimizer, p):
    """e, as the next step will add it."""
    group, state = optimizer.param_groups[0], optimizer.state[p]
    frame = group["frame"].load(state, tuple(p.shape), state["moment.first"])
    zero, m = torch.zeros_like(p), state["moment.first"]
    passage = Passage(frame, m, 0.8, 0.2, frame, m, tick=state["tick"])
    stored = {name: x.clone() for name, x in state.items() if isinstance(x, torch.Tensor)}
    return group["residual"].restore(zero, passage, True, stored, group["codec"]).full()


@FIELDS
@pytest.mark.parametrize("lazy", [True, False])
def test_feedback_without_momentum_is_what_the_frame_lost(lazy, dtype):
    """With any rule and period, lazily or not, in frames that turn: e = g~ - F F^H g~, and |e| is told right."""
    p = torch.nn.Parameter(randn((9, 12), dtype, 1))
    residual = Feedback(lazy=lazy, momentum=False)
    optimizer = LowRankOptimizer([p], rank=3, residual=residual, refresh_every=3, **HYPER)
    e = torch.zeros_like(p)
    for g in gradients((9, 12), dtype, 20):
        step(optimizer, p, g)
        frame = frame_of(optimizer, p)
        e = (g + e) - frame.lift(frame.project(g + e))
        close(lost(optimizer, p), e)
        measured = optimizer.diagnostics()["parameter 0"]
        assert measured["error"] == pytest.approx(float(e.norm()), rel=1e-5)
        assert measured["bound"] >= measured["error"] * (1 - 1e-6)


def test_dct_adamw_in_eight_bits_stays_close():
    p, optimizer = build("dct-adamw", (10, 16), REAL)
    reference = DctAdamW(p.detach(), rank=3, basis="dct2", norm=1, error_feedback=True, **HYPER)
    start = p.detach().clone()
    for g in gradients((10, 16), REAL):
        step(optimizer, p, g)
        reference.step(g)
    assert 0 < (p.detach() - reference.p).norm() < 0.1 * (reference.p - start).norm()
    assert optimizer.state[p]["feedback.gradients.codes"].dtype is torch.int8
    assert isinstance(optimizer.param_groups[0]["frame"], Cosines)


# ------------------------------------------------------------------------------------------------------- all of them

RELATIVES = ["flora", "online-subspace-descent", "coap", "dct-adamw"]


@pytest.mark.parametrize("recipe", RELATIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("at", [4, 5, 7])
def test_resumes_bitwise_across_a_refresh(at, recipe, dtype):
    """Saved right before, right after and between refreshes, of which some are still to come."""
    period = {"refresh_every": 5} if recipe in {"flora", "coap"} else {}
    period |= {"finder": Correlation(recalibrate=2)} if recipe == "coap" else {}
    p, optimizer = build(recipe, (12, 16), dtype, **period)
    series = gradients((12, 16), dtype, 20)
    for g in series[:at]:
        step(optimizer, p, g)
    saved = io.BytesIO()
    torch.save({"p": p.detach().clone(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    q, other = build(recipe, (12, 16), dtype, **period)
    q.data.copy_(loaded["p"])
    other.load_state_dict(loaded["optimizer"])
    for g in series[at:]:
        step(optimizer, p, g)
        step(other, q, g)
        assert torch.equal(p, q)


@pytest.mark.parametrize("recipe", RELATIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(12, 16), (16, 1, 12), (8, 9, 10)], ids=str)
def test_zeros_and_single_directions_are_harmless(recipe, shape, dtype):
    model = Holder(randn(shape, torch.float32 if dtype is torch.bfloat16 else dtype, 1).to(dtype))
    (p,) = model.parameters()
    optimizer = comoving.build(recipe, model, lr=0.01, rank=1)
    unchanged = copy.deepcopy(p.detach())
    for g in [torch.zeros(shape), torch.zeros(shape), randn(shape, torch.float32), torch.zeros(shape)] * 3:
        step(optimizer, p, g.to(dtype))
        assert p.isfinite().all()
    assert not torch.equal(p, unchanged)
    slots = optimizer.state[p]
    assert all(x.dtype is not torch.bfloat16 for x in slots.values() if isinstance(x, torch.Tensor))


def test_defaults_are_the_papers():
    model = Holder(randn((16, 24)))
    group = {name: comoving.build(name, model, rank=2).param_groups[0] for name in RELATIVES}
    assert (group["flora"]["refresh_every"], group["flora"]["betas"][0]) == (1000, 0.9)
    assert group["flora"]["precondition"] == Factored(decay=0.8, floor=1e-30, clip=1.0)
    assert (group["coap"]["refresh_every"], group["coap"]["finder"]) == (32, Correlation(rate=0.1, recalibrate=5))
    assert group["online-subspace-descent"]["refresh_every"] == group["dct-adamw"]["refresh_every"] == 1
    assert all(group[name]["finder"].inertia == 0 for name in RELATIVES)
