"""What a part states of itself (``groups._TRAITS``) is true of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comoving.cadence import When
from comoving.clock import Clock
from comoving.codecs import Full, Int8
from comoving.frames import Cosines, Modes, Pooled, Seeded, SparseModes, Trains
from comoving.groups import _TRAITS
from comoving.linalg import norm
from comoving.residual import Channel, Cores, Passage, Update
from comoving.rules.adam import FIRST, SECOND
from comoving.slots import Kind
from comoving.transport import Carry, Rotate
from contract.support import (
    CADENCES,
    COMPLEX,
    MOVING,
    REAL,
    RESIDUALS,
    RULES,
    STATELESS,
    TRANSPORTS,
    Bare,
    close,
    core_of,
    randn,
    random_frame,
    shape_of,
)

CORE = (4, 6)
EVERY_RULE = [*RULES, *STATELESS]
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
TRANSPORTED = [*TRANSPORTS, *(kind(statistics=s) for kind in (Rotate, Carry) for s in ("keep", "reset"))]
KEEPING = [*RESIDUALS, *MOVING, Channel(growth=None)]


def those(parts, trait):
    return pytest.mark.parametrize("part", [part for part in parts if getattr(part, trait)], ids=str)


# ----------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
@FIELDS
def test_elementwise_rules_and_no_others_keep_entries_apart(rule, dtype):
    bare, other, reached = Bare(rule, CORE, dtype), Bare(rule, CORE, dtype), torch.zeros(CORE, dtype=torch.bool)
    for t in range(4):
        z = randn(CORE, dtype, t)
        changed = z.clone()
        changed[1, 2] *= -1.5
        reached |= bare.take(z) != other.take(changed)
    assert reached[1, 2]
    assert rule.elementwise is (int(reached.sum()) == 1)


@those(EVERY_RULE, "elementwise")
@FIELDS
def test_elementwise_rules_see_no_shape(part, dtype):
    bare, flat = Bare(part, CORE, dtype), Bare(part, (24,), dtype)
    for t in range(4):
        z = randn(CORE, dtype, t)
        close(bare.take(z).flatten(), flat.take(z.flatten()), 1e-12)


class Untold(Clock):
    """A clock whose host has forgotten the step."""

    def __getattribute__(self, name):
        if name == "tick":
            raise AssertionError(name)
        return super().__getattribute__(name)


class Undecomposed(TorchDispatchMode):
    """Where no matrix is decomposed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "linalg" not in str(func) or "vector_norm" in str(func), func
        return func(*args, **(kwargs or {}))


@those(EVERY_RULE, "timeless")
@FIELDS
def test_timeless_rules_read_no_tick_and_decompose_nothing(part, dtype):
    bare, twin = Bare(part, CORE, dtype), Bare(part, CORE, dtype)
    for t in range(1, 4):
        z, clock = randn(CORE, dtype, t), Untold(torch.tensor(float(t)), *bare.betas)
        with Undecomposed():
            part.absorb(z, bare.state, clock)
            d = part.direction(bare.state, clock, 1e-8)
        assert torch.equal(d, twin.take(z))


@those(EVERY_RULE, "replaces")
@FIELDS
def test_rules_that_replace_their_slots_leave_the_old_ones(part, dtype):
    bare = Bare(part, (5, 6), dtype)
    for t in range(7):
        given = {name: (x, x.clone(), x._version) for name, x in bare.state.items()}
        bare.take(randn((5, 6), dtype, t))
        for name, (x, before, version) in given.items():
            assert torch.equal(x, before) and x._version == version, name


@those(EVERY_RULE, "total")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
@pytest.mark.parametrize("shape", [(6,), (1, 1), (4, 6), (3, 1, 5)], ids=str)
def test_total_rules_never_raise(part, shape, dtype):
    bare = Bare(part, shape, dtype)
    for x in (torch.nan, torch.inf, -torch.inf, 0.0, 3e38, 1e-45, 1.0):
        with Undecomposed():
            assert bare.take(torch.full(shape, x, dtype=dtype)).shape == shape


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
@FIELDS
def test_corrected_rules_and_no_others_begin_as_they_go_on(rule, dtype):
    """By one gradient over and over, an average that begins at zero goes from a tenth of it to all of it."""
    bare, z = Bare(rule, CORE, dtype), randn(CORE, dtype)
    first, *later = [bare.take(z) for _ in range(6)]
    assert rule.corrected is all((d - first).norm() < 0.2 * first.norm() for d in later)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.definite], ids=str)
@FIELDS
def test_rules_that_are_not_definite_bear_covariances_that_were_rounded(rule, dtype):
    bare = Bare(rule, CORE, dtype)
    covariances = [slot.name for slot in rule.slots(CORE) if slot.kind is Kind.COVARIANCE]
    for t in range(8):
        d = bare.take(randn(CORE, dtype, t))
        assert d.isfinite().all() and d.abs().max() < 1e3
        for name in covariances:  # the smallest eigenvalue becomes negative
            values, vectors = torch.linalg.eigh(bare.state[name])
            u = vectors[:, :1]
            bare.state[name] = bare.state[name] - (values[0] + 0.02 * values[-1]) * (u @ u.mH)


# ------------------------------------------------------------------------------------------------------ transports


def carried(transport, rule, ranks, new_ranks, dtype):
    """The slots of a rule and a transport before and after a change of frame, and its overlap."""
    shape = (7, 9)
    bare = Bare(rule, core_of(shape, ranks), dtype)
    for t in range(3):
        bare.take(randn(core_of(shape, ranks), dtype, t))
    slots, clock = rule.slots(core_of(shape, ranks)), Clock(bare.t, *bare.betas, bare.tick)
    transport.adopt(bare.state, slots, clock)
    overlap = random_frame(shape, new_ranks, dtype, 2).overlap(random_frame(shape, ranks, dtype, 1))
    return bare.state, transport.move(bare.state, slots, overlap, clock), overlap, clock


@pytest.mark.parametrize("transport", TRANSPORTED, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@FIELDS
def test_transports_that_project_and_no_others_turn_linear_slots(transport, rule, dtype):
    """Bit for bit: what the engine would project for itself is the slot."""
    state, moved, overlap, clock = carried(transport, rule, (4, None), (4, None), dtype)
    linear = [slot.name for slot in rule.slots((4, 9)) if slot.kind is Kind.LINEAR]
    assert {torch.equal(moved[name], overlap.move(state[name])) for name in linear} == {transport.projects}
    assert bool(clock.t == 0) is transport.restarts


@those(TRANSPORTED, "resizes")
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("new", [(5, None), (2, None), (None, None), (3, 6)], ids=str)
def test_transports_that_resize_make_slots_of_the_new_ranks(part, rule, new):
    core = core_of((7, 9), new)
    if [slot.kind for slot in rule.slots(core)] != [slot.kind for slot in rule.slots((4, 9))]:
        pytest.skip("refused: it has slots of another kind for long modes")
    _, moved, _, _ = carried(part, rule, (4, None), new, REAL)
    for slot in rule.slots(core):
        if slot.kind is not Kind.CACHE:
            assert tuple(moved[slot.name].shape) == shape_of(slot, core), slot


# ------------------------------------------------------------------------------------------------------- residuals

SHAPE, RANKS = (6, 8), (2, None)


class Kept:
    """A residual in a frame that stands, and what it is given by hand."""

    def __init__(self, residual, codec, dtype=REAL):
        self.residual, self.codec = residual, codec
        self.frame = random_frame(SHAPE, RANKS, dtype, 1)
        parts = residual.schema(codec, SHAPE, core_of(SHAPE, RANKS), dtype)
        self.state = {name: torch.zeros(part.shape, dtype=part.dtype) for name, part in parts.items()}
        self.core = None

    def passage(self, m, tick=1):
        return Passage(self.frame, m, 0.9, 0.1, self.frame, m, tick=tick)

    def take(self, g, m):
        """A gradient as the engine has it taken up, beside a momentum m; returns what is kept and g~."""
        residual, state, opening = self.residual, self.state, self.core is None
        if opening:
            residual.renew(g, state, self.codec)
        seen = residual.split(g, state)
        restored = residual.restore(seen, self.passage(m), opening, state, self.codec)
        total = restored.full().clone()
        z = self.frame.project(total if opening else seen)
        self.core = z if opening else self.core + z
        return residual.keep(restored.dense, Cores(self.core, z), self.passage(m), opening, state, self.codec), total

    def written(self):
        """The weights after an update, from zero."""
        weights, clock = torch.zeros(SHAPE, dtype=self.core.dtype), Clock(torch.ones(()), 0.9, 0.99, 1)
        moments = {FIRST: self.core, SECOND: self.core.abs().square()} if self.residual.reads else {}
        core, d = self.core, self.core.sgn()
        update = Update(lambda: self.frame, (0,), core, d, -0.1, 1.0, -0.1, clock, 1e-12, None, moments)
        self.residual.write(weights, update, self.state, self.codec)
        return weights


@pytest.mark.parametrize("residual", KEEPING, ids=str)
@pytest.mark.parametrize("codec", [Full(), Int8()], ids=str)
@FIELDS
def test_residuals_that_hold_and_no_others_keep_the_gradient_itself(residual, codec, dtype):
    kept, m = Kept(residual, codec, dtype), torch.zeros(core_of(SHAPE, RANKS), dtype=dtype)
    for t in range(2):
        g = randn(SHAPE, dtype, t)
        kept.take(g, m)
        own = {x.untyped_storage().data_ptr() for x in kept.state.values()}
        assert (g.untyped_storage().data_ptr() in own) is (residual.holds and t == 0)


@those(KEEPING, "rescales")
@FIELDS
def test_residuals_that_rescale_do_as_with_a_gradient_that_was_scaled(part, dtype):
    """And they know the size of what is scaled."""
    g, m = randn(SHAPE, dtype, 1), randn(core_of(SHAPE, RANKS), dtype, 2)
    after, before = Kept(part, Full(), dtype), Kept(part, Full(), dtype)
    size, total = after.take(g, m)
    rest = norm(total - after.frame.lift(after.core)) if size is None else size
    close(part.size(after.core, rest, after.state), norm(g), 1e-6)
    part.rescale(0.3, after.core, after.passage(m), after.state, Full())
    after.core = after.core * 0.3
    before.take(0.3 * g, m)
    next_m = 0.9 * m + 0.1 * before.core
    close(after.written(), before.written())
    again = [part.restore(torch.zeros_like(g), x.passage(next_m, 2), True, x.state, Full()) for x in (after, before)]
    close(again[0].full(), again[1].full())


@pytest.mark.parametrize("residual", KEEPING, ids=str)
def test_residuals_that_read_moments_and_no_others_fail_without_them(residual):
    kept = Kept(residual, Full())
    kept.take(randn(SHAPE, REAL, 1), torch.zeros(core_of(SHAPE, RANKS), dtype=REAL))
    clock = Clock(torch.ones(()), 0.9, 0.99, 1)
    update = Update(lambda: kept.frame, (0,), kept.core, kept.core.sgn(), -0.1, 1.0, -0.1, clock, 1e-12)
    weights = torch.zeros(SHAPE, dtype=REAL)
    if residual.reads:
        with pytest.raises(KeyError, match="moment"):
            residual.write(weights, update, kept.state, Full())
    else:
        residual.write(weights, update, kept.state, Full())
    assert bool(weights.any()) is not residual.reads


# -------------------------------------------------------------------------------------------------------- cadences


def fresh(cadence):
    return {name: torch.zeros(part.shape, dtype=part.dtype) for name, part in cadence.schema().items()}


@pytest.mark.parametrize("cadence", CADENCES, ids=str)
def test_cadences_that_refresh_frames_alone_and_no_others_go_by_what_was_found(cadence):
    """One frame that stays, and one that leaves its span every time."""
    standing, turning = random_frame((12, 8), (3, None), seed=1), [fresh(cadence), fresh(cadence)]
    for t in range(8):
        found = (standing, standing), (standing, random_frame((12, 8), (3, None), seed=2 + t))
        turning = [cadence.refreshed(x, *pair, When(t + 1, 1, 0)) for x, pair in zip(turning, found, strict=True)]
    decided = [[cadence.due(slots, When(t, 1, 0)) for t in range(8, 200)] for slots in turning]
    assert cadence.alone is (decided[0] != decided[1])


@pytest.mark.parametrize("cadence", CADENCES, ids=str)
@pytest.mark.parametrize("layout", [Modes(), Cosines(), Seeded(), Pooled(), SparseModes(block=2), Trains()], ids=str)
def test_cadences_compare_frames_of_the_types_that_they_state(cadence, layout):
    """Those that state none are given what is no frame at all."""
    x = randn((12, 8))
    last, new = (layout.start(x, layout.ranks((12, 8), 3, "auto"), None, seed) for seed in (1, 2))
    if not cadence.compares:
        last = new = object()
    elif type(new) not in cadence.compares:
        pytest.skip("refused")
    slots = fresh(cadence)
    for t in range(3):
        slots = cadence.refreshed(slots, last, new, When(t, 2, 0))
        assert all(x.isfinite().all() for x in slots.values())


# ------------------------------------------------------------------------------------------------------------- all

ELSEWHERE = {
    "batched": "test_rows_*.py, by role; of cadences test_cadences.py",
    "linear": "test_rules.py, test_the_recursion_is_that_of_the_momentum",
    "feeds": "test_parts.py, test_residuals_that_feed and those that do not",
    "fills": "tests/finders/test_matrix.py, by what is refused",
    "makes": "likewise",
    "joint": "test_joint_finders.py",
    "ahead": "test_delayed.py, by the step that uses what was searched",
    "entrywise": "tests/distributed/test_shards.py",
    "modal": "tests/frames/test_sparse.py, by what is refused",
    "signed": "test_rows_codecs.py",
    "replays": "test_graphs.py, test_every_part_that_replays_is_replayed_here",
    "bounded": "test_diagnostics.py, test_where_there_is_a_bound_it_holds",
}
HERE = {
    "definite", "corrected", "elementwise", "timeless", "replaces", "total", "resizes", "projects", "restarts", "alone",
    "compares", "holds", "rescales", "reads",
}  # fmt: skip


def test_every_trait_has_its_test():
    assert HERE | ELSEWHERE.keys() == {trait for traits in _TRAITS.values() for trait in traits}
