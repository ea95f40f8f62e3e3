"""What a change of frame does to the moments: the properties that the design names, and the formulas written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comoving.clock import Clock
from comoving.codecs import Full
from comoving.finders import Power
from comoving.frames import ModeFrame
from comoving.linalg import abs_squared
from comoving.ranks import Energy, Tolerance
from comoving.residual import Feedback
from comoving.rules import SOAP, Adam, Shampoo
from comoving.slots import Kind
from comoving.transport import Carry, Keep, Reset, Rotate, initial, mass_of
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
from references.algebra import every, mode_product
from references.soap import SOAP as ReferenceSOAP
from references.soap import adams_bound
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
        finder=Power(inertia=0.5),
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


# ------------------------------------------------------------------------------------------ statistics of single modes

SINGLE = [
    Shampoo(decay=0.9, eps=1e-3, every=4),
    Shampoo(decay=0.9, eps=1e-3, max_size=3),
    SOAP(decay=0.9, every=3),
    SOAP(decay=0.9, every=3, max_size=3),
]
STATISTICS = pytest.mark.parametrize("rule", SINGLE, ids=["shampoo", "short shampoo", "soap", "short soap"])
FOLLOWING = pytest.mark.parametrize("kind", [Rotate, Carry])
CORES = pytest.mark.parametrize(
    ("shape", "ranks"), [((5, 7), (3, None)), ((7, 5), (None, 4)), ((5, 7), (3, 4)), ((4, 3, 6), (2, None, 4))], ids=str
)


class Ruled:
    """The slots of any rule in a frame that is set by hand."""

    def __init__(self, rule, transport, frame, shape, dtype, betas=(0.8, 0.95)):
        self.rule, self.transport, self.frame, self.betas, self.dtype = rule, transport, frame, betas, dtype
        self.t, self.tick, self.shape, self.state = torch.zeros(()), 0, shape, {}
        for slot in (*self.slots, *transport.slots(self.slots)):
            self.state[slot.name] = initial(slot, torch.empty(self.size(slot), dtype=self.field(slot)))

    def size(self, slot):
        if slot.kind in (Kind.LINEAR, Kind.VARIANCE):
            return self.core
        if slot.kind is Kind.MASS:
            turned = dict(slot.turned_by)
            pairs = zip(self.core, self.frame.ranks, strict=True)
            return tuple(1 if r is None and n not in turned else d for n, (d, r) in enumerate(pairs))
        if slot.kind is Kind.SCALAR:
            return ()
        return (self.core[slot.mode],) * (1 if slot.kind is Kind.FACTORED else 2)

    def field(self, slot):
        return self.dtype if slot.kind in (Kind.LINEAR, Kind.COVARIANCE, Kind.BASIS, Kind.CACHE) else REAL

    @property
    def core(self):
        return core_of(self.shape, self.frame.ranks)

    @property
    def slots(self):
        return self.rule.slots(self.core)

    @property
    def clock(self):
        return Clock(self.t, *self.betas, self.tick)

    def take(self, gradient):
        """One step; the lifted direction."""
        self.t, self.tick = self.t + 1, self.tick + 1
        self.rule.absorb(self.frame.project(gradient), self.state, self.clock)
        self.transport.age(self.state, self.slots, self.clock)
        return self.frame.lift(self.rule.direction(self.state, self.clock, 1e-6))

    def move(self, frame):
        """A change of frame, as the engine makes it; the slots before it."""
        before = self.state
        copies = {name: x.clone() for name, x in before.items()}
        self.state = self.transport.move(before, self.slots, frame.overlap(self.frame), self.clock)
        self.frame = frame
        assert all(torch.equal(before[name], x) for name, x in copies.items())
        return before

    def of(self, *kinds):
        return [slot for slot in (*self.slots, *self.transport.slots(self.slots)) if slot.kind in kinds]


def ruled(rule, transport, shape, ranks, dtype, steps=7, **options):
    core = Ruled(rule, transport, random_frame(shape, ranks, dtype), shape, dtype, **options)
    for t in range(steps):
        core.take(randn(shape, dtype, 20 + t))
    return core


def within(frame, dtype, seed):
    """Another frame of the same span, and the turns W_n of U_n W_n."""
    turns = [
        None if u is None else torch.linalg.qr(randn((u.shape[1],) * 2, dtype, seed + n)).Q
        for n, u in enumerate(frame.factors)
    ]
    pairs = zip(frame.factors, turns, strict=True)
    return ModeFrame(tuple(None if u is None or w is None else u @ w for u, w in pairs)), turns


@FIELDS
@FOLLOWING
@STATISTICS
@CORES
@pytest.mark.parametrize("statistics", ["carry", "keep"])
def test_the_same_frame_leaves_statistics(statistics, rule, kind, shape, ranks, dtype):
    core = ruled(rule, kind(statistics), shape, ranks, dtype)
    before = core.move(core.frame)
    kept = {name: x for name, x in before.items() if statistics == "keep" or not name.endswith(".root")}
    assert core.state.keys() == kept.keys()
    if bounded_by_carry(core):  # turning bases can have left the bound that carry's floor restores
        kept[V] = torch.maximum(kept[V], squares_in_bases(core) / core.state[K])
    for name, x in kept.items():
        close(core.state[name].expand(x.shape), x, 1e-12)


def bounded_by_carry(core):
    return isinstance(core.transport, Carry) and isinstance(core.rule, SOAP)


def squares_in_bases(core):
    """|m'|^2 in the bases as they are now."""
    m = core.state[M]
    for n, _ in enumerate(core.core):
        q = core.state.get(f"soap.{n}.basis")
        m = m if q is None else mode_product(m, q.mH, n)
    return abs_squared(m)


@FIELDS
@FOLLOWING
@STATISTICS
@CORES
def test_signed_permutations_permute_statistics(rule, kind, shape, ranks, dtype):
    core = ruled(rule, kind(), shape, ranks, dtype)
    factors, orders = [], {}
    for n, u in enumerate(core.frame.factors):
        if u is None:
            factors.append(None)
            continue
        order = torch.randperm(u.shape[1], generator=torch.Generator().manual_seed(n + 3))
        orders[n] = order, torch.sgn(randn((u.shape[1],), dtype, 5 + n))
        factors.append(u[:, order] * orders[n][1])
    before = core.move(ModeFrame(tuple(factors)))
    for slot in core.of(Kind.COVARIANCE, Kind.FACTORED, Kind.BASIS):
        x = before[slot.name]
        if slot.mode in orders:
            order, phase = orders[slot.mode]
            x = x[order]
            x = x if slot.kind is Kind.FACTORED else phase.conj()[:, None] * x
            x = x[:, order] * phase if slot.kind is Kind.COVARIANCE else x
        close(core.state[slot.name], x, 1e-12)
    for slot in core.of(Kind.VARIANCE, Kind.MASS):
        x = before[slot.name]
        for n, (order, _) in orders.items():
            if n not in dict(slot.turned_by) and x.shape[n] > 1:
                x = x.index_select(n, order)
        if slot.name == V and bounded_by_carry(core):
            x = torch.maximum(x, squares_in_bases(core) / core.state[K])
        close(core.state[slot.name], x, 1e-12)


TARGETS = pytest.mark.parametrize(
    ("shape", "ranks", "new_ranks"),
    [
        ((5, 7), (3, None), (3, None)),
        ((5, 7), (3, None), (2, None)),
        ((5, 7), (2, None), (4, None)),
        ((5, 7), (3, None), (None, 4)),
        ((5, 7), (3, 4), (None, None)),
        ((4, 3, 6), (2, None, 4), (3, 2, 2)),
        ((4, 3, 6), (2, 2, 3), (2, None, 4)),
    ],
    ids=str,
)


def dense_overlaps(new, old, shape, dtype):
    """U'_n^H U_n, the identity standing for a whole side."""
    eyes = [torch.eye(d, dtype=dtype) for d in shape]
    pairs = zip(new.factors, old.factors, eyes, strict=True)
    return [(e if a is None else a).mH @ (e if b is None else b) for a, b, e in pairs]


@FIELDS
@FOLLOWING
@STATISTICS
@TARGETS
@pytest.mark.parametrize("statistics", ["carry", "reset"])
def test_statistics_by_their_formulas(statistics, rule, kind, shape, ranks, new_ranks, dtype):
    """Also into frames of other ranks, three times in a row; variances in bases by the explicit Kronecker matrix."""
    core = ruled(rule, kind(statistics), shape, ranks, dtype)
    for seed, target in ((7, new_ranks), (8, new_ranks), (9, ranks)):
        frame, old_frame = random_frame(shape, target, dtype, seed), core.frame
        if rule.max_size == 3 and any(
            (a <= 3) != (b <= 3) for a, b in zip(core.core, core_of(shape, target), strict=True)
        ):
            pytest.skip("a mode that outgrows max_size has other slots: such ranks are refused")
        overlaps = dense_overlaps(frame, old_frame, shape, dtype)
        c1, c2, old_slots = float(core.clock.weight1), float(core.clock.weight2), core.slots
        before = core.move(frame)
        for slot in old_slots:
            x, r = before[slot.name], overlaps[slot.mode]
            moved = core.state.get(slot.name)
            if slot.kind is Kind.CACHE:
                assert moved is None
            elif slot.kind is Kind.COVARIANCE and statistics == "reset":
                close(moved, x.diagonal().mean() * torch.eye(r.shape[0], dtype=dtype), 1e-12)
            elif slot.kind is Kind.FACTORED and statistics == "reset":
                close(moved, x.mean().expand(r.shape[0]), 1e-12)
            elif slot.kind is Kind.COVARIANCE:
                close(moved, r @ x @ r.mH, 1e-12)
                assert (torch.linalg.eigvalsh(moved) > -1e-12).all()
            elif slot.kind is Kind.FACTORED:
                close(moved, abs_squared(r) @ x, 1e-12)
            elif slot.kind is Kind.BASIS:
                close(moved.mH @ moved, torch.eye(r.shape[0], dtype=dtype), 1e-12)
                turned = torch.eye(*r.shape, dtype=dtype) if statistics == "reset" else r @ x
                for k in range(1, min(turned.shape) + 1):  # each leading span
                    part = moved[:, :k]
                    close(part @ (part.mH @ turned[:, :k]), turned[:, :k], 1e-10)
            elif slot.kind is Kind.VARIANCE:
                check_variance(core, slot, before, overlaps, c1, c2, dtype)
        core.take(randn(shape, dtype, 40 + seed))


def check_variance(core, slot, before, overlaps, c1, c2, dtype):
    """Rotate's or carry's formula on flat vectors, all of it in the bases."""
    bases = dict(slot.turned_by)

    def basis_of(state, n, size):
        return state[bases[n]] if n in bases else torch.eye(size, dtype=dtype)

    turn, mean, mean_moved = torch.ones(1, 1, dtype=dtype), before[slot.mean], core.state[slot.mean]
    for n, r in enumerate(overlaps):
        q, q_moved = basis_of(before, n, r.shape[1]), basis_of(core.state, n, r.shape[0])
        turn = torch.einsum("ij,kl->ikjl", turn, q_moved.mH @ r @ q).reshape(
            turn.shape[0] * r.shape[0], turn.shape[1] * r.shape[1]
        )
        mean, mean_moved = mode_product(mean, q.mH, n), mode_product(mean_moved, q_moved.mH, n)
    squares, v = abs_squared(turn), before[slot.name].flatten()
    mean, mean_moved = abs_squared(mean).flatten() / c1**2, abs_squared(mean_moved).flatten() / c1**2
    if isinstance(core.transport, Rotate):
        expected = c2 * (squares @ (v / c2 - mean) + mean_moved).abs()
    else:
        mass = before[mass_of(slot.name)].expand(before[slot.name].shape).flatten()
        moved_mass = squares @ mass
        close(core.state[mass_of(slot.name)].expand(core.core).flatten(), moved_mass, 1e-12)
        estimate = squares @ (v - mass * mean) + moved_mass * mean_moved
        expected = torch.maximum(estimate, mean_moved * c1**2 / before[f"{slot.name}.bound"])
    close(core.state[slot.name].flatten(), expected, 1e-10)
    if bases and all(d <= core.rule.max_size for d in core.core):
        assert core.state.get(mass_of(slot.name), expected).numel() == expected.numel()


@FIELDS
@FOLLOWING
@CORES
@pytest.mark.parametrize(
    "rule", [Shampoo(decay=0.9, eps=1e-3, every=4, graft=False), SOAP(decay=0.9, every=3)], ids=str
)
def test_a_frame_that_turns_within_its_span_gives_the_same_updates(rule, kind, shape, ranks, dtype):
    """Both rules turn with the space (Shampoo but for grafting), and so must what carries them."""
    still = Ruled(rule, kind(), random_frame(shape, ranks, dtype), shape, dtype)
    turning = Ruled(rule, kind(), still.frame, shape, dtype)
    for t in range(24):
        if t % 4 == 0 and t:
            turning.move(within(turning.frame, dtype, 100 * t)[0])
            if bounded_by_carry(still):
                still.move(still.frame)  # so that the floor is at work in both
        g = randn(shape, dtype, 20 + t)
        close(turning.take(g), still.take(g), 1e-8)


@FIELDS
@FOLLOWING
def test_without_bases_carried_updates_differ(kind, dtype):
    """So the test above is not empty."""
    for statistics in ("keep", "reset"):
        still = Ruled(SOAP(every=3), kind(), random_frame((5, 7), (3, None), dtype), (5, 7), dtype)
        turning = Ruled(SOAP(every=3), kind(statistics), still.frame, (5, 7), dtype)
        for t in range(8):
            if t == 4:
                turning.move(within(turning.frame, dtype, 100)[0])
            g = randn((5, 7), dtype, 20 + t)
            a, b = turning.take(g), still.take(g)
        assert (a - b).norm() > 0.05 * b.norm()


@FIELDS
@FOLLOWING
@pytest.mark.parametrize(("shape", "ranks"), [((5, 7), (4, 4)), ((4, 4), (None, None)), ((4, 3, 6), (2, None, 4))])
def test_soap_in_a_standing_frame_is_the_reference_on_what_it_projects(kind, shape, ranks, dtype):
    """Carry's kappa is c2 then, and permutes without a trace."""
    core = Ruled(SOAP(decay=0.7, every=2), kind(), random_frame(shape, ranks, dtype), shape, dtype)
    reference = ReferenceSOAP(
        torch.zeros(core.core, dtype=dtype), 1.0, betas=core.betas, shampoo_beta=0.7, eps=1e-6, frequency=2,
        skip_first=False, bounded=True,
    )  # fmt: skip
    for t in range(30):
        g, before = randn(shape, dtype, t), reference.p
        close(core.take(g), core.frame.lift(before - reference.step(core.frame.project(g))), 1e-8)


@FIELDS
def test_mass_is_permuted_along_with_the_variance(dtype):
    """After frames of growing rank kappa is uneven; v and kappa then go by one order."""
    core = ruled(SOAP(every=1), Carry(), (6, 7), (2, 3), dtype)
    core.move(random_frame((6, 7), (4, 5), dtype, 5))
    core.state["soap.0"] += torch.diag(torch.arange(4.0)).to(dtype)  # so that the order changes
    assert core.state[V].shape == core.state[KAPPA].shape == (4, 5)
    orders = {}
    for n in range(2):
        factor, basis = core.state[f"soap.{n}"], core.state[f"soap.{n}.basis"]
        orders[n] = (basis.conj() * (factor @ basis)).sum(0).real.argsort(descending=True)
    assert any((order.diff() < 0).any() for order in orders.values())
    expected = {name: core.state[name].index_select(0, orders[0]).index_select(1, orders[1]) for name in (V, KAPPA)}
    core.take(torch.zeros(6, 7, dtype=dtype))
    close(core.state[V], 0.95 * expected[V], 1e-12)
    close(core.state[KAPPA], 0.95 * expected[KAPPA] + 0.05, 1e-12)


@FIELDS
@STATISTICS
@pytest.mark.parametrize("transport", [Keep(), Rotate("keep"), Carry("keep")], ids=str)
def test_kept_statistics_are_the_same_numbers(transport, rule, dtype):
    core = ruled(rule, transport, (5, 7), (3, None), dtype)
    before = core.move(random_frame((5, 7), (3, None), dtype, 3))
    kinds = {Kind.COVARIANCE, Kind.FACTORED, Kind.BASIS, Kind.CACHE}
    everything = {Kind.LINEAR, Kind.VARIANCE} if isinstance(transport, Keep) else set()
    assert all(core.state[slot.name] is before[slot.name] for slot in core.of(*kinds | everything))
    assert not transport.resizes
    assert core.take(randn((5, 7), dtype)).isfinite().all()


@FIELDS
@STATISTICS
def test_reset_starts_statistics_again(rule, dtype):
    core = ruled(rule, Reset(), (5, 7), (3, None), dtype)
    core.move(random_frame((5, 7), (2, None), dtype, 3))
    assert float(core.t) == 0
    for slot in core.slots:
        if slot.kind is Kind.CACHE:
            assert slot.name not in core.state
        elif slot.kind is Kind.BASIS:
            close(core.state[slot.name], torch.eye(core.core[slot.mode], dtype=dtype))
        else:
            assert not core.state[slot.name].any()
            assert tuple(core.state[slot.name].shape) == core.size(slot)
    d = core.take(randn((5, 7), dtype))
    assert d.isfinite().all()
    assert 0.1 < float(core.frame.project(d).abs().square().mean().sqrt()) < 3


@FIELDS
@FOLLOWING
def test_roots_are_taken_anew_where_covariances_have_moved(kind, dtype):
    """In the first step in the new frame, though none is due; and then kept again."""
    rule, once = Shampoo(decay=0.9, eps=1e-3, every=100), Shampoo(decay=0.9, eps=1e-3)
    kept = ruled(rule, kind(), (5, 7), (3, None), dtype)
    fresh = ruled(once, kind(), (5, 7), (3, None), dtype)
    g = randn((5, 7), dtype, 50)
    frame = random_frame((5, 7), (3, None), dtype, 3)
    for core in (kept, fresh):
        core.move(frame)
        # v has seen the same; the momentum and the factors too: only roots could differ
    close(kept.take(g), fresh.take(g), 1e-10)
    root = kept.state["shampoo.0.root"].clone()
    kept.take(g)
    assert torch.equal(kept.state["shampoo.0.root"], root)


@pytest.mark.parametrize("rule", SINGLE[::2], ids=["shampoo", "soap"])
@pytest.mark.parametrize("kind", [Rotate, Carry])
def test_statistics_that_keep_their_shape_take_no_adaptive_ranks(rule, kind):
    with pytest.raises(ValueError, match=r"ranks=Energy.*statistics='keep'.* cannot take moments"):
        lone(randn((16, 24)), rule=rule, rank=4, transport=kind("keep"), ranks=Energy())
    lone(randn((16, 24)), rule=rule, rank=4, transport=kind(), ranks=Energy())


@pytest.mark.parametrize("rule", [Shampoo(max_size=8), SOAP(max_size=8)], ids=["shampoo", "soap"])
def test_ranks_that_would_change_the_kind_of_slots_are_refused(rule):
    """Adaptive ones at construction, others when a checkpoint is loaded."""
    with pytest.raises(ValueError, match=r"ranks=Energy.* slots of another kind for long modes"):
        lone(randn((16, 24)), rule=rule, rank=4, ranks=Energy())
    p, saved = lone(randn((16, 24)), rule=rule, rank=4)
    step(saved, p, randn((16, 24)))
    for rank in (9, 2):
        q, other = lone(randn((16, 24)), rule=rule, rank=rank)
        if rank == 9:
            with pytest.raises(ValueError, match=r"slots of another kind.*use the saved rank"):
                other.load_state_dict(saved.state_dict())
        else:
            other.load_state_dict(saved.state_dict())
            step(other, q, randn((16, 24), seed=1))
            assert other.state[q][M].shape == (2, 24)


@pytest.mark.parametrize("rule", [Shampoo(every=3), SOAP(every=2)], ids=["shampoo", "soap"])
@pytest.mark.parametrize("transport", [Reset(), Rotate(), Carry()], ids=str)
@FIELDS
def test_adaptive_ranks_in_the_engine(rule, transport, dtype):
    """From rank 1 up to all of a mode and back; slots have the shapes of the core at every step."""
    policy = Tolerance(error=0.3, margin=0.5, minimum=1, step=1)
    p, optimizer = lone(randn((6, 9), dtype), rule=rule, rank=(2, 3), transport=transport, ranks=policy, scale=1.0)
    seen = set()
    for t in range(24):
        rank = (1, 6, 3)[t // 8]
        step(optimizer, p, randn((6, rank), dtype, t) @ randn((rank, 9), dtype, t + 99))
        state = optimizer.state[p]
        core = tuple(state[M].shape)
        seen.add(core)
        for slot in rule.slots(core):
            size = core if slot.kind in (Kind.LINEAR, Kind.VARIANCE) else (core[slot.mode],) * 2
            assert state[slot.name].shape == size
        tensors = [x for name, x in state.items() if isinstance(x, torch.Tensor) and not name.startswith("ranks")]
        assert all(x.isfinite().all() for x in (p, *tensors))
    assert len(seen) > 2


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_the_clock_counts_alike_on_the_host_and_where_it_is_traced(decay, monkeypatch):
    clocks = [Clock(torch.tensor(t), 0.9, 0.999) for t in (0, 1, 2, 1000)]
    on_host = [clock.weight(decay) for clock in clocks]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for host, clock in zip(on_host, clocks, strict=True):
        traced = clock.weight(decay)
        assert isinstance(host, float)
        assert traced.dtype == torch.float64
        assert traced.shape == ()
        assert host > 0
        assert abs(host - traced) <= 1e-12 * traced  # in float32 it would be 5e-5
