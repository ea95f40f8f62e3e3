"""What every frame, transport, codec, residual and rule promises."""

import io

import pytest
import torch

from comoving.clock import Clock
from comoving.codecs import Full
from comoving.frames import ModeFrame, Modes
from comoving.residual import Cores, Feedback, Passage
from comoving.rules import Adam
from comoving.state import layout
from comoving.transport import Keep
from contract.support import (
    CODECS,
    COMPLEX,
    DRAWN,
    LOSS,
    MOVING,
    REAL,
    RESIDUALS,
    TRANSPORTS,
    close,
    core_of,
    explicit,
    lone,
    randn,
    random_frame,
    step,
)

RULE = Adam()
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
SHAPES = pytest.mark.parametrize(
    ("shape", "ranks"), [((6, 8), (2, None)), ((8, 6), (None, 2)), ((6, 8), (3, 2)), ((4, 3, 5), (2, None, 3))], ids=str
)
SIZES = pytest.mark.parametrize("size", [0.0, 1e-15, 1.0, 1e15])


@pytest.fixture(autouse=True)
def no_global_randomness():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------- frames


@FIELDS
@SHAPES
def test_a_frame_is_its_explicit_basis(shape, ranks, dtype):
    frame, x = random_frame(shape, ranks, dtype, 1), randn(shape, dtype, 2)
    basis, z = explicit(frame, shape, dtype), randn(core_of(shape, ranks), dtype, 3)
    close(frame.project(x).flatten(), basis.mH @ x.flatten())
    close(frame.lift(z).flatten(), basis @ z.flatten())
    close(frame.project(frame.lift(z)), z)
    out = x.clone()
    assert frame.add_lift(out, z, -0.7).data_ptr() == out.data_ptr()
    close(out, x - 0.7 * frame.lift(z))
    close(frame.add_lift(x.clone(), z, -0.7, 0.4), 0.4 * x - 0.7 * frame.lift(z))
    assert frame.ranks == ranks
    assert frame.defect() < 1e-14


@FIELDS
@SHAPES
@pytest.mark.parametrize("older", ["same ranks", "fewer", "whole"])
def test_overlap_is_that_of_the_explicit_bases(older, shape, ranks, dtype):
    old_ranks = {"same ranks": ranks, "fewer": tuple(r and 1 for r in ranks), "whole": (None,) * len(shape)}[older]
    new, old = random_frame(shape, ranks, dtype, 1), random_frame(shape, old_ranks, dtype, 2)
    for a, b in ((new, old), (old, new)):
        small = ModeFrame(tuple(a.overlap(b).matrices))
        size = core_of(shape, b.ranks)
        expected = explicit(a, shape, dtype).mH @ explicit(b, shape, dtype)
        factors = [torch.eye(d, dtype=dtype) if r is None else r for r, d in zip(small.factors, size, strict=True)]
        product = factors[0]
        for factor in factors[1:]:
            product = torch.kron(product.resolve_conj().contiguous(), factor.resolve_conj().contiguous())
        close(product, expected)


@FIELDS
@SHAPES
def test_a_start_keeps_the_leading_directions_and_is_seeded(shape, ranks, dtype):
    like, old = torch.zeros(shape, dtype=dtype), random_frame(shape, tuple(r and 2 for r in ranks), dtype, 1)
    more, fewer = tuple(r and 3 for r in ranks), tuple(r and 1 for r in ranks)
    grown, cut = Modes().start(like, more, old, 5), Modes().start(like, fewer, old, 5)
    for u, up, down in zip(old.factors, grown.factors, cut.factors, strict=True):
        if u is not None:
            close(up[:, :2], u)
            close(up.mH @ up, torch.eye(3, dtype=dtype), 1e-13)
            close(down, u[:, :1], 1e-13)
    assert Modes().start(like, old.ranks, old, 5).factors[0] is old.factors[0]
    again, other = Modes().start(like, more, None, 5), Modes().start(like, more, None, 6)
    first = Modes().start(like, more, None, 5)
    for u, v, w in zip(first.factors, again.factors, other.factors, strict=True):
        if u is not None:
            assert torch.equal(u, v)
            assert not torch.allclose(u, w)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (32, 24, 16), (16, 16, 3, 3), (64, 64, 16, 9)], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5])
def test_a_share_is_that_share_of_the_entries(shape, share):
    ranks = Modes().ranks(shape, share)
    core, full = torch.Size(core_of(shape, ranks)).numel(), torch.Size(shape).numel()
    assert core / full == pytest.approx(share, rel=0.26)


def test_a_frame_survives_its_tensors():
    frame = random_frame((6, 4, 5), (2, None, 3))
    again = Modes().load(frame.tensors(), (6, 4, 5))
    assert set(frame.tensors()) == {"frame.0", "frame.2"}
    assert all(u is v for u, v in zip(frame.factors, again.factors, strict=True))
    schema = Modes().schema((6, 4, 5), (2, None, 3), REAL)
    assert {n: (tuple(x.shape), x.dtype) for n, x in frame.tensors().items()} == {
        n: (p.shape, p.dtype) for n, p in schema.items()
    }


# ------------------------------------------------------------------------------------------------------ transports


def moments(transport, ranks, core, dtype, size):
    """The slots of Adam and of the transport after five steps with gradients of this size."""
    clock, state = Clock(torch.zeros(()), 0.8, 0.95), {}
    real = torch.zeros((), dtype=dtype).real.dtype if dtype.is_complex else dtype
    shapes = {"LINEAR": (core, dtype), "VARIANCE": (core, real), "SCALAR": ((), torch.float32)}
    shapes["MASS"] = (tuple(1 if r is None else r for r in ranks), real)
    for slot in (*RULE.slots(()), *transport.slots(RULE.slots(()))):
        shape, kind = shapes[slot.kind.name]
        state[slot.name] = torch.zeros(shape, dtype=kind)
    for t in range(5):
        clock.t.add_(1)
        RULE.absorb(randn(core, dtype, t) * size, state, clock)
        transport.age(state, RULE.slots(()), clock)
    return clock, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
@pytest.mark.parametrize("transport", TRANSPORTS, ids=str)
@SHAPES
@SIZES
def test_transports(transport, shape, ranks, size, dtype):
    """Finite, real and nonnegative v, of the new shape, repeatable; the old slots stay as they are."""
    new_ranks = ranks if isinstance(transport, Keep) else tuple(r and r + 1 for r in ranks)
    clock, state = moments(transport, ranks, core_of(shape, ranks), dtype, size)
    old, new = random_frame(shape, ranks, dtype, 1), random_frame(shape, new_ranks, dtype, 2)
    before, t = {n: x.clone() for n, x in state.items()}, clock.t.clone()
    moved = transport.move(state, RULE.slots(()), new.overlap(old), clock)
    assert all(torch.equal(state[name], x) for name, x in before.items())
    assert set(moved) == set(state)
    clock = Clock(t, 0.8, 0.95)
    again = transport.move(state, RULE.slots(()), new.overlap(old), clock)
    for name, x in moved.items():
        assert x.isfinite().all()
        assert torch.equal(x, again[name])
        assert x.dtype is state[name].dtype
    assert moved["moment.first"].shape == moved["moment.second"].shape == core_of(shape, new_ranks)
    assert (moved["moment.second"] >= 0).all()
    if size == 0.0:
        assert not moved["moment.first"].any()
        assert not moved["moment.second"].any()
    clock.t.add_(1)
    RULE.absorb(torch.zeros_like(moved["moment.first"]), moved, clock)
    transport.age(moved, RULE.slots(()), clock)
    direction = RULE.direction(moved, clock, 1e-8)
    assert direction.isfinite().all()
    assert direction.abs().max() < 50


@pytest.mark.parametrize("transport", TRANSPORTS, ids=str)
@FIELDS
def test_slots_adopted_from_plain_adam_are_those_of_a_run_with_them(transport, dtype):
    """AdamW's checkpoint, in a whole frame: the transport's own slots are reconstructed."""
    core = (4, 6)
    clock, state = moments(transport, (None, None), core, dtype, 1.0)
    plain = {slot.name: state[slot.name].clone() for slot in RULE.slots(())}
    transport.adopt(plain, RULE.slots(()), clock)
    assert set(plain) == set(state)
    for name, x in state.items():
        close(plain[name].to(x.dtype).expand(x.shape), x, 1e-6)


# ---------------------------------------------------------------------------------------------- codecs and residuals


@pytest.mark.parametrize("codec", [*CODECS, *DRAWN], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (5, 33), (2, 3, 4, 5)], ids=str)
@SIZES
def test_codecs(codec, shape, dtype, size):
    """Zeros decode to zero; encoding is finite, repeatable, stable, and loses at most what it says."""
    x = randn(shape, dtype) * size
    stored = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in codec.schema(shape, dtype).items()}
    empty = codec.decode(stored, shape, dtype)
    assert empty.shape == x.shape
    assert empty.dtype is dtype
    assert not empty.any()
    for _ in range(2):
        codec.encode(x.clone(), stored)
        decoded = codec.decode(stored, shape, dtype).clone()
        assert decoded.is_contiguous()
        assert decoded.isfinite().all()
        error = codec.error(stored)
        assert error.shape == ()
        assert (decoded - x).norm() <= error * (1 + 1e-5) + 1e-6 * x.norm() * (codec != Full())
        assert (decoded - x).norm() <= LOSS.get(type(codec), 0.02) * x.norm()
    codec.encode(decoded.clone(), stored)
    close(
        codec.decode(stored, shape, dtype) / (size or 1.0), decoded / (size or 1.0), 1e-6
    )  # a second time loses nothing


TURNED = pytest.mark.parametrize("turned", [False, True])


def those_that_feed(wanted):
    return pytest.mark.parametrize("residual", [r for r in RESIDUALS if r.feeds is wanted], ids=str)


@those_that_feed(True)
@pytest.mark.parametrize("codec", CODECS, ids=str)
@FIELDS
@SHAPES
@SIZES
@TURNED
def test_residuals_that_feed(residual, codec, shape, ranks, size, turned, dtype):
    """The gradient stays as it is; what is kept, with what the frame holds, is the whole of it."""
    check(residual, codec, shape, ranks, size, turned, dtype)


class Untouched:
    """A codec that nobody may use."""

    def __getattr__(self, name):
        raise AssertionError(name)


@those_that_feed(False)
@FIELDS
@SHAPES
@SIZES
@TURNED
def test_residuals_that_do_not_feed(residual, shape, ranks, size, turned, dtype):
    """The gradient stays as it is; nothing comes back; and the codec, of which there is none, is not asked."""
    check(residual, Untouched(), shape, ranks, size, turned, dtype)


def check(residual, codec, shape, ranks, size, turned, dtype):
    frame = random_frame(shape, ranks, dtype, 1)
    old = random_frame(shape, ranks, dtype, 2) if turned else frame
    g = randn(shape, dtype, 3) * size
    before = g.clone()
    m = old.project(randn(shape, dtype, 4)) * size
    schema = residual.schema(codec, shape, tuple(m.shape), dtype)
    state = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in schema.items()}
    seen = residual.restore(g, Passage(old, m, 0.8, 0.2, old, m, tick=1), True, state, codec)
    assert torch.equal(seen.full(), g)
    close(seen.norm().double() / (size or 1), g.norm() / (size or 1), 1e-5)
    core, moved = frame.project(g), frame.project(old.lift(m))
    turn = {"overlap": frame.overlap(old), "image": moved} if turned else {}
    dense = seen.dense.clone() if seen.dense is g else seen.dense
    size_kept = residual.keep(
        dense, Cores.only(core), Passage(frame, moved, 0.8, 0.2, old, m, **turn, tick=1), True, state, codec
    )
    assert torch.equal(g, before)
    assert (size_kept is not None) is residual.feeds
    returned = turned and getattr(residual, "momentum", False)
    expected = g - frame.lift(core) + (4.0 * (old.lift(m) - frame.lift(moved)) if returned else 0)
    then = 0.8 * moved + 0.2 * core
    next_step = Passage(frame, then, 0.8, 0.2, frame, then, tick=2)
    again = residual.restore(torch.zeros_like(g), next_step, True, state, codec)
    if isinstance(residual, Feedback):
        scale = (g.norm() + 10 * m.norm()) / (size or 1)
        close(size_kept.double() / (size or 1), expected.norm() / (size or 1), 1e-3 * float(scale))
        expected = residual.decay * expected
        assert (again.full() - expected).norm() <= residual.error(state, codec) * (1 + 1e-5) + 1e-6 * expected.norm()
    else:
        assert size_kept is None
        assert state.keys() - schema.keys() <= {"held"}
        assert not again.full().any()


@pytest.mark.parametrize("residual", MOVING, ids=str)
@pytest.mark.parametrize("codec", [c for c in CODECS if type(c) not in LOSS], ids=str)
@FIELDS
@SHAPES
@SIZES
def test_a_buffer_that_keeps_part_of_what_the_frame_holds(residual, codec, shape, ranks, size, dtype):
    """M = B - (1 - mu) F F^H B with B = M + g, in two frames, each of two gradients, which count as one."""
    frames = [random_frame(shape, ranks, dtype, n) for n in (1, 2)]
    schema = residual.schema(codec, shape, core_of(shape, ranks), dtype)
    state, kept = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in schema.items()}, torch.zeros(shape, dtype=dtype)
    slack = (1e-9 if codec == Full() else 0.05) * size
    for n, frame in enumerate(frames):
        core = torch.zeros(core_of(shape, ranks), dtype=dtype)
        for i in range(2):
            g = randn(shape, dtype, 3 + 2 * n + i) * size
            before = g.clone()
            standing = Passage(frame, core, 0.0, 1.0, frame, core)
            dense = residual.restore(g, standing, i == 0, state, codec).dense
            z = frame.project(dense if i == 0 else g)
            core = core + z
            standing = Passage(frame, core, 0.0, 1.0, frame, core)
            outside = residual.keep(dense, Cores(core, z), standing, i == 0, state, codec)
            assert torch.equal(g, before)
            assert residual.feeds
            kept = kept + g
        inside = frame.project(kept)
        assert (core - inside).norm() <= slack * core.numel() ** 0.5
        assert abs(outside - (kept - frame.lift(inside)).norm()) <= slack * kept.numel() ** 0.5
        kept = kept - (1 - residual.decay) * frame.lift(inside)
        now = residual.restore(torch.zeros_like(g), standing, True, state, codec).full()
        assert (now - kept).norm() <= slack * now.numel() ** 0.5
        assert residual.error(state, codec) <= slack * now.numel() ** 0.5


class Stepped:
    """A parameter alone, stepped with seeded gradients; refreshes before steps 0, 3, 6, ..."""

    def __init__(self, residual, case, dtype, start=None):
        self.shape, self.rank = CASES[case]
        self.p, self.optimizer = lone(
            randn(self.shape, dtype) if start is None else start, rank=self.rank, residual=residual, refresh_every=3,
            betas=(0.8, 0.95), eps=1e-3, lr=0.1, scale=0.7,
        )  # fmt: skip
        assert self.optimizer.sites[self.p].projected

    @property
    def state(self):
        return self.optimizer.state[self.p]

    def gradient(self, t):
        return randn(self.shape, self.p.dtype, 20 + t)

    def run(self, first, last):
        for t in range(first, last):
            step(self.optimizer, self.p, self.gradient(t))
        return self


CASES = {
    "rank 1": ((6, 10), 1),
    "both sides": ((10, 6), (3, 2)),
    "order 4": ((4, 3, 5, 3), (2, 2, 2, None)),
    "a mode of 1": ((1, 9, 8), (None, 2, None)),
}
STEPPED = [
    pytest.mark.parametrize("residual", RESIDUALS, ids=str),
    pytest.mark.parametrize("case", CASES),
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, REAL], ids=str),
]


def stepped(test, marks=STEPPED):
    for mark in marks:
        test = mark(test)
    return test


def exactly_stepped(test):
    return stepped(test, [*STEPPED[:2], FIELDS])


@stepped
def test_a_residual_leaves_the_gradient_and_nothing_else(residual, case, dtype):
    """p.grad is as it was; between two steps the state is what the layout says; same steps give the same bits."""
    one, twin = Stepped(residual, case, dtype), Stepped(residual, case, dtype)
    for t in range(7):
        one.p.grad = one.gradient(t)
        version = one.p.grad._version
        one.optimizer.step()
        assert one.p.grad._version == version
        assert torch.equal(one.p.grad, one.gradient(t))
        promised = layout(one.optimizer.sites[one.p], one.optimizer.param_groups[0])
        found = {n: (tuple(x.shape), x.dtype) for n, x in one.state.items() if n != "tick"}
        assert found == {n: (spec.shape, spec.dtype) for n, spec in promised.items()}
        assert one.p.isfinite().all()
        assert all(torch.as_tensor(x).isfinite().all() for x in one.state.values())
    assert torch.equal(twin.run(0, 7).p, one.p)


@exactly_stepped
def test_a_residual_adds_up_what_one_step_absorbs(residual, case, dtype):
    """Between refreshes, parts of a gradient, each cleared after it was given, make the step of their sum."""
    one, twin = Stepped(residual, case, dtype), Stepped(residual, case, dtype)
    for t in range(8):
        g, h = one.gradient(t), one.gradient(t + 50)
        if t % 3:
            for x in (g.clone(), h.clone()):
                one.optimizer.absorb(one.p, x)
                x.zero_()
            one.optimizer.apply(one.p)
        else:
            step(one.optimizer, one.p, g + h)
        step(twin.optimizer, twin.p, g + h)
        close(one.p.detach(), twin.p.detach(), 1e-9)


@stepped
@pytest.mark.parametrize("at", [3, 4], ids=["refresh", "between"])
def test_a_residual_resumes_bitwise(residual, case, dtype, at):
    """From a file, before a refresh or not, also in the middle of a step."""
    straight = Stepped(residual, case, dtype).run(0, at)
    straight.optimizer.absorb(straight.p, straight.gradient(99))
    file = io.BytesIO()
    torch.save(straight.optimizer.state_dict(), file)
    file.seek(0)
    again = Stepped(residual, case, dtype, straight.p.detach())
    again.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for each in (straight, again):
        each.optimizer.absorb(each.p, each.gradient(98))
        each.optimizer.apply(each.p)
        each.run(at + 1, 9)
    assert torch.equal(straight.p, again.p)
    assert straight.state.keys() == again.state.keys()
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(again.state[n])) for n, x in straight.state.items())


@stepped
def test_a_residual_survives_zeros(residual, case, dtype):
    """Zeros first, at a refresh and between; the first of them change nothing but for the decay of weights."""
    one = Stepped(residual, case, dtype)
    for t, size in enumerate([0, 0, 1, 0, 1, 1, 0, 0, 1]):
        before = one.p.detach().clone()
        step(one.optimizer, one.p, one.gradient(t) * size)
        assert one.p.isfinite().all()
        assert all(torch.as_tensor(x).isfinite().all() for x in one.state.values())
        if t < 2:
            close(one.p.detach(), before * (1 - 0.1 * 0.01), 1e-2 if dtype is torch.bfloat16 else 1e-6)
    assert not torch.equal(one.p, before)


@stepped
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_a_residual_bears_any_size(residual, case, dtype, size):
    one = Stepped(residual, case, dtype)
    for t in range(5):
        step(one.optimizer, one.p, one.gradient(t) * size)
        assert one.p.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
@SIZES
def test_adam_in_the_core(dtype, size):
    """Against the formulas; unit size for a steady gradient; finite for zeros; real v."""
    state = {
        "moment.first": torch.zeros(3, 4, dtype=dtype),
        "moment.second": torch.zeros(3, 4, dtype=dtype).real.clone(),
    }
    m, v = torch.zeros(3, 4, dtype=COMPLEX), torch.zeros(3, 4, dtype=REAL)
    for t in range(6):
        z = randn((3, 4), dtype, t) * size
        clock = Clock(torch.tensor(t + 1.0), 0.8, 0.95)
        RULE.absorb(z, state, clock)
        m, v = 0.8 * m + 0.2 * z, 0.95 * v + 0.05 * z.abs().to(REAL) ** 2
        expected = (m / (1 - 0.8 ** (t + 1))) / ((v / (1 - 0.95 ** (t + 1))).sqrt() + 1e-8)
        direction = RULE.direction(state, clock, 1e-8)
        assert direction.dtype is dtype
        close(direction.to(COMPLEX), expected.to(COMPLEX), 1e-4 if dtype in (torch.float32, torch.complex64) else 1e-9)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_recursion_is_that_of_the_momentum(beta1):
    """m <- a m + b z, and a/b is what a unit of m would still have added to all later m."""
    clock = Clock(torch.ones(()), beta1, 0.99)
    decay, intake = RULE.recursion(clock)
    state = {"moment.first": torch.ones(1, dtype=REAL), "moment.second": torch.ones(1, dtype=REAL)}
    RULE.absorb(torch.full((1,), 3.0, dtype=REAL), state, clock)
    assert float(state["moment.first"]) == pytest.approx(decay + 3 * intake)
    state["moment.first"].fill_(1)
    total = 0.0
    for _ in range(400):
        RULE.absorb(torch.zeros(1, dtype=REAL), state, clock)
        total += float(state["moment.first"])
    assert decay / intake == pytest.approx(total)
