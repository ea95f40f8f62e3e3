"""A batch of tensors keeps, loses and writes what each of them does alone, and is measured as each of them."""

import pytest
import torch

from comoving.clock import Clock
from comoving.codecs import Full, Int4, Int8
from comoving.diagnostics import measure, measure_kept, overlap_defect
from comoving.frames import ModeFrame
from comoving.linalg import abs_squared, norm
from comoving.residual import Channel, Cores, Feedback, Fira, Passage, Sign, Sparse, Update
from comoving.rules import Lion, Scheduled
from comoving.rules.adam import FIRST, SECOND
from contract.support import COMPLEX, MOVING, REAL, RESIDUALS, core_of, randn, random_frame

F32 = torch.float32
SCALED = [Fira(growth=None), Fira(per="tensor"), Channel(growth=None), Channel(per="tensor")]
MORE = [Feedback(window=2), *SCALED, Sign(0.5)]
EVERY = [*RESIDUALS, *MOVING, *MORE]
BATCHED = [residual for residual in EVERY if residual.batched and not getattr(residual, "alone", False)]
LONELY = [
    *(residual for residual in EVERY if getattr(residual, "alone", False)),
    Sparse(fraction=0.2, rule=Scheduled()),
    Sparse(fraction=0.2, rule=Lion(), first=False, scale=3.0),
]
CODECS = [Full(), Int8(block=8), Int4(block=8, rounding="stochastic")]
CASES = [((6, 8), (2, None)), ((8, 7), (None, 2)), ((6, 8), (3, 2)), ((4, 3, 5), (2, None, 3)), ((9,), (3,))]
SIZES = [1.0, 0.0, 1e15, 1e-15]
STEPS, TURN, TWICE, SHRUNK = 6, 3, 2, 4
DECAY, INTAKE = 0.9, 0.1


class Run:
    """A parameter, or a batch of them, stepped by a residual between stand-ins for finder, rule and transport.

    Args:
        residual, codec: under test.
        frames: that of the first steps, and that from step ``TURN`` on.
        weights: likewise stacked or not.
        state: the slots.
        rows: 0 or 1.
        told: whether the norm of the gradient is known.
    """

    def __init__(self, residual, codec, frames, weights, state, rows, told):
        self.residual, self.codec, self.frames, self.rows, self.told = residual, codec, frames, rows, told
        self.weights, self.state = weights.clone(), state
        self.momentum, self.figures = None, weights.real.new_zeros((*weights.shape[:rows], 6))
        self.seen = []

    def step(self, t, gradients):
        residual, codec, state, rows = self.residual, self.codec, self.state, self.rows
        frame = self.frames[t >= TURN]
        core = None
        for opening, g in zip((True, False), gradients, strict=False):
            if self.momentum is None:
                m = torch.zeros_like(frame.project(g))
                passage = Passage(frame, m, DECAY, INTAKE, tick=t, rows=rows)
            else:
                old, m = self.frames[t > TURN] if opening else frame, self.momentum
                passage = Passage(old, m, DECAY, INTAKE, old, m, tick=t, rows=rows)
            given = g.clone()
            operand = residual.restore(g, passage, opening, state, codec)
            assert operand.rows == rows
            assert torch.equal(g, given)
            if t == TURN and opening:
                overlap = frame.overlap(old)
                image = overlap.move(m)
                self.momentum = 0.5 * image  # some of it is dropped
                passage = Passage(frame, self.momentum, DECAY, INTAKE, old, m, overlap, image, t, rows)
                self.figures[..., 2] = overlap_defect(overlap)
            turned = passage.overlap
            z = frame.project(operand.dense)
            if operand.core is not None:
                z += operand.core if turned is None else turned.move(operand.core)
            core = z if core is None else core + z
            kept = residual.keep(operand.dense, Cores(core, z), passage, opening, state, codec)
            lost, rounded = passage.lost(), residual.error(state, codec, rows)
            assert (kept is not None) == residual.feeds
            assert lost.ndim == rows
            own = norm(g, rows)
            if kept is None:
                measure(self.figures, own, norm(z, self.figures.ndim - 1))
            else:
                assert kept.ndim == rounded.ndim == rows
                total = None if turned is None else own
                measure_kept(self.figures, own, total, norm(z, self.figures.ndim - 1), kept, rounded, lost, opening)
            if residual.rescales:
                self.seen.append(residual.size(core, torch.zeros_like(own) if kept is None else kept, state))
            self.seen += [lost, self.figures.clone(), *([] if kept is None else [kept, rounded])]
        m = self.momentum if self.momentum is not None else torch.zeros_like(core)
        if t == SHRUNK and residual.rescales:
            residual.rescale(0.5, core, Passage(frame, m, DECAY, INTAKE, frame, m, tick=t, rows=rows), state, codec)
            core = core * 0.5
        self.momentum = DECAY * m + INTAKE * core
        clock = Clock(torch.tensor(float(t + 1)), DECAY, 0.99, t + 1, rows)
        compressed = tuple(n for n, r in enumerate(frame.ranks) if r is not None)
        size = norm(gradients[0], rows) if self.told and len(gradients) == 1 else None
        d = self.momentum.sgn() if self.told else self.momentum
        moments = {FIRST: self.momentum, SECOND: abs_squared(self.momentum) + abs_squared(core)}
        update = Update(lambda: frame, compressed, core, d, -0.02, 0.99, -0.1, clock, 1e-8, size, moments)
        residual.write(self.weights, update, state, codec)


def slots(residual, codec, shape, ranks, dtype, members=None):
    """The slots of one tensor, or of so many; seeds of their own."""
    lead = () if members is None else (members,)
    schema = residual.schema(codec, shape, core_of(shape, ranks), dtype)
    state = {name: torch.zeros((*lead, *spec.shape), dtype=spec.dtype) for name, spec in schema.items()}
    for name, spec in schema.items():
        if spec.seed:
            state[name] += 3 if members is None else torch.arange(3, 3 + members)
    return state


def near(a, b, dtype):
    """To rounding, of the size of the largest entry."""
    tolerance = 2e-4 if dtype is F32 else 1e-10
    size = float(b.abs().nan_to_num(0, 0, 0).amax())
    torch.testing.assert_close(a, b, rtol=tolerance, atol=size * tolerance, equal_nan=True)


class OneByOne(Lion):
    batched = False


def test_every_residual_takes_batches():
    assert all(residual.batched for residual in EVERY)
    assert {type(residual) for residual in LONELY} == {Sparse}
    assert not Sparse(rule=OneByOne()).batched


@pytest.mark.parametrize("residual", BATCHED, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [REAL, COMPLEX, F32], ids=str)
@pytest.mark.parametrize("told", [True, False])
def test_a_batch_fares_as_its_members(residual, codec, case, dtype, told):
    """Gradients of ordinary size, zero, huge and tiny; two of them in one step, and frames that change once."""
    shape, ranks = case
    codec = Full() if dtype is F32 else codec  # there rounding of products may reach the codes
    members = range(len(SIZES))
    frames = [[random_frame(shape, ranks, dtype, 10 * i + turn) for turn in range(2)] for i in members]
    both = [ModeFrame.stack([frames[i][turn] for i in members]) for turn in range(2)]
    weights = randn((len(SIZES), *shape), dtype, 5)
    states = [slots(residual, codec, shape, ranks, dtype) for _ in members]
    for i, state in enumerate(states):
        state |= {name: x + i for name, x in state.items() if name.endswith(".seed")}
    alone = [Run(residual, codec, frames[i], weights[i], states[i], 0, told) for i in members]
    batch = Run(residual, codec, both, weights, slots(residual, codec, shape, ranks, dtype, len(SIZES)), 1, told)
    for t in range(STEPS):
        gradients = [
            torch.stack([randn(shape, dtype, 100 * t + 10 * i + k) * size for i, size in enumerate(SIZES)])
            for k in range(2 if t == TWICE else 1)
        ]
        batch.step(t, gradients)
        for i, run in enumerate(alone):
            run.step(t, [g[i] for g in gradients])
            near(batch.weights[i], run.weights, dtype)
            near(batch.momentum[i], run.momentum, dtype)
            assert batch.state.keys() == run.state.keys()
            for name, x in run.state.items():
                assert batch.state[name].shape == (len(SIZES), *x.shape)
                if x.is_floating_point() or x.is_complex():
                    near(batch.state[name][i], x, dtype)
                else:
                    assert torch.equal(batch.state[name][i], x), name
            assert len(batch.seen) == len(run.seen)
            for a, b in zip(batch.seen, run.seen, strict=True):
                near(a[i], b, dtype)
        assert not batch.state.keys() & {"held"}


def _absorbed(residual, g, frame, opening, state, rows, t):
    passage = Passage(frame, frame.project(g), DECAY, INTAKE, tick=t, rows=rows)
    given = g.clone()
    operand = residual.restore(residual.split(g, state), passage, opening, state, Full())
    assert operand.rows == rows
    core = frame.project(operand.dense)
    state["core"] = core if opening else state["core"] + core
    assert residual.keep(operand.dense, Cores(state["core"], core), passage, opening, state, Full()) is None
    assert torch.equal(g, given)
    return residual.size(state["core"], norm(operand.dense, rows), state)


def _written(residual, weights, frame, state, rows, t):
    z, compressed = state.pop("core"), tuple(n for n, r in enumerate(frame.ranks) if r is not None)
    clock = Clock(torch.tensor(float(t + 1)), DECAY, 0.99, t + 1, rows)
    update = Update(lambda: frame, compressed, z, z.sgn(), -0.02, 0.99, -0.1, clock, 1e-8)
    residual.write(weights, update, state, Full())


@pytest.mark.parametrize("residual", LONELY, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [REAL, COMPLEX, F32], ids=str)
def test_a_batch_fares_as_its_members_between_refreshes(residual, case, dtype):
    """Rows whose choice was renewed one by one; two gradients in one step, and weights that are a slice."""
    shape, ranks = case
    members = range(len(SIZES))
    frames = [random_frame(shape, ranks, dtype, 10 * i) for i in members]
    frame = ModeFrame.stack(frames)
    weights = randn((len(SIZES), *shape), dtype, 5)
    states = [slots(residual, Full(), shape, ranks, dtype) for _ in members]
    schema = residual.schema(Full(), shape, core_of(shape, ranks), dtype)
    alone, batch = weights.clone(), torch.stack([weights, weights], -1)[..., 0]
    for t in range(STEPS):
        gradients = [
            torch.stack([randn(shape, dtype, 100 * t + 10 * i + k) * size for i, size in enumerate(SIZES)])
            for k in range(2 if t == TWICE else 1)
        ]
        renewing = t in {0, TURN}
        together = {name: torch.stack([state[name] for state in states]) for name in schema}
        originals = {name: x.clone() for name, x in together.items()}
        before = dict(together)
        for opening, g in zip((True, False), gradients, strict=False):
            sizes = []
            for i, state in enumerate(states):
                if renewing and opening:
                    residual.renew(g[i], state, Full())
                sizes.append(_absorbed(residual, g[i], frames[i], opening, state, 0, t))
                state.pop("held.indices", None)
            if not renewing:
                near(_absorbed(residual, g, frame, opening, together, 1, t), torch.stack(sizes), dtype)
        if t == SHRUNK:
            for state, rows, one in [
                *((state, 0, f) for state, f in zip(states, frames, strict=True)),
                (together, 1, frame),
            ]:
                passage = Passage(one, state["core"], DECAY, INTAKE, tick=t, rows=rows)
                residual.rescale(0.5, state["core"], passage, state, Full())
                state["core"] = state["core"] * 0.5
        for i, state in enumerate(states):
            _written(residual, alone[i], frames[i], state, 0, t)
        if renewing:
            batch.copy_(alone)
            continue
        _written(residual, batch, frame, together, 1, t)
        near(batch, alone, dtype)
        assert together.keys() == schema.keys()
        for name, spec in schema.items():
            assert torch.equal(before[name], originals[name])  # replaced, never written to
            assert together[name].shape == (len(SIZES), *spec.shape)
            near(together[name], torch.stack([state[name] for state in states]), dtype)
