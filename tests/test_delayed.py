"""Frames that are searched some steps before they are used: against a reference, resumed, stacked, and elsewhere."""

import copy
import io
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving.cadence import Growing, Lazy
from comoving.codecs import Int8
from comoving.finders import (
    Amortized,
    BlockSelection,
    CosineSelection,
    Delayed,
    Exact,
    IncrementalSVD,
    Nystroem,
    Power,
    Randomized,
    StreamingTucker,
)
from comoving.frames import Blocks, Cosines, Modes, SparseModes, Trains
from comoving.ranks import Energy
from comoving.residual import Discard, Feedback
from comoving.searches import SideStream
from comoving.transport import Reset, Rotate

REAL, COMPLEX = torch.float64, torch.complex128
BETAS, EPS, RATE = (0.9, 0.99), 1e-8, 0.05
PERIODS = pytest.mark.parametrize(("every", "by"), [(1, 1), (3, 1), (3, 2), (4, 4)])


def randn(shape, seed, dtype=REAL):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- a reference


def leading(operand, rank):
    return torch.linalg.svd(operand, full_matrices=False)[0][:, :rank]


def iterated(operand, start):
    """The Q of a QR decomposition with a positive diagonal, of one power iteration."""
    q, r = torch.linalg.qr(operand @ operand.mH @ start)
    return q * r.diagonal().sgn()


def written_out(w, gradients, every, by, rank, inertia, iterates):
    """Adam in a moving subspace of the columns, with its moments rotated, and error feedback, by the definition.

    Frames are the leading singular vectors of the operand, or one power iteration from the frame that is in use; those
    of step t are searched at step t - by. With by=0 at step t itself.
    """
    w, (b1, b2), due, coming, frames = w.clone(), BETAS, 0, {}, []
    u, m, v, e = None, None, None, torch.zeros_like(w)
    for t, g in enumerate(gradients):
        total = g + e
        operand = total
        if u is not None:
            operand = inertia * (u @ m) / (1 - b1**t) + (1 - inertia) * total
        lost = torch.zeros_like(w)
        if t == due:
            due += every
            if u is None:
                u = leading(operand, rank)
                m = torch.zeros(rank, w.shape[1], dtype=w.dtype)
                v = torch.zeros(rank, w.shape[1], dtype=REAL)
            else:
                new = coming.pop(t) if t in coming else find(operand, u, rank, iterates)
                turn, c1, c2 = new.mH @ u, 1 - b1**t, 1 - b2**t
                moved = turn @ m
                spread = turn.abs() ** 2 @ (v / c2 - m.abs() ** 2 / c1**2)
                v = c2 * (spread + moved.abs() ** 2 / c1**2).abs()
                lost = u @ m - new @ moved
                u, m = new, moved
        if by and t + by == due:
            coming[due] = find(operand, u, rank, iterates)
        frames.append(u)
        z = u.mH @ total
        e = total - u @ z + b1 / (1 - b1) * lost
        m, v = b1 * m + (1 - b1) * z, b2 * v + (1 - b2) * z.abs() ** 2
        w -= RATE * u @ ((m / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + EPS))
    return w, frames


def find(operand, u, rank, iterates):
    return iterated(operand, u) if iterates else leading(operand, rank)


@PERIODS
@pytest.mark.parametrize("finder", [Power(inertia=0.7, start="exact"), Exact()], ids=str)
@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
def test_steps_are_those_of_the_definition(every, by, finder, dtype):
    rank, start = 3, randn((6, 9), 0, dtype)
    gradients = [randn((6, 9), 1 + t, dtype) for t in range(14)]
    p = nn.Parameter(start.clone())
    optimizer = LowRankOptimizer(
        [p], RATE, rank, betas=BETAS, eps=EPS, weight_decay=0.0, finder=Delayed(finder, by), refresh_every=every,
        transport=Rotate(), residual=Feedback(), scale=1.0,
    )  # fmt: skip
    spans = []
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        u = optimizer.state[p]["frame.0"]
        spans.append(u @ u.mH)
    iterates = isinstance(finder, Power)
    expected, frames = written_out(start, gradients, every, by, rank, finder.inertia, iterates)
    for span, u in zip(spans, frames, strict=True):
        torch.testing.assert_close(span, u @ u.mH, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-7, atol=1e-7)
    assert (written_out(start, gradients, every, 0, rank, finder.inertia, iterates)[0] - expected).norm() > 0.05


# ------------------------------------------------------------------------------------------------------- the same steps

FIVE = [(12, 20), (12, 20), (20, 12), (9, 16), (5, 8, 10)]


def model(shapes=FIVE, dtype=REAL):
    return nn.ParameterList([nn.Parameter(randn(s, i, dtype)) for i, s in enumerate(shapes)])


def give(params, step, idle=()):
    for i, p in enumerate(params):
        p.grad = None if i in idle else randn(p.shape, 1000 * (step + 1) + i, p.dtype)


def made(params, finder, every=3, **options):
    options = {"transport": Rotate(), "residual": Feedback(), "rank": 3} | options
    params = params.parameters() if isinstance(params, nn.Module) else params
    return LowRankOptimizer(params, 1e-2, finder=finder, refresh_every=every, **options)


def run(params, optimizer, steps):
    for t in steps:
        give(params, t)
        optimizer.step()


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@dataclass
class Late:
    """A search that is made when its result is asked for, as late as a side stream may make it."""

    work: object
    place: "Shadow"
    begun: int
    memory: dict | None = None

    def found(self):
        if self.memory is None:
            self.memory = self.work()
            self.place.waits.append((self.begun, self.place.step))
        return self.memory


@dataclass
class Shadow:
    """The shadow of a side stream: it has made nothing before somebody waits for it."""

    step: int = -1
    begun: list = field(default_factory=list)
    waits: list = field(default_factory=list)

    def __call__(self, work, reads, device):
        assert all(x.device == device for x in reads)
        self.begun.append(self.step)
        return Late(work, self, self.step)


def shadowed(optimizer):
    optimizer.engine.searches.elsewhere = shadow = Shadow()
    return shadow


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def assert_equal_states(one, other):
    for p, q in zip(one.state.values(), other.state.values(), strict=True):
        assert p.keys() == q.keys()
        assert all(torch.equal(x, q[name]) if isinstance(x, torch.Tensor) else x == q[name] for name, x in p.items())


@pytest.mark.parametrize("by", [1, 2, 3])
def test_it_is_as_without_the_delay_until_a_frame_was_searched_ahead(by):
    """Of one parameter, whose phase is 0, up to the refresh at step 3; which then has another frame."""
    models, frames = [model([(12, 20)]) for _ in range(2)], []
    optimizers = [made(m, finder) for m, finder in zip(models, (Power(), Delayed(by=by)), strict=True)]
    for t in range(5):
        for m, o in zip(models, optimizers, strict=True):
            run(m, o, [t])
        frames.append([o.state[m[0]]["frame.1" if "frame.1" in o.state[m[0]] else "frame.0"].clone()
                       for m, o in zip(models, optimizers, strict=True)])  # fmt: skip
        assert equal(*models) is (t < 3)
    assert torch.equal(*frames[2])
    assert (frames[3][0] - frames[3][1]).norm() > 0.1


def test_a_refresh_of_the_first_steps_is_made_at_once():
    """Parameters are refreshed for the second time at their phases; where these are below k, at once."""
    models = [model([(40, 60 + i) for i in range(4)]) for _ in range(2)]
    optimizers = [made(m, f, 4) for m, f in zip(models, (Power(), Delayed(by=3)), strict=True)]
    phases = [optimizers[1].sites[p].phase for p in models[1]]
    assert {phase % 4 for phase in phases} == {0, 1, 2, 3}
    for m, o in zip(models, optimizers, strict=True):
        run(m, o, range(4))
    for phase, p, q in zip(phases, *models, strict=True):
        if phase % 4:
            assert torch.equal(p, q) is (phase % 4 < 3)


@pytest.mark.parametrize("by", [1, 2])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "elsewhere"])
@pytest.mark.parametrize("finder", [Power(), Randomized(), Amortized()], ids=str)
def test_resumed_training_is_bitwise_uninterrupted_training(by, later, finder):
    """Wherever it is saved: before a search, between its begin and its use, and after."""
    m, saved = model(), []
    optimizer = made(m, Delayed(finder, by), codec=Int8())
    if later:
        shadowed(optimizer)
    for t in range(9):
        run(m, optimizer, [t])
        saved.append((copy.deepcopy(m), through_file(optimizer.state_dict())))
    waiting = [any(s["finder.due"] > s["tick"] - 1 for s in state["state"].values()) for _, state in saved]
    assert True in waiting
    for t, (resumed, state) in enumerate(saved):
        other = made(resumed, Delayed(finder, by), codec=Int8())
        other.load_state_dict(state)
        run(resumed, other, range(t + 1, 9))
        assert equal(resumed, m)
        assert_equal_states(other, optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_file], ids=["deep copy", "file"])
def test_a_copy_takes_along_what_was_found(copied):
    m = model()
    optimizer = made(m, Delayed(by=2))
    shadowed(optimizer)
    run(m, optimizer, range(5))
    if copied is copy.deepcopy:
        n, other = copy.deepcopy((m, optimizer))
    else:
        n = copy.deepcopy(m)
        other = made(n, Delayed(by=2))
        other.load_state_dict(copied(optimizer.state_dict()))
    run(m, optimizer, range(5, 9))
    run(n, other, range(5, 9))
    assert equal(m, n)


def test_loading_drops_what_was_searched_before():
    """A search of the run that is left does not reach the state that was loaded."""
    m = model([(12, 20)])
    optimizer = made(m, Delayed(by=2))
    shadowed(optimizer)
    run(m, optimizer, range(2))
    weights, state = copy.deepcopy(m.state_dict()), through_file(optimizer.state_dict())
    run(m, optimizer, range(2, 6))
    straight = copy.deepcopy(m)
    run(m, optimizer, range(20, 23))
    m.load_state_dict(weights)
    optimizer.load_state_dict(state)
    run(m, optimizer, range(2, 6))
    assert equal(m, straight)


@pytest.mark.parametrize("by", [1, 2])
@pytest.mark.parametrize("cadence", [None, Growing(base=1.0), Lazy(patience=1, threshold=0.0)], ids=str)
@pytest.mark.parametrize("finder", [Power(), Exact(inertia=0.5), Randomized()], ids=str)
def test_a_batch_is_stepped_as_its_members(by, cadence, finder):
    models, results = [], []
    for entries in (2**16, 0):
        m = model([(12, 20)] * 4 + [(6, 5, 9)] * 2)
        options = {} if cadence is None else {"cadence": cadence}
        optimizer = made(m, Delayed(finder, by), **options)
        optimizer.stacked_entries = entries
        for t in range(13):
            give(m, t, idle={1} if t == 6 else ())
            optimizer.step()
        models.append(m)
        results.append(optimizer)
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert results[0].engine.batches
    assert not results[1].engine.batches
    assert comoving.state_bytes(results[0]) == comoving.state_bytes(results[1])


@pytest.mark.parametrize("later", [False, True], ids=["at once", "elsewhere"])
def test_experts_are_searched_ahead_each_by_its_own_steps(later):
    models = []
    for entries in (2**16, 0):
        m = model([(6, 24, 16)])
        optimizer = made(m, Delayed(by=2), 4, frame=Blocks(0, Modes()))
        optimizer.stacked_entries = entries
        if later and entries:
            shadowed(optimizer)
        for step in range(12):
            give(m, step)
            m[0].grad[step % 6] = 0
            m[0].grad[(2 * step) % 6] = 0
            optimizer.step()
        models.append(m)
    torch.testing.assert_close(models[0][0], models[1][0], rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------ elsewhere


def lossy(m, t):
    """A loss whose gradients are those of :func:`give`."""
    return sum((p * randn(p.shape, 1000 * (t + 1) + i)).sum() for i, p in enumerate(m))


@pytest.mark.parametrize(("every", "by"), [(1, 1), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("stacked", [2**16, 0])
@pytest.mark.parametrize("residual", [Discard(), Feedback(), Feedback(lazy=False)], ids=str)
def test_searches_elsewhere_find_the_same_and_are_waited_for_by_the_step_that_uses_them(every, by, stacked, residual):
    """Gradients are zeroed, and states written to, before the search has begun to read."""
    models = [model([(12, 20), (12, 20), (9, 16)]) for _ in range(2)]
    optimizers = [made(m, Delayed(Amortized() if by == 1 else Power(), by), every, residual=residual) for m in models]
    shadow = shadowed(optimizers[1])
    for m, o in zip(models, optimizers, strict=True):
        o.stacked_entries = stacked
        for t in range(10):
            shadow.step = t
            give(m, t)
            o.step()
            for p in m:
                p.grad.fill_(torch.nan)
    assert equal(*models)
    assert len(shadow.begun) >= 4
    assert shadow.waits
    assert {used - begun for begun, used in shadow.waits} == {by}
    optimizers[1].state_dict()
    assert sorted(begun for begun, _ in shadow.waits) == sorted(shadow.begun)
    assert_equal_states(*optimizers)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "elsewhere"])
def test_in_the_backward_pass_it_begins_there_and_finds_the_same(accumulate, later):
    models = [model([(12, 20), (9, 16), (6, 24, 16)]) for _ in range(2)]
    optimizers = []
    for m in models:
        groups = [{"params": [*m][:2]}, {"params": [m[2]], "frame": Blocks(0, Modes())}]
        optimizers.append(made(groups, Delayed(by=1), 2))
    optimizers[0].step_in_backward(accumulate=accumulate)
    shadow = shadowed(optimizers[0]) if later else Shadow()
    for t in range(8):
        shadow.step = t
        for k in range(accumulate):
            lossy(models[0], 10 * t + k).backward()
            for i, p in enumerate(models[1]):
                optimizers[1].absorb(p, randn(p.shape, 1000 * (10 * t + k + 1) + i))
        if later and t % 2 == 1 and accumulate == 1:
            assert t in shadow.begun
            assert all(begun < t for begun, _ in shadow.waits)
        for p in models[1]:
            optimizers[1].apply(p)
        optimizers[0].step()
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert {used - begun for begun, used in shadow.waits} == ({1} if later else set())


def test_a_group_that_is_removed_is_not_waited_for():
    m, shadow = model([(12, 20), (9, 16)]), None
    optimizer = made([{"params": [m[0]]}, {"params": [m[1]]}], Delayed(), 1)
    shadow = shadowed(optimizer)
    run(m, optimizer, range(2))
    optimizer.remove_param_group(1)
    run(m[:1], optimizer, range(2, 4))
    assert len(optimizer.state) == 1
    assert optimizer.state_dict()["state"][0]["finder.due"] == 4
    assert shadow.waits


class Streams:
    """What is asked of torch.cuda, in order."""

    def __init__(self, monkeypatch):
        self.log, streams = [], self

        class Stream:
            def __init__(self, device=None):
                self.name = "side"

            def wait_stream(self, other):
                streams.log.append((self.name, "waits for", other.name))

            def wait_event(self, event):
                streams.log.append((self.name, "waits for", event))

            def record_event(self):
                streams.log.append((self.name, "marks"))
                return "mark"

            def __enter__(self):
                streams.log.append("enter")

            def __exit__(self, *error):
                streams.log.append("exit")

        main = Stream()
        main.name = "main"
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)


class Recorded(torch.Tensor):
    """A tensor that says it is on a CUDA device, and on which streams it is used."""

    is_cuda = True
    used: list

    def record_stream(self, stream):
        self.used.append(stream.name)


def recorded():
    x = torch.zeros(2).as_subclass(Recorded)
    x.used = []
    return x


def test_a_side_stream_waits_for_what_it_reads_and_is_waited_for_once_its_result_is_asked_for(monkeypatch):
    """What is asked of torch is right; no GPU has run it."""
    streams, x, y = Streams(monkeypatch), recorded(), recorded()
    draws = torch.tensor(1)
    search = SideStream()(lambda: streams.log.append("work") or {"next.0": y, "draws": draws}, [x], torch.device("cpu"))
    assert streams.log == [("side", "waits for", "main"), "enter", "work", ("side", "marks"), "exit"]
    assert (x.used, y.used) == (["side"], [])
    assert search.found()["next.0"] is y
    assert streams.log[5:] == [("main", "waits for", "mark")]
    assert y.used == ["main"]


# ----------------------------------------------------------------------------------------------- steps out of the order


@pytest.mark.parametrize("bad", [4, 5, 6], ids=["before", "begins", "uses"])
def test_a_skipped_step_has_begun_its_search_all_the_same(bad):
    """At rank 3, every 6, by 1: the search begins at step 5, and its frame is used at step 6."""
    models = [model([(12, 20)]) for _ in range(2)]
    optimizers = [made(m, Delayed(), 6, on_nonfinite="skip") for m in models]
    shadowed(optimizers[1])
    for m, o in zip(models, optimizers, strict=True):
        for t in range(14):
            give(m, t)
            if t == bad:
                m[0].grad[0, 0] = torch.nan
            o.step()
            assert o.state[m[0]]["finder.due"] == {5: 6, 11: 12}.get(t, 0)
            u = o.state[m[0]]["frame.0"]
            torch.testing.assert_close(u.mH @ u, torch.eye(3, dtype=REAL), rtol=1e-9, atol=1e-9)
        assert o.skipped_steps == 1
    assert equal(*models)
    assert all(p.isfinite().all() for p in models[0])


@pytest.mark.parametrize("later", [False, True], ids=["at once", "elsewhere"])
@pytest.mark.parametrize("transport", [Rotate(), Reset()], ids=str)
@pytest.mark.parametrize("saved", [4, 5])
def test_a_frame_that_was_searched_at_another_rank_is_not_used(later, transport, saved):
    """Saved before the step that uses it, or one step earlier: the loaded state is refreshed at once."""
    m = model([(12, 20)])
    optimizer = made(m, Delayed(by=3), 5, transport=transport)
    run(m, optimizer, range(saved))
    assert optimizer.state[m[0]]["finder.due"] == 5
    other = made(m, Delayed(by=3), 5, rank=5, transport=transport)
    if later:
        shadowed(other)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for t in range(saved, 12):
        run(m, other, [t])
        u = other.state[m[0]]["frame.0"]
        torch.testing.assert_close(u.mH @ u, torch.eye(5, dtype=REAL), rtol=1e-9, atol=1e-9)


def test_a_period_that_was_edited():
    """A refresh that comes sooner than was foreseen is made at once, and what was begun is dropped; later ones wait."""
    m = model([(12, 20)])
    optimizer = made(m, Delayed(by=2), 6)
    shadow = shadowed(optimizer)
    due = []
    for t in range(12):
        if t == 5:
            optimizer.param_groups[0]["refresh_every"] = 5
        shadow.step = t
        run(m, optimizer, [t])
        due.append(int(optimizer.state[m[0]]["finder.due"]))
    assert due == [0, 0, 0, 0, 6, 0, 0, 0, 10, 10, 0, 0]
    assert shadow.begun == [4, 8]
    optimizer.param_groups[0]["refresh_every"] = 1
    with pytest.raises(ValueError, match=r"Delayed\(.*by=2\).*refused with refresh_every=1.*by=1 or less"):
        run(m, optimizer, [12])


@dataclass(frozen=True)
class Stays(Power):
    """Hands back the very factors that it was given."""

    def find(self, operand, start, warm, memory):
        return start


@pytest.mark.parametrize("later", [False, True], ids=["at once", "elsewhere"])
def test_a_frame_to_come_shares_no_memory_with_the_one_in_use(later):
    m = model([(12, 20)])
    optimizer = made(m, Delayed(Stays()), 2)
    if later:
        shadowed(optimizer)
    for t in range(6):
        run(m, optimizer, [t])
        state = optimizer.state_dict()["state"][0]
        places = [x.data_ptr() for x in state.values() if isinstance(x, torch.Tensor)]
        assert len(places) == len({*places})


def test_nothing_is_begun_where_nothing_was_seen():
    """A first gradient of zeros: its frame is looked for again at the next step."""
    p = nn.Parameter(randn((12, 20), 0))
    optimizer = made([p], Delayed(), 1)
    for t in range(3):
        p.grad = torch.zeros_like(p) if t == 0 else randn((12, 20), t)
        optimizer.step()
        assert optimizer.state[p]["finder.due"] == t  # one step is not counted


# --------------------------------------------------------------------------------------------------------------- fields


def test_what_is_refused():
    with pytest.raises(ValueError, match="by must be"):
        Delayed(by=0)
    with pytest.raises(TypeError, match="by must be"):
        Delayed(by=1.0)
    with pytest.raises(ValueError, match="fills a ModeFrame"):
        Delayed(CosineSelection())
    with pytest.raises(ValueError, match="finds its frames at once"):
        Delayed(Delayed())
    with pytest.raises(ValueError, match="finds its frames at once"):
        BlockSelection(Delayed())


@pytest.mark.parametrize("inner", [Nystroem(columns="energy"), IncrementalSVD(), StreamingTucker()], ids=str)
def test_finders_that_remember_tensors_are_refused(inner):
    with pytest.raises(ValueError, match=r"parameter 0: finder Delayed.* of past gradients"):
        made([nn.Parameter(randn((8, 9), 0))], Delayed(inner))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"frame": Trains()}, TypeError, "cannot fill frame"),
        ({"frame": SparseModes()}, TypeError, "cannot fill frame"),
        ({"frame": Cosines()}, TypeError, "cannot fill frame"),
        ({"ranks": Energy()}, ValueError, "ranks.*searched ahead"),
        ({"every": 1}, ValueError, "refresh_every=1.*by=1 or less"),
    ],
)
def test_compositions_that_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        made([nn.Parameter(randn((8, 9), 0))], Delayed(by=2), **options)


@pytest.mark.parametrize("side", ["left", "both"])
def test_slots_are_there_from_the_start_and_are_planned(side):
    """One factor more for each that there is, and one integer."""
    m = nn.Linear(20, 12, bias=False)
    plans, measured = [], []
    for finder in (Power(), Delayed(by=2)):
        options = {"finder": finder, "side": side, "refresh_every": 3, "rank": 4}
        plan = comoving.plan(m, "tucker-adam", **options)
        optimizer = comoving.build("tucker-adam", m, 1e-2, **options)
        m.weight.grad = randn((12, 20), 0, torch.float32)
        optimizer.step()
        measured.append(comoving.state_bytes(optimizer))
        plans.append(plan)
        for t in range(1, 8):
            m.weight.grad = randn((12, 20), t, torch.float32)
            optimizer.step()
            assert comoving.state_bytes(optimizer) == measured[-1]
    assert [plan.state_bytes for plan in plans] == measured
    factors = 4 * 4 * (12 + (20 if side == "both" else 0))
    assert measured[1] - measured[0] == factors + 8
    assert plans[1].state["finder"] - plans[0].state["finder"] == factors + 8


def test_traits_are_those_of_the_inner_finder():
    assert Delayed(Power(), 2).ahead == 2
    assert Power().ahead == 0
    assert Delayed(Exact(inertia=0.3)).inertia == 0.3
    assert Delayed(Power()).joint is True
    assert Delayed(Power()).batched is True
