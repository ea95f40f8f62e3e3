"""What a change of frame does to the moments: the properties that the design names, and the formulas written out."""

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comoving.codecs import Full
from comoving.finders import Power
from comoving.frames import ModeFrame
from comoving.linalg import abs_squared
from comoving.residual import Feedback
from comoving.rules import Adam
from comoving.transport import Carry, Clock, Keep, Reset, Rotate
from contract.support import (
    COMPLEX,
    REAL,
    TRANSPORTS,
    close,
    core_of,
    explicit,
    frame_of,
    lone,
    randn,
    random_frame,
    step,
)
from references.algebra import every
from references.tucker_adam import TuckerAdam

FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
MOVING = pytest.mark.parametrize("transport", [Rotate(), Carry()], ids=["rotate", "carry"])
M, V, KAPPA, K = "moment.first", "moment.second", "moment.second.mass", "moment.second.bound"
RULE = Adam()


class Core:
    """Adam's moments in a frame that is set by hand."""

    def __init__(self, transport, shape, ranks, dtype=REAL, betas=(0.9, 0.999), frame=None):
        self.transport, self.betas, self.t, self.dtype = transport, betas, torch.zeros(()), dtype
        self.frame = random_frame(shape, ranks, dtype) if frame is None else frame
        core = core_of(shape, self.frame.ranks)
        self.state = {M: torch.zeros(core, dtype=dtype), V: torch.zeros(core, dtype=REAL)}
        if isinstance(transport, Carry):
            mass = tuple(1 if r is None else r for r in self.frame.ranks)
            self.state |= {KAPPA: torch.zeros(mass, dtype=REAL), K: torch.zeros((), dtype=REAL)}

    @property
    def clock(self):
        return Clock(self.t, *self.betas)

    def take(self, gradient):
        return self.take_core(self.frame.project(gradient))

    def take_core(self, z):
        self.t += 1
        RULE.absorb(z, self.state, self.clock)
        self.transport.age(self.state, RULE.slots(()), self.clock)
        return self

    def move(self, frame):
        self.state = self.transport.move(self.state, RULE.slots(()), frame.overlap(self.frame), self.clock)
        self.frame = frame
        return self

    def direction(self, eps=1e-300):
        return RULE.direction(self.state, self.clock, eps)

    def v_hat(self):
        return self.state[V] / self.state.get(KAPPA, self.clock.weight2)


def warmed(transport, shape, ranks, dtype=REAL, steps=6, betas=(0.8, 0.95), frame=None, scale=1.3):
    core = Core(transport, shape, ranks, dtype, betas, frame)
    for t in range(steps):
        core.take(randn(shape, dtype, 20 + t) * scale**t)
    return core


def old_and_new(core, frame):
    """The moments before and after one change of frame, kappa always core-sized."""
    before = dict(core.state)
    core.move(frame)
    for state in (before, core.state):
        if KAPPA in state:
            state[KAPPA] = state[KAPPA].expand(state[V].shape).clone()
    return before, core.state


@FIELDS
@MOVING
@pytest.mark.parametrize(("shape", "ranks"), [((5, 7), (3, None)), ((5, 7), (3, 4)), ((4, 3, 5), (2, None, 2))])
def test_the_same_frame_changes_nothing(transport, shape, ranks, dtype):
    core = warmed(transport, shape, ranks, dtype)
    before, after = old_and_new(core, core.frame)
    for name, value in before.items():
        close(after[name], value, 1e-12)


@FIELDS
@MOVING
@pytest.mark.parametrize(("shape", "ranks"), [((6, 7), (4, None)), ((7, 6), (None, 4)), ((5, 4, 5), (3, None, 4))])
def test_signed_permutations_permute_the_moments_exactly(transport, shape, ranks, dtype):
    core = warmed(transport, shape, ranks, dtype)
    factors, turns = [], []
    for n, u in enumerate(core.frame.factors):
        if u is None:
            factors.append(None)
            turns.append((None, None))
            continue
        order = torch.randperm(u.shape[1], generator=torch.Generator().manual_seed(n))
        phase = torch.sgn(randn((u.shape[1],), dtype, 5 + n))
        factors.append(u[:, order] * phase)
        turns.append((order, phase))
    before, after = old_and_new(core, ModeFrame(tuple(factors)))
    expected = dict(before)
    for n, (order, phase) in enumerate(turns):
        if order is not None:
            along = [-1 if m == n else 1 for m in range(len(shape))]
            expected = {k: x.index_select(n, order) if x.ndim else x for k, x in expected.items()}
            expected[M] = expected[M] * phase.conj().reshape(along)
    for name, value in expected.items():
        close(after[name], value, 1e-12)


@FIELDS
@MOVING
@pytest.mark.parametrize(
    ("shape", "ranks", "more"), [((9, 5), (3, None), (6, None)), ((6, 5, 7), (2, 2, 3), (4, 2, 6))]
)
def test_appended_directions_keep_the_old_entries_and_start_empty(transport, shape, ranks, more, dtype):
    wide = random_frame(shape, more, dtype)
    narrow = ModeFrame(
        tuple(None if u is None else u[:, :r].contiguous() for u, r in zip(wide.factors, ranks, strict=True))
    )
    core = warmed(transport, shape, ranks, dtype, frame=narrow)
    before, after = old_and_new(core, wide)
    inner = tuple(slice(d) for d in core_of(shape, ranks))
    for name in before.keys() - {K}:
        close(after[name][inner], before[name], 1e-12)
        outside = after[name].clone()
        outside[inner] = 0
        assert outside.abs().max() < 1e-12
    assert core.direction(1e-8).isfinite().all()
    core.take(torch.zeros(shape, dtype=dtype))
    assert core.direction(1e-8).isfinite().all()


def adams_bound(t, b1, b2):
    """max |d| over all series of t gradients, by Cauchy-Schwarz, summed term by term."""
    k = sum(((1 - b1) * b1**i) ** 2 / ((1 - b2) * b2**i) for i in range(t))
    return sqrt(k * (1 - b2**t)) / (1 - b1**t)


@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([REAL, COMPLEX]),
    betas=st.sampled_from([(0.9, 0.999), (0.5, 0.99), (0.95, 0.95), (0.0, 0.9)]),
    shape=st.sampled_from([(6, 3), (4, 5), (3, 4, 2)]),
    growth=st.sampled_from([0.3, 1.0, 3.0]),
    refresh_every=st.integers(1, 4),
    starve=st.booleans(),
)
def test_carry_stays_within_adams_bound(seed, dtype, betas, shape, growth, refresh_every, starve):
    """Frames jump at random, ranks change, gradients grow or shrink, and may vanish when the frame has just changed."""
    generator = torch.Generator().manual_seed(seed)

    def jump():
        ranks = [int(torch.randint(1, d + 1, (), generator=generator)) for d in shape]
        whole = torch.rand(len(shape), generator=generator) < 0.25
        whole[0] = False
        frame = random_frame(shape, [None if w else r for r, w in zip(ranks, whole.tolist(), strict=True)], dtype, seed)
        turns = [torch.linalg.qr(torch.randn(d, d, dtype=dtype, generator=generator)).Q for d in shape]
        return ModeFrame(tuple(None if u is None else q @ u for q, u in zip(turns, frame.factors, strict=True)))

    core = Core(Carry(), shape, None, dtype, betas, frame=jump())
    for t in range(16):
        fresh = t > 0 and t % refresh_every == 0
        if fresh:
            core.move(jump())
            assert core.direction().abs().max() <= adams_bound(t, *betas) * (1 + 1e-9)
        g = torch.randn(shape, dtype=dtype, generator=generator) * growth**t
        core.take(g * 0 if fresh and starve else g)
        assert core.direction().abs().max() <= adams_bound(t + 1, *betas) * (1 + 1e-9)
        assert (core.state[V] >= 0).all()
        assert (core.state[KAPPA] <= core.clock.weight2 * (1 + 1e-9)).all()


def test_rotate_leaves_adams_bound():
    """So the bound above is the work of carry: a direction new to the frame meets v = 0 with t large."""
    core = Core(Rotate(), (32, 8), (4, None))
    worst = 0.0
    for t in range(60):
        if t and t % 4 == 0:
            core.move(random_frame((32, 8), (4, None), seed=t))
        worst = max(worst, core.take(randn((32, 8), seed=t)).direction().abs().max() / adams_bound(t + 1, 0.9, 0.999))
    fresh = Core(Rotate(), (6, 4), (2, None), frame=ModeFrame((torch.eye(6, 2, dtype=REAL), None)))
    for t in range(1000):
        fresh.take(randn((6, 4), seed=t))
    fresh.move(ModeFrame((torch.eye(6, dtype=REAL)[:, 2:4], None)))
    kicks = [fresh.take(torch.ones(6, 4, dtype=REAL)).direction().abs().max() for _ in range(12)]
    assert max(kicks) > 4
    carried = Core(Carry(), (6, 4), (2, None), frame=ModeFrame((torch.eye(6, 2, dtype=REAL), None)))
    for t in range(1000):
        carried.take(randn((6, 4), seed=t))
    carried.move(ModeFrame((torch.eye(6, dtype=REAL)[:, 2:4], None)))
    assert max(carried.take(torch.ones(6, 4, dtype=REAL)).direction().abs().max() for _ in range(12)) <= 1 + 1e-9
    assert worst > 0


@FIELDS
@pytest.mark.parametrize(
    ("shape", "ranks"), [((48, 24), (12, None)), ((24, 48), (8, 16)), ((12, 10, 16), (4, None, 6))]
)
def test_v_hat_on_stationary_noise(shape, ranks, dtype):
    """Frames drawn anew every 4 steps, unit-variance noise: carry keeps v-hat at 1, rotate loses the mass of v."""
    level = {}
    for transport in (Carry(), Rotate()):
        core, seen = Core(transport, shape, ranks, dtype), []
        for t in range(240):
            if t and t % 4 == 0:
                core.move(random_frame(shape, ranks, dtype, seed=t))
            core.take(randn(shape, dtype, seed=1000 + t))
            if t >= 40:
                seen.append(core.v_hat().mean())
        level[type(transport)] = float(torch.stack(seen).mean())
    assert level[Carry] == pytest.approx(1.0, abs=0.1)
    assert level[Rotate] < 0.6


@pytest.mark.parametrize(("rows", "rank"), [(32, 8), (64, 16), (16, 8)])
def test_rotating_v_linearly_is_wrong(rows, rank):
    """A quarter or more of v x_n R_n is negative, and no transport of ours has one negative entry."""
    shape, ranks = (rows, 20), (rank, None)
    for transport in (Rotate(), Carry()):
        core = warmed(transport, shape, ranks, steps=50, scale=1.0)
        frame = random_frame(shape, ranks, seed=3)
        naive = frame.overlap(core.frame).move(core.state[V])
        assert 0.24 <= float((naive < 0).double().mean()) <= 0.76
        assert (core.move(frame).state[V] >= 0).all()


CHANGES = [
    ((5, 4), (3, None), (2, None)),
    ((5, 4), (2, None), (4, None)),
    ((5, 4), (2, None), (2, 3)),
    ((5, 4), (2, 3), (2, None)),
    ((5, 4), (None, None), (3, None)),
    ((5, 4), (3, None), (None, None)),
    ((4, 3, 5), (2, None, 3), (3, 2, 3)),
    ((4, 3, 5), (2, 2, 4), (2, None, 2)),
    ((4, 3, 5), (2, 2, 4), (2, 2, 4)),
    ((3, 2, 4, 3), (2, None, 2, 2), (2, None, 3, 1)),
    ((3, 2, 4, 3), (None, 1, 3, 2), (2, 2, 3, None)),
]


def written_out(core, frame, shape, dtype):
    """The reference's transport on flat vectors, through R = B'^H B."""
    reference = TuckerAdam(torch.zeros(shape, dtype=dtype), 1.0, None, betas=core.betas, raw_floor=True)
    reference.transport = type(core.transport).__name__.lower()
    reference.m, reference.v = core.state[M], core.state[V]
    reference.kappa = core.state.get(KAPPA, torch.ones((), dtype=REAL)).expand(core.state[V].shape)
    reference.K, reference.t = core.state.get(K, torch.ones((), dtype=REAL)), int(core.t)
    return reference.carried(explicit(frame, shape, dtype).mH @ explicit(core.frame, shape, dtype))


@FIELDS
@pytest.mark.parametrize("transport", [Reset(), Rotate(), Carry()], ids=["reset", "rotate", "carry"])
@pytest.mark.parametrize(("shape", "ranks", "new_ranks"), CHANGES)
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["steady", "growing"])
def test_mode_by_mode_is_the_explicit_kronecker_formula(transport, shape, ranks, new_ranks, dtype, scale):
    """Also for ranks that change and sides that become whole or compressed; twice in a row, for a core-sized kappa."""
    core = warmed(transport, shape, ranks, dtype, betas=(0.5, 0.99), scale=scale)
    for seed, target in ((7, new_ranks), (8, new_ranks), (9, ranks)):
        frame = random_frame(shape, target, dtype, seed)
        m, v, kappa = written_out(core, frame, shape, dtype)
        core.move(frame)
        new_core = core_of(shape, target)
        assert core.state[M].shape == core.state[V].shape == new_core
        close(core.state[M].flatten(), m, 1e-10)
        close(core.state[V].flatten(), v, 1e-10)
        if isinstance(transport, Carry):
            close(core.state[KAPPA].expand(new_core).flatten(), kappa, 1e-10)
        assert not core.state[V].is_complex()
        core.take(randn(shape, dtype, 40 + seed))


def test_the_floor_was_at_work():
    """In the growing series above the variance is negative somewhere, so that the floor of carry decides."""
    core = warmed(Carry(), (5, 4), (3, None), betas=(0.5, 0.99), scale=3.0)
    frame = random_frame((5, 4), (2, None), seed=7)
    m, v, _ = written_out(core, frame, (5, 4), REAL)
    assert torch.isclose(v, abs_squared(m) / core.state[K], rtol=1e-9).any()


def test_keep_keeps_the_numbers_and_takes_no_other_rank():
    core = warmed(Keep(), (5, 4), (3, None))
    before, after = old_and_new(core, random_frame((5, 4), (3, None), seed=3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [t.resizes for t in TRANSPORTS] == [not isinstance(t, Keep) for t in TRANSPORTS]


def test_reset_starts_again():
    core = warmed(Reset(), (5, 4), (3, None)).move(random_frame((5, 4), (3, None), seed=3))
    assert not core.state[M].any()
    assert not core.state[V].any()
    z = randn((3, 4))
    close(core.take_core(z).direction(), z.sign(), 1e-12)


@FIELDS
@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("residual", [False, True], ids=["discard", "feedback"])
@pytest.mark.parametrize(("shape", "ranks"), [((5, 6), (2, None)), ((6, 5), (3, 2)), ((4, 3, 5), (2, None, 3))])
def test_in_the_engine(shape, ranks, residual, transport, dtype):
    """Growing gradients, zero ones at refreshes, and the frames that our finder found, handed to the reference."""
    options = {"lr": 0.02, "betas": (0.5, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    start = randn(shape, dtype)
    extra = {"residual": Feedback(), "codec": Full()} if residual else {}
    p, optimizer = lone(
        start,
        rank=ranks,
        transport=transport,
        finder=Power(momentum=0.5),
        refresh_every=3,
        scale=0.7,
        **options,
        **extra,
    )
    reference = TuckerAdam(
        start,
        find=lambda operand, old: list(frame_of(optimizer, p).factors),
        transport=type(transport).__name__.lower(),
        refresh_at=every(3),
        error_feedback=residual,
        scale=0.7,
        raw_floor=True,
        **options,
    )
    for t in range(18):
        g = randn(shape, dtype, 60 + t) * 1.5**t * (t not in (6, 15))
        step(optimizer, p, g)
        close(p.detach(), reference.step(g), 1e-7)
    state = optimizer.state[p]
    close(state[M], reference.m, 1e-7)
    close(state[V], reference.v, 1e-7)
    if isinstance(transport, Carry):
        assert float(state[K]) == pytest.approx(float(reference.K), rel=1e-5)
