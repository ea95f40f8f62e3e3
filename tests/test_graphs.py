"""Steps that are recorded and replayed are those that would have been made.

A CUDA graph performs the operations that were noted, on the tensors that they were noted with, and nothing of what the
host did meanwhile. :class:`Tape` does the same on the pretend device, where reading anything is noted too.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import comoving
from comoving import LowRankOptimizer
from comoving.codecs import Int4, Int8
from comoving.drivers.graphs import Graphs
from comoving.finders import IncrementalSVD
from comoving.parts import PARTS
from comoving.precondition import Factored
from comoving.residual import Channel, Feedback, Fira, MomentumBuffer, Sign, Sparse
from comoving.rules import Lion, Momentum, Muon
from comoving.transport import Carry
from pretend import OnDevice, Pretend, install

STEPS, EVERY = 13, 4
OPTIONS = {
    "feedback": {"residual": Feedback(), "transport": Carry(), "side": "both"},
    "codes": {"residual": Feedback(), "codec": Int8(), "moments": Int4()},
    "fira": {"residual": Fira()},
    "apollo": {"residual": Channel()},
    "sign": {"residual": Sign(rate=0.5)},
    "sparse": {"residual": Sparse()},
    "lion": {"rule": Lion()},
    "momentum": {"rule": Momentum(), "weight_decay": 0.0},
    "muon": {"rule": Muon(), "rank": 1.0},
    "buffer": {"residual": MomentumBuffer(), "rule": Momentum()},
}
AS_EVER = {
    "noise": {"residual": Feedback(), "codec": Int8(rounding="stochastic")},
    "window": {"residual": Feedback(window=2)},
    "preconditioned": {"precondition": Factored()},
    "notes": {"finder": IncrementalSVD()},
}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    install(monkeypatch)


class Tape(TorchDispatchMode):
    """Notes operations while it performs them, and performs them again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        known = {}

        def now(x):
            return known.get(id(x), x) if isinstance(x, torch.Tensor) else x

        for func, args, kwargs, out in self.calls:
            new = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, made in zip(*(x if isinstance(x, (list, tuple)) else [x] for x in (out, new)), strict=True):
                if isinstance(old, torch.Tensor):
                    known[id(old)] = made


class Recorder:
    """Records tapes. Unlike CUDA it performs what it records, so that the first replay has nothing to do."""

    def __init__(self):
        self.made = self.played = 0

    def __call__(self, work):
        self.made += 1
        tape, done = Tape(), []
        with tape:
            work()

        def replay():
            self.played += 1
            if done:
                tape.replay()
            done.append(True)

        return replay


def model(on):
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (10, 14), (10, 14), (10, 14)]
    return [nn.Parameter(on(torch.randn(s, generator=generator))) for s in shapes]


def train(options, recorder, on=OnDevice, moving=(), edits=(), bad=()):
    """Weights, states and where the host waited, but for the look at all gradients, under a schedule of rates."""
    waits, given = [], {"rank": 4, "refresh_every": EVERY} | options
    with Pretend() as mode:
        params = model(on)
        optimizer = LowRankOptimizer([(f"w{i}", p) for i, p in enumerate(params)], 0.01, **given)
        for t in range(STEPS):
            if t == 2:  # some state is there already
                graphs = Graphs(optimizer.engine, recorder or Recorder())
                optimizer.engine.replays = graphs if recorder else None
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + t)
            for name, value in edits if t == 6 else ():
                optimizer.param_groups[0][name] = value
            for i, p in enumerate(params):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
                g[0, 0] = torch.nan if t in bad else g[0, 0]
                if p.grad is None or (i, t) in moving:
                    p.grad = on(g)
                else:
                    p.grad.copy_(on(g))
            mode.waits.clear()
            optimizer.step()
            waits += [where for where in mode.waits if not where.startswith("refresh") and "guard" not in where]
    return [p.own if on is OnDevice else p.detach() for p in params], [dict(optimizer.state[p]) for p in params], waits


def same(found, expected):
    for p, q in zip(found[0], expected[0], strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.keys() == b.keys()
        assert a["tick"] == b["tick"] == STEPS


@pytest.mark.parametrize("name", OPTIONS)
def test_replayed_steps_are_those_that_would_have_been_made(name):
    recorder = Recorder()
    found = train(OPTIONS[name], recorder)
    same(found, train(OPTIONS[name], None))
    assert not found[2]
    assert recorder.made == (4 if name == "sparse" else 2)  # the large one, and the batch of the others
    assert recorder.played > recorder.made + 4


@pytest.mark.parametrize("name", AS_EVER)
def test_what_does_not_replay_is_stepped_as_ever(name):
    recorder = Recorder()
    same(train(AS_EVER[name], recorder), train(AS_EVER[name], None))
    assert recorder.made == 0


def test_every_part_that_replays_is_replayed_here():
    for role in ("rule", "precondition", "residual"):
        kinds = {type(options[role]) for options in OPTIONS.values() if role in options}
        kinds |= {type(LowRankOptimizer([nn.Parameter(torch.zeros(9, 9))]).defaults[role])}
        for name, kind in PARTS[role].items():
            assert (kind in kinds) is bool(kind().replays), f"{role} {name}"


def test_a_gradient_that_has_moved_is_recorded_anew():
    recorder = Recorder()
    found = train({}, recorder, on=torch.clone, moving={(0, 7), (1, 9)})
    same(found, train({}, None, on=torch.clone))
    assert recorder.made == 3  # that of a batch is copied, wherever it is


@pytest.mark.parametrize("edit", [("betas", (0.5, 0.9)), ("weight_decay", 0.3), ("eps", 0.1), ("scale", 0.5)])
def test_rates_that_are_numbers_in_a_recording_are_recorded_anew(edit):
    recorder = Recorder()
    found = train({}, recorder, edits=[edit])
    same(found, train({}, None, edits=[edit]))
    assert recorder.made == 4


def test_skipped_steps_are_undone():
    recorder = Recorder()
    same(train({"on_nonfinite": "skip"}, recorder, bad={6}), train({"on_nonfinite": "skip"}, None, bad={6}))
    assert recorder.made == 1  # large parameters are stepped as ever


def test_loading_forgets_what_was_recorded():
    recorder, params = Recorder(), model(torch.clone)
    optimizer = LowRankOptimizer(params, 0.01, 4, refresh_every=100)

    def step(t):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
            p.grad = g if p.grad is None else p.grad.copy_(g)
        optimizer.step()

    step(0)
    optimizer.engine.replays = Graphs(optimizer.engine, recorder)
    for t in range(1, 4):
        step(t)
    weights, saved = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    step(4)
    expected = [p.detach().clone() for p in params]
    made = recorder.made
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, w in zip(params, weights, strict=True):
            p.copy_(w)
    step(4)
    assert recorder.made == 2 * made
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)


def test_without_a_device_there_is_nothing_to_capture():
    optimizer = comoving.AdamW([nn.Parameter(torch.zeros(8, 8))])
    with pytest.raises(RuntimeError, match="move the model to a CUDA device"):
        optimizer.capture()
