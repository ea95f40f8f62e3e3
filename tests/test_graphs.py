"""Steps that are recorded and replayed are those that would have been made; :mod:`tape` stands for CUDA graphs."""

import contextlib
import copy
import gc
import types
import weakref

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving.cadence import Lazy
from comoving.codecs import Int4, Int8
from comoving.drivers.graphs import CudaRecorder, Graphs
from comoving.finders import IncrementalSVD, RandomProjection, Standing, TrainRandomized
from comoving.frames import Pooled, Seeded, Trains
from comoving.parts import PARTS
from comoving.precondition import Factored
from comoving.residual import (
    Channel,
    Details,
    Feedback,
    Fira,
    Folded,
    MomentumBuffer,
    Raw,
    Sign,
    Sparse,
    SubsetNorm,
)
from comoving.rules import SWAN, AdamS, Lion, LowRankAdam, LowRankMuon, Momentum, Muon, Normalized, NorMuon
from comoving.transport import Carry, Reset
from pretend import DEVICE, OnDevice, Pretend, install
from tape import Recorder, Tape

STEPS, EVERY = 13, 4
OPTIONS = {
    "feedback": {"residual": Feedback(), "transport": Carry(), "side": "both"},
    "codes": {"residual": Feedback(), "codec": Int8(), "moments": Int4()},
    "bases": {"bases": Int8()},
    "fira": {"residual": Fira()},
    "apollo": {"residual": Channel()},
    "sign": {"residual": Sign(rate=0.5)},
    "raw": {"residual": Raw(rate=0.5)},
    "sparse": {"residual": Sparse()},
    "lion": {"rule": Lion()},
    "momentum": {"rule": Momentum(), "weight_decay": 0.0},
    "muon": {"rule": Muon(), "rank": 1.0},
    "orthogonal": {"rule": Muon(decay=0.0, coefficients="polar-express", after="both"), "rank": 1.0},
    "normuon": {"rule": NorMuon(), "rank": 1.0},
    "normalized": {"rule": Normalized(), "rank": 1.0},
    "swan": {"rule": SWAN(), "rank": 1.0},
    "adams": {"rule": AdamS()},
    "foam": {"frame": Pooled(), "finder": Standing(), "residual": Folded()},
    "gwt": {"frame": Pooled(), "finder": Standing(), "residual": Details()},
    "snsm": {"rule": Momentum(), "residual": SubsetNorm(), "transport": Reset()},
    "low rank": {"rule": LowRankMuon(2), "rank": 1.0},
    "low rank adam": {"rule": LowRankAdam(2), "rank": 1.0},
    "buffer": {"residual": MomentumBuffer(), "rule": Momentum()},
    "train": {"frame": Trains(), "finder": TrainRandomized()},
    "lazy": {"cadence": Lazy(patience=1)},
    "begun anew": {"transport": Reset(), "residual": Sparse(statistics="reset")},
}
ALONE = {"begun anew": 4, "train": 4}
"""Recordings that are made where there is not one of the large parameter, and one of the batch of the others."""
AS_EVER = {
    "noise": {"residual": Feedback(), "codec": Int8(rounding="stochastic")},
    "window": {"residual": Feedback(window=2)},
    "preconditioned": {"precondition": Factored()},
    "notes": {"finder": IncrementalSVD()},
    "drawn": {"frame": Seeded(), "finder": RandomProjection(), "transport": Reset(), "residual": Sign()},
}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    install(monkeypatch)


def model(on):
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (10, 14), (10, 14), (10, 14)]
    return [nn.Parameter(on(torch.randn(s, generator=generator))) for s in shapes]


def give(params, t, on=torch.clone, moving=()):
    """Gradients of step t, where those before were, but for those of parameters that are listed."""
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
        if p.grad is None or i in moving:
            p.grad = on(g.to(p.dtype))
        else:
            p.grad.copy_(on(g))


def train(options, recorder, on=OnDevice, moving=(), edits=(), bad=()):
    """Weights, states and where the host waited, but for the look at all gradients, under a schedule of rates."""
    waits, given = [], {"rank": 4, "refresh_every": EVERY} | options
    with Pretend() as mode:
        params = model(on)
        optimizer = LowRankOptimizer([(f"w{i}", p) for i, p in enumerate(params)], 0.01, **given)
        optimizer.refresh_scope = mode.refresh
        for t in range(STEPS):
            if t == 2:  # some state is there already
                optimizer.engine.replays = recorder and Graphs(optimizer.engine, recorder)
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + t)
            for at, name, value in edits:
                if at == t:
                    optimizer.param_groups[0][name] = value
            give(params, t, on, [i for i, at in moving if at == t])
            if t in bad:
                params[0].grad.mul_(torch.nan)
            mode.waits.clear()
            optimizer.step()
            waits += [where for where in mode.waits if not where.startswith("refresh") and "guard" not in where]
    return [own(p) for p in params], [dict(optimizer.state[p]) for p in params], waits


def own(x):
    return x.own if isinstance(x, OnDevice) else x.detach()


def same(found, expected):
    for p, q in zip(found[0], expected[0], strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.keys() == b.keys()
        assert a["tick"] == b["tick"] == STEPS
        for name, x in a.items():
            if isinstance(x, torch.Tensor):
                torch.testing.assert_close(own(x), own(b[name]), rtol=1e-4, atol=1e-5)


def pretended():
    return Recorder(DEVICE.type)


@pytest.mark.parametrize("name", OPTIONS)
def test_replayed_steps_are_those_that_would_have_been_made(name):
    recorder = pretended()
    found = train(OPTIONS[name], recorder)
    same(found, train(OPTIONS[name], None))
    assert not found[2] and not recorder.frozen
    assert recorder.made == ALONE.get(name, 2)
    assert recorder.played > recorder.made + 4


@pytest.mark.parametrize("name", AS_EVER)
def test_what_does_not_replay_is_stepped_as_ever(name):
    recorder = pretended()
    same(train(AS_EVER[name], recorder), train(AS_EVER[name], None))
    assert recorder.made == 0


def test_every_part_that_replays_is_replayed_here():
    for role in ("rule", "precondition", "residual"):
        kinds = {type(options[role]) for options in OPTIONS.values() if role in options}
        kinds |= {type(LowRankOptimizer([nn.Parameter(torch.zeros(9, 9))]).defaults[role])}
        for name, kind in PARTS[role].items():
            assert (kind in kinds) is bool(kind().replays), f"{role} {name}"


def test_rows_whose_counts_begin_anew_at_steps_of_their_own_have_counts_of_their_own():
    options = AS_EVER["drawn"]
    same(train(options | {"on_nonfinite": "skip"}, None), train(options, None))


def test_a_gradient_that_has_moved_is_recorded_anew():
    recorder = Recorder()
    found = train({}, recorder, on=torch.clone, moving={(0, 7), (1, 9)})
    same(found, train({}, None, on=torch.clone))
    assert recorder.made == 3  # that of a batch is copied, wherever it is


@pytest.mark.parametrize("edit", [("betas", (0.5, 0.9)), ("weight_decay", 0.3), ("eps", 0.1), ("scale", 0.5)])
def test_rates_that_are_numbers_in_a_recording_are_recorded_anew(edit):
    recorder = pretended()
    found = train({}, recorder, edits=[(6, *edit)])
    same(found, train({}, None, edits=[(6, *edit)]))
    assert recorder.made == 4


def test_what_changes_at_every_step_is_not_recorded_in_vain():
    recorder, moving = Recorder(), {(i, t) for i in range(4) for t in range(STEPS)}
    found = train({}, recorder, on=torch.clone, moving=moving)
    same(found, train({}, None, on=torch.clone, moving=moving))
    assert recorder.made <= 3  # where the allocator happens to have the same place twice, the large one is
    edits = [(t, "betas", (0.9 - t / 50, 0.99)) for t in range(STEPS)]
    recorder = pretended()
    same(train({}, recorder, edits=edits), train({}, None, edits=edits))
    assert recorder.made == 0


def test_skipped_steps_are_undone():
    recorder = pretended()
    same(train({"on_nonfinite": "skip"}, recorder, bad={6}), train({"on_nonfinite": "skip"}, None, bad={6}))
    assert recorder.made == 1  # large parameters are stepped as ever


# --------------------------------------------------------------------------------------- what happens between the steps


class Session:
    """An optimizer on the CPU, a few steps after capture()."""

    def __init__(self, recorder, steps=4, dtype=torch.float32, **options):
        self.params, self.recorder, self.t = model(lambda x: x.to(dtype, copy=True)), recorder, 0
        self.optimizer = LowRankOptimizer(self.params, 0.01, 4, **{"refresh_every": 100} | options)
        self.run(2)
        if recorder:
            self.optimizer.engine.replays = Graphs(self.optimizer.engine, recorder)
        self.run(steps - 2)

    def run(self, steps=1):
        for _ in range(steps):
            give(self.params, self.t)
            self.optimizer.step()
            self.t += 1

    def equals(self, other):
        for p, q in zip(self.params, other.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        return True


def test_loading_forgets_what_was_recorded():
    session = Session(Recorder())
    params, optimizer, recorder = session.params, session.optimizer, session.recorder
    weights, saved = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    session.run(2)
    expected, made = [p.detach().clone() for p in params], recorder.made
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, w in zip(params, weights, strict=True):
            p.copy_(w)
    session.t -= 2
    session.run(2)
    assert recorder.made == 2 * made == 4
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)


def test_a_state_that_is_replaced_is_recorded_anew():
    sessions = [Session(recorder) for recorder in (Recorder(), None)]
    for session in sessions:
        for p in session.params[:2]:  # one by itself, one of a batch
            state = session.optimizer.state[p]
            state["moment.first"] = state["moment.first"] / 2
        session.run(4)
    assert sessions[0].equals(sessions[1])
    assert sessions[0].recorder.made == 4


def test_weights_that_have_moved_are_recorded_anew():
    sessions = [Session(recorder) for recorder in (Recorder(), None)]
    for session in sessions:
        for p in session.params[:2]:
            p.data = p.data.clone()
        session.run(4)
    assert sessions[0].equals(sessions[1])
    assert sessions[0].recorder.made == 4


def test_groups_come_and_go():
    sessions = [Session(recorder) for recorder in (Recorder(), None)]
    for session in sessions:
        more = [nn.Parameter(torch.eye(10, 14)) for _ in range(2)]
        session.params += more
        session.optimizer.add_param_group({"params": more, "lr": 0.1})
        session.run(4)
        session.optimizer.remove_param_group(0)
        session.run(4)
    assert sessions[0].equals(sessions[1])
    assert sessions[0].recorder.made == 2 + 3 + 1


def test_a_rule_that_is_compiled_after_capture_is_recorded_anew():
    session = Session(Recorder())
    before, calls = session.optimizer.engine.turn, []
    session.optimizer.engine.turn = lambda *given: calls.append(1) or before(*given)
    session.run(3)
    assert session.recorder.made == 4
    assert len(calls) == 4  # each is stepped once as it will be recorded, and recorded


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: copy.copy(copy.deepcopy(x))])
def test_a_copy_steps_without_graphs(how):
    session = Session(Recorder())
    other = copy.copy(session)
    other.params, other.optimizer = how((session.params, session.optimizer))
    made = session.recorder.made
    for one in (session, other):
        one.run(3)
    assert session.equals(other)
    assert session.recorder.made == made and other.optimizer.engine.replays is None


def test_stepping_in_the_backward_pass_goes_on_after_capture():
    sessions = [Session(recorder) for recorder in (Recorder(), None)]
    for session in sessions:
        for p in session.params:
            p.grad = None
        session.optimizer.step_in_backward(accumulate=2, clip=1.0)
        for _ in range(6):
            sum((p * torch.ones_like(p)).square().sum() for p in session.params).backward()
            if session.t % 2:
                session.optimizer.step()
            session.t += 1
        session.optimizer.step_after_backward()
        session.run(3)
    assert sessions[0].equals(sessions[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_gradients_that_are_missing_now_and_then(dtype):
    sessions = [Session(recorder, dtype=dtype) for recorder in (Recorder(), None)]
    for session in sessions:
        for _ in range(12):
            give(session.params, session.t)
            for i in range(4):
                if (session.t + i) % 5 == 3:
                    session.params[i].grad = None
            session.optimizer.step()
            session.t += 1
    assert sessions[0].equals(sessions[1])
    assert sessions[0].recorder.made > 2


def test_an_optimizer_that_is_dropped_leaves_nothing():
    session = Session(Recorder())
    assert session.recorder.made == 2
    slot = weakref.ref(session.optimizer.state[session.params[0]]["moment.first"])
    gc.collect()
    gc.disable()
    try:
        session.params.clear()
        del session.optimizer
        assert slot() is None
    finally:
        gc.enable()


def test_parameters_elsewhere_are_stepped_as_ever():
    def trained(recorder):
        with Pretend():
            places = [OnDevice, torch.clone, OnDevice, torch.clone]
            params = [nn.Parameter(on(torch.full((10, 14), 0.1, dtype=torch.bfloat16))) for on in places]
            optimizer = LowRankOptimizer(params, 0.01, 4, refresh_every=100, on_nonfinite="raise")
            for t in range(7):
                if t == 2 and recorder:
                    optimizer.engine.replays = Graphs(optimizer.engine, recorder)
                for i, (p, on) in enumerate(zip(params, places, strict=True)):
                    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
                    p.grad = on(g.bfloat16())
                optimizer.step()
        return [own(p) for p in params]

    recorder = pretended()
    for p, q in zip(trained(recorder), trained(None), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert recorder.made == 1  # the two on the device


# ------------------------------------------------------------------------------------------------------ what goes wrong


class Failing(Recorder):
    """Fails once: in the middle of the work, at its end, or when it is replayed for the first time."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def __call__(self, work, device):
        if self.when == "within":
            before, self.work = work, None

            def work():
                self.engine.advance, true = self.broken, self.engine.advance
                try:
                    before()
                finally:
                    self.engine.advance = true

        replay = super().__call__(work, device)
        if self.when == "after":
            raise RuntimeError("on purpose")

        def played():
            if self.when == "replay":
                raise RuntimeError("on purpose")
            replay()

        return played

    def broken(self, which, *others):
        which.cell().t.add_(1)
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("when", ["within", "after", "replay"])
def test_a_recording_that_fails_leaves_everything_as_it_was(when):
    recorder, plain = Failing(when), Session(None, 5)
    session = Session(None, 2)
    engine = recorder.engine = session.optimizer.engine
    session.recorder, session.optimizer.engine.replays = recorder, Graphs(engine, recorder)
    session.run()  # as it will be recorded
    give(session.params, 3)
    for _ in range(2):  # the batch, then the large one
        states = [dict(session.optimizer.state[p]) for p in session.params]
        values = [{k: copy.copy(x) if k == "tick" else x.clone() for k, x in own.items()} for own in states]
        weights = [p.detach().clone() for p in session.params]
        with pytest.raises(RuntimeError, match="on purpose") as caught:
            session.optimizer.step()
        assert any("without a CUDA graph from now on" in note for note in caught.value.__notes__)
        moved = [i for i, p in enumerate(session.params) if not torch.equal(p, weights[i])]
        assert moved in ([], [1, 2, 3])
        for i, p in enumerate(session.params):
            if i in moved:
                continue
            state = session.optimizer.state[p]
            assert state.keys() == states[i].keys()
            assert all(state[k] is states[i][k] for k in state if k != "tick")
            assert all(bool(state[k] == x) if k == "tick" else torch.equal(state[k], x) for k, x in values[i].items())
    session.optimizer.step()  # goes on, as ever
    session.t = 4
    session.run()
    assert session.equals(plain)
    assert recorder.made == (0 if when == "within" else 2)


def test_a_slot_that_is_made_in_a_recording_is_refused():
    class Making(Recorder):
        def __call__(self, work, device):
            replay = super().__call__(work, device)
            if self.made == 2:  # the large one, after the batch
                state = session.optimizer.state[session.params[0]]
                state["moment.first"] = state["moment.first"].clone()
            return replay

    session, plain = Session(None, 3), Session(None, 5)
    session.optimizer.engine.replays = Graphs(session.optimizer.engine, Making())
    session.run()
    before = session.optimizer.state[session.params[0]]["moment.first"]
    with pytest.raises(RuntimeError, match="made anew in a recording"):
        session.run()
    assert session.optimizer.state[session.params[0]]["moment.first"] is before
    session.optimizer.step()
    assert session.equals(plain)


def test_frames_in_codes_are_not_decoded_to_know_whether_they_are_due():
    with Pretend(), Tape(DEVICE.type) as tape:
        params = model(OnDevice)
        optimizer = LowRankOptimizer(params, 0.01, 4, bases=Int8(), refresh_every=3)
        due = []
        for t in range(7):
            give(params, t, OnDevice)
            optimizer.step()
            tape.calls.clear()
            due.append(optimizer.engine.due(optimizer.engine.row(params[0])))
            assert not tape.calls
    phase = optimizer.sites[params[0]].phase
    assert due == [t % 3 == phase for t in range(1, 8)]


class Cuda(types.SimpleNamespace):
    """As much of torch.cuda as a recorder asks for."""

    def __init__(self, fails):
        super().__init__(log=[], now=("default", None), device_now=0, fails=fails, made=0, pools=0)

    def install(self, monkeypatch):
        for name in ("device", "current_stream", "set_stream", "graph_pool_handle", "Stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))

    @contextlib.contextmanager
    def _device(self, device):
        before, self.device_now = self.device_now, device.index
        yield
        self.device_now = before

    def _current_stream(self):
        return self.now

    def _set_stream(self, stream):
        self.now = stream

    def _graph_pool_handle(self):
        self.pools += 1
        return self.pools

    def _Stream(self):  # noqa: N802
        self.made += 1
        return f"stream {self.made}", self.device_now

    def _CUDAGraph(self):  # noqa: N802
        return types.SimpleNamespace(replay=lambda: self.log.append("replayed"))

    @contextlib.contextmanager
    def _graph(self, graph, **how):
        before, self.now = self.now, how["stream"]
        self.log.append((self.device_now, how["pool"], how["stream"], how["capture_error_mode"]))
        yield
        if self.fails:  # as torch does, before it puts the stream back
            raise RuntimeError("the capture was invalidated")
        self.now = before


def test_every_device_has_a_stream_and_a_pool(monkeypatch):
    cuda, work = Cuda(fails=False), []
    cuda.install(monkeypatch)
    record = CudaRecorder()
    for index in (1, 0, 1):
        record(lambda: work.append(cuda.now), torch.device("cuda", index))()
    one, zero = ("stream 1", 1), ("stream 2", 0)
    assert work == [one, zero, one]
    local = "thread_local"  # else a loader that pins memory meanwhile would fail, and the capture too
    assert [x for x in cuda.log if x != "replayed"] == [(1, 1, one, local), (0, 2, zero, local), (1, 1, one, local)]
    assert cuda.log.count("replayed") == 3
    assert cuda.now == ("default", None) and cuda.device_now == 0


def test_a_capture_that_fails_leaves_torch_usable(monkeypatch):
    cuda = Cuda(fails=True)
    cuda.install(monkeypatch)
    record = CudaRecorder()
    with pytest.raises(RuntimeError, match="invalidated"):
        record(lambda: None, torch.device("cuda", 0))
    assert cuda.now == ("default", None)
    cuda.fails = False
    record(lambda: None, torch.device("cuda", 0))
    assert [pool for _, pool, _, _ in cuda.log] == [1, 2]  # torch still counts on the first


def test_without_a_device_there_is_nothing_to_capture():
    optimizer = comoving.AdamW([nn.Parameter(torch.zeros(8, 8))])
    with pytest.raises(RuntimeError, match="move the model to a CUDA device"):
        optimizer.capture()
