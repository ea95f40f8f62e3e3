"""A batch of rows is stepped as its members are one by one: every rule, transport and preconditioner."""

from dataclasses import fields

import pytest
import torch

from comoving.clock import Clock
from comoving.frames import Overlap
from comoving.rules import SOAP, SWAN, Adafactor, Adam, Columns, Momentum, Muon, NorMuon, Shampoo
from comoving.rules.base import averaged
from comoving.rules.turn import compiled
from comoving.slots import Kind
from comoving.transport import Carry, Keep, Rotate, initial
from contract.support import PRECONDITIONERS, RULES, STATELESS, TRANSPORTS, randn, random_frame

MORE = [
    Adafactor(decay=-0.5, floor=0.1, clip=0.3),
    Columns(along="left"),
    Muon(decay=0.6, steps=3, coefficients=(2.0, -1.5, 0.5), scale=0.7),
    Muon(bf16=True),
    NorMuon(0.6, False, True, "polar", 3, "quintic", 0.7, "each", True, "rows", "columns", True, 0.8),
    Shampoo(every=3, max_size=4, graft=True),
    SOAP(decay=0.8, every=2),
]
EVERY = [*RULES, *STATELESS, *MORE]
MOVES = [*TRANSPORTS, *(kind(statistics=s) for kind in (Rotate, Carry) for s in ("keep", "reset"))]
LAYOUTS = {
    "one side": [(7, 4), (4, None), (5, None)],
    "both sides": [(7, 9), (4, 4), (5, 3)],
    "three modes": [(5, 4, 6), (2, None, 4), (3, None, 3)],
}
"""The full shape, the ranks of the first two frames, and those of the third where moments can be resized.

No mode of the first core is longer than the others together: SOAP's first bases would be any in what is left of it.
"""
BETAS, EPS, SIZES, ROWS = (0.8, 0.95), 1e-6, (1.0, 0.0, 1e-2, 1e3), 4
PLAIN, ZERO, LOW, LARGE = range(ROWS)
ALL_BUT_LOW = (PLAIN, ZERO, LARGE)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


class Core:
    """Moments without an engine, of one row (rows = 0) or of a batch."""

    def __init__(self, rule, transport, core, whole, dtype, rows):
        self.rule, self.transport, self.rows = rule, transport, rows
        self.t, self.tick, self.state = torch.zeros(()), 0, {}
        real = dtype.to_real()
        for slot in self.slots(core):
            x = torch.empty((*[ROWS] * rows, *shape_of(slot, core, whole)))
            kind = real if slot.kind in (Kind.VARIANCE, Kind.FACTORED, Kind.SCALAR, Kind.MASS) else dtype
            self.state[slot.name] = initial(slot, x.to(kind))

    @property
    def clock(self):
        return Clock(self.t, *BETAS, self.tick, self.rows)

    def slots(self, core):
        own = self.rule.slots(core)
        return (*own, *self.transport.slots(own))

    def take(self, z, core):
        self.t, self.tick = self.t + 1, self.tick + 1
        self.transport.age(self.state, self.rule.slots(core), self.clock)
        self.rule.absorb(z, self.state, self.clock)
        return self.rule.direction(self.state, self.clock, EPS)

    def move(self, overlap, core):
        self.t = self.t.clone()
        self.state = self.transport.move(self.state, self.rule.slots(core), overlap, self.clock)


def shape_of(slot, core, whole):
    """The shape that a kind stands for; a mass has length 1 along whole modes."""
    if slot.kind is Kind.SCALAR:
        return ()
    if slot.kind is Kind.MASS:
        return core if slot.turned_by else tuple(1 if n in whole else d for n, d in enumerate(core))
    return core if slot.mode < 0 else (core[slot.mode],) * (1 if slot.kind is Kind.FACTORED else 2)


def gradients(core, dtype, t, low):
    """One for each row: of full rank, zero, of rank one, and large, but for one step without any.

    That of rank one is "any" at each step, the same "always" but for a factor, or a single "entry".
    """
    z = torch.stack([randn(core, dtype, 100 * t + row) * size for row, size in enumerate(SIZES)])
    z[LARGE] *= t != 3
    z[LOW] = SIZES[LOW] * (t + 1)
    for n, d in enumerate(core):
        side = randn((d,), dtype, 7 * n + 50 * t * (low == "any"))
        if low == "entry":
            side = (torch.arange(d) == 1).to(dtype)
        z[LOW] *= side.reshape([-1 if m == n else 1 for m in range(len(core))])
    return z


def frames(shape, ranks, dtype, seed):
    return [random_frame(shape, ranks, dtype, 10 * seed + row) for row in range(ROWS)]


def stacked(overlaps):
    matrices = [overlap.matrices for overlap in overlaps]
    return Overlap(tuple(None if ms[0] is None else torch.stack(ms) for ms in zip(*matrices, strict=True)))


def allowed(rule, transport):
    """As the engine refuses combinations of the two; what keeps no momentum has nothing to carry."""
    if rule in STATELESS:
        return transport == Keep()
    varies = any(slot.kind is Kind.VARIANCE for slot in rule.slots((3, 4)))
    return rule.corrected or not (varies and transport.projects)


def size_of(shape, ranks):
    return tuple(d if r is None else r for d, r in zip(shape, ranks, strict=True))


def determined(rule, transport, t):
    """The rows whose direction is more than what rounding left, divided by what rounding left.

    SOAP's is not where a matrix was turned to its singular values, nor, like that of roots without a floor, where
    momentum lies outside of what a factor of low rank has seen.
    """
    if isinstance(rule, SOAP):
        return [[ZERO], range(ROWS), ALL_BUT_LOW][min(t, 2)]
    outside = rule.definite and getattr(transport, "statistics", "") == "keep"
    return ALL_BUT_LOW if outside else range(ROWS)


def kinds(rule, core):
    return [(slot.name, slot.kind) for slot in rule.slots(core)]


def same(batch, members, tolerance, name, rows=range(ROWS)):
    """Each row to its own size."""
    for row in rows:
        size = float(members[row].abs().max())
        close_to = {"rtol": 0.0, "atol": tolerance * size, "msg": lambda m, row=row: f"{name}, row {row}: {m}"}
        torch.testing.assert_close(batch[row], members[row], **close_to)


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("transport", MOVES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_equals_its_members(rule, transport, dtype, layout):
    """Directions, momentum's mean and state over six steps with two changes of frame, the second to other ranks."""
    if not allowed(rule, transport):
        pytest.skip("refused: the transport would undo a bias correction, or has nothing to carry")
    assert rule.batched
    assert transport.batched
    shape, ranks, other = LAYOUTS[layout]
    old, whole = frames(shape, ranks, dtype, 1), [n for n, r in enumerate(ranks) if r is None]
    core = size_of(shape, ranks)
    batch = Core(rule, transport, core, whole, dtype, 1)
    alone = [Core(rule, transport, core, whole, dtype, 0) for _ in range(ROWS)]
    rounded = rule == Muon(bf16=True) and dtype is torch.float32
    tolerance = (
        0.05 if rounded else TOLERANCE[dtype.to_real()] * (8 if isinstance(rule, SWAN) else 1)
    )  # ill-conditioned
    for t in range(6):
        if t in (2, 4):
            resized = size_of(shape, other)
            if t == 4 and transport.resizes and kinds(rule, resized) == kinds(rule, core):
                ranks, core = other, resized
            new = frames(shape, ranks, dtype, 2 + t)
            overlaps = [a.overlap(b) for a, b in zip(new, old, strict=True)]
            batch.move(stacked(overlaps), core)
            for one, overlap in zip(alone, overlaps, strict=True):
                one.move(overlap, core)
            old = new
        z = gradients(core, dtype, t, "entry" if isinstance(rule, SOAP) else "any")
        before = z.clone()
        d = batch.take(z, core)
        assert torch.equal(z, before)
        assert d.shape == z.shape
        assert d.dtype is dtype
        assert d[[PLAIN, LOW, LARGE]].flatten(1).any(-1).all() or t == 3
        directions = [one.take(x, core) for one, x in zip(alone, z, strict=True)]
        same(d, directions, tolerance, f"direction {t}", determined(rule, transport, t))
        if rule not in STATELESS:
            means = [averaged(rule, one.state[rule.momentum], one.clock) for one in alone]
            same(averaged(rule, batch.state[rule.momentum], batch.clock), means, tolerance, f"mean {t}")
        assert all(torch.equal(one.t, batch.t) for one in alone)
        assert all(one.state.keys() == batch.state.keys() for one in alone)
        for slot in batch.slots(core):
            x, members = batch.state[slot.name], [one.state[slot.name] for one in alone]
            assert tuple(x.shape[1:]) == tuple(members[0].shape), slot
            if slot.kind is Kind.BASIS:  # whose vectors have any phase
                x = x * (x.conj() * torch.stack(members)).sum(-2, keepdim=True).sgn()
            loose = slot.kind in (Kind.BASIS, Kind.CACHE) or slot.turned_by
            same(x, members, tolerance, f"{slot.name} {t}", ALL_BUT_LOW if loose else range(ROWS))


def beyond(core, dtype, t):
    """One of the rows so large that its squares leave the range of float32, but not every rule's direction."""
    z = gradients(core, dtype, t, "always")
    z[LARGE] *= 1e24
    return z


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_row_whose_squares_overflow_is_bounded_alone(rule, dtype):
    core = (4, 3)
    batch, *alone = (Core(rule, Keep(), core, (), dtype, rows) for rows in (1, *[0] * ROWS))
    for t in range(3):
        z = beyond(core, dtype, t)
        d = batch.take(z, core)
        directions = [one.take(x, core) for one, x in zip(alone, z, strict=True)]
        assert all(x.isfinite().all() for x in directions)
        if not isinstance(rule, SOAP) or t:
            tolerance = 0.05 if rule == Muon(bf16=True) else TOLERANCE[torch.float32]
            same(d, directions, tolerance, f"direction {t}", ALL_BUT_LOW)
        for name in (slot.name for slot in batch.slots(core) if slot.kind is Kind.FACTORED):
            same(batch.state[name], [one.state[name] for one in alone], TOLERANCE[torch.float32], name)


@pytest.mark.parametrize("part", PRECONDITIONERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_row_whose_squares_overflow_is_preconditioned_alone(part, dtype):
    shape = (4, 3)
    slots = part.schema(shape, dtype)
    batch = {name: torch.zeros((ROWS, *x.shape), dtype=x.dtype) for name, x in slots.items()}
    alone = [{name: torch.zeros(x.shape, dtype=x.dtype) for name, x in slots.items()} for _ in range(ROWS)]
    for t in range(1, 4):
        g = beyond(shape, dtype, t)
        members = [part.apply(x, state, t) for x, state in zip(g, alone, strict=True)]
        same(part.apply(g, batch, t, 1), members, 0.02, f"step {t}", ALL_BUT_LOW)  # roots of eigenvalues of roundoff
        for name in slots:
            if not name.endswith(".root"):  # a factor of few gradients has eigenvalues of roundoff, which roots magnify
                members = [state[name] for state in alone]
                same(batch[name], members, TOLERANCE[torch.float32], name, ALL_BUT_LOW)


def test_every_hyper_parameter_is_away_from_its_default_somewhere():
    for kind in {type(part) for part in (*EVERY, *MOVES, *PRECONDITIONERS)}:
        for field in fields(kind):
            values = {getattr(part, field.name) for part in (*EVERY, *MOVES, *PRECONDITIONERS) if type(part) is kind}
            assert values - {field.default}, (kind, field.name)


@pytest.mark.parametrize("rule", [Adam(), SOAP()], ids=str)
def test_moments_of_another_optimizer_are_adopted_row_by_row(rule):
    core, transport = (3, 5), Carry()
    batch, alone = (Core(rule, transport, core, (), torch.float64, rows) for rows in (1, 0))
    for one in (batch, alone):
        own = {slot.name for slot in rule.slots(core)}
        one.state = {name: x for name, x in one.state.items() if name in own}
        one.t = torch.tensor(7.0)
        transport.adopt(one.state, rule.slots(core), one.clock)
    assert batch.state.keys() == alone.state.keys()
    for name, x in alone.state.items():
        assert torch.equal(batch.state[name], torch.stack([x] * ROWS)), name
    assert batch.state["moment.second.bound"].is_contiguous()
    transport.age(batch.state, rule.slots(core), batch.clock)  # in place: no two rows may share a number


class Countable(Momentum):
    """A rule that depends on the number of rows, and on the shape of one."""

    def slots(self, shape):
        assert len(shape) == 2
        return super().slots(shape)

    def direction(self, state, clock, eps):
        return super().direction(state, clock, eps) * (2 + clock.rows)


@pytest.mark.parametrize("rule", [*(rule for rule in EVERY if rule.timeless), Countable()], ids=str)
@pytest.mark.parametrize("transport", [Keep(), Carry()], ids=str)
def test_a_batch_is_compiled_to_the_same(rule, transport):
    torch._dynamo.reset()  # one function is compiled for all cases, and only so often
    core, turn = (3, 5), compiled(backend="eager", fullgraph=True)
    batch, twin = (Core(rule, transport, core, (1,), torch.float64, 1) for _ in range(2))
    for t in range(2):
        z = gradients(core, torch.float64, t, "any")
        expected = twin.take(z, core)
        batch.t, batch.tick = batch.t + 1, batch.tick + 1
        transport.age(batch.state, rule.slots(core), batch.clock)
        torch.testing.assert_close(turn(rule, z, batch.state, batch.clock, EPS), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("part", PRECONDITIONERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(3, 6), (7, 4), (3, 4, 5)], ids=str)
def test_a_batch_is_preconditioned_as_its_members(part, dtype, shape):
    assert part.batched
    slots = part.schema(shape, dtype)
    batch = {name: torch.zeros((ROWS, *x.shape), dtype=x.dtype) for name, x in slots.items()}
    alone = [{name: torch.zeros(x.shape, dtype=x.dtype) for name, x in slots.items()} for _ in range(ROWS)]
    tolerance = TOLERANCE[dtype.to_real()]
    for t in range(1, 6):
        g = gradients(shape, dtype, t, "always")
        before = g.clone()
        turned = part.apply(g, batch, t, 1)
        assert torch.equal(g, before)
        assert turned.shape == g.shape
        assert turned.dtype is dtype
        same(turned, [part.apply(x, state, t) for x, state in zip(g, alone, strict=True)], tolerance, f"step {t}")
        for name in slots:
            assert batch[name].dtype is alone[0][name].dtype
            # What rounding left of a factor without full rank decides on its root.
            compared = ALL_BUT_LOW if name.endswith(".root") else range(ROWS)
            same(batch[name], [state[name] for state in alone], tolerance, name, compared)
