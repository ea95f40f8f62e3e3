"""Moments in few bits: the engine around codecs of the rule's slots."""

import copy
import io

import pytest
import torch

import comoving
from comoving import LowRankOptimizer, explain, state_bytes
from comoving.codecs import BFloat16, Full, Int4, Int8, RankOne
from comoving.finders import RandomProjection
from comoving.frames import Blocks, Seeded
from comoving.ranks import Energy
from comoving.residual import Discard, Feedback
from comoving.rules import Adafactor, Adam, Lion, Muon
from comoving.section import Section
from comoving.transport import Carry, Keep, Reset, Rotate
from contract.support import Holder, cells, close, known_rank, lone, randn, step

F32, C64 = torch.float32, torch.complex64
CODECS = [BFloat16(), Int8(), Int8(block=8), Int4(), Int4(table="linear"), RankOne()]
CODED = pytest.mark.parametrize("moments", CODECS, ids=str)
# How far the weights may be from those of full moments, as a share of their way.
GAP = {BFloat16(): 0.01, Int8(): 0.03, Int8(block=8): 0.02, Int4(): 0.4, Int4(table="linear"): 0.65}
SHAPES = [((24, 40), F32), ((12, 10, 9), F32), ((12, 12, 3, 3), C64), ((7,), F32), ((5,), C64), ((1,), F32)]
TRANSPORTS = [Keep(), Reset(), Rotate(), Carry()]


def build(shapes=SHAPES, **options):
    """A parameter of each kind, and their optimizer."""
    model = Holder(*(randn(shape, dtype, i) for i, (shape, dtype) in enumerate(shapes)))
    settings = {"lr": 0.01, "rank": 3, "refresh_every": 2, "scale": "match"} | options
    return list(model.parameters()), LowRankOptimizer(model.parameters(), **settings)


def train(params, optimizer, first, last):
    """A signal of low rank that turns, in noise."""
    for t in range(first, last):
        for i, p in enumerate(params):
            shape, dtype = tuple(p.shape), p.dtype
            ranks = tuple(min(3, d) for d in shape)
            low = known_rank(shape, ranks, dtype, i) + 0.05 * t * known_rank(shape, ranks, dtype, i + 50)
            p.grad = low + 0.3 * randn(shape, dtype, 100 * t + i)
        optimizer.step()


def states_equal(a, b):
    for p, q in zip(a, b, strict=True):
        assert p.keys() == q.keys()
        for name, x in p.items():
            assert torch.equal(x, q[name]) if isinstance(x, torch.Tensor) else x == q[name], name


def flat_states(optimizer):
    return list(optimizer.state_dict()["state"].values())


def saved(optimizer):
    """What comes back from a file that is loaded with weights_only."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def travelled(ours, theirs, starts):
    gap = sum(float((a - b).detach().norm() ** 2) for a, b in zip(ours, theirs, strict=True)) ** 0.5
    way = sum(float((b - s).detach().norm() ** 2) for b, s in zip(theirs, starts, strict=True)) ** 0.5
    return gap / way


@CODED
@pytest.mark.parametrize("transport", TRANSPORTS, ids=str)
@pytest.mark.parametrize("residual", [Discard(), Feedback()], ids=str)
def test_bytes_are_as_explained_and_all_stays_finite(moments, transport, residual):
    params, optimizer = build(moments=moments, transport=transport, residual=residual)
    train(params, optimizer, 0, 6)
    assert state_bytes(optimizer) == explain(optimizer).state_bytes
    for p in params:
        assert p.isfinite().all()
        assert all(x.isfinite().all() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))
        coded = optimizer.sites[p].projected
        assert ("moment.first" in optimizer.state[p]) is not coded
    assert any(optimizer.sites[p].projected for p in params)


@CODED
@pytest.mark.parametrize("rule", [Adam(), Muon(), Lion(), Adafactor()], ids=str)
def test_whole_frames_are_coded_too(moments, rule):
    params, optimizer = build(moments=moments, rule=rule, rank=1.0)
    assert state_bytes(optimizer) == 0
    train(params, optimizer, 0, 4)
    assert state_bytes(optimizer) == explain(optimizer).state_bytes
    for p in params:
        whole = optimizer.sites[p].whole
        assert whole == (p.ndim > 1)
        assert ("moment.first" in optimizer.state[p]) is not whole


@pytest.mark.parametrize("moments", [m for m in CODECS if m in GAP], ids=str)
@pytest.mark.parametrize("transport", [Rotate(), Carry()], ids=str)
@pytest.mark.parametrize("residual", [Discard(), Feedback()], ids=str)
def test_training_tracks_full_moments(moments, transport, residual):
    options = {"transport": transport, "residual": residual}
    (p, coded), (q, full) = build(moments=moments, **options), build(**options)
    starts = [x.detach().clone() for x in q]
    train(p, coded, 0, 30)
    train(q, full, 0, 30)
    assert 0 < travelled(p, q, starts) < GAP[moments]


@pytest.mark.parametrize("moments", [m for m in CODECS if m in GAP], ids=str)
@pytest.mark.parametrize("rule", [Adam(), Muon()], ids=str)
def test_whole_frames_track_full_moments(moments, rule):
    shapes = SHAPES[:3]
    (p, coded), (q, full) = (build(shapes, moments=m, rule=rule, rank=1.0) for m in (moments, Full()))
    starts = [x.detach().clone() for x in q]
    train(p, coded, 0, 30)
    train(q, full, 0, 30)
    assert 0 < travelled(p, q, starts) < GAP[moments]
    if moments in (Int8(), Int4()):
        bits = 8 if moments == Int8() else 4
        assert state_bytes(coded) < state_bytes(full) * (bits + 3.5) / 32


@CODED
@pytest.mark.parametrize("transport", TRANSPORTS, ids=str)
@pytest.mark.parametrize("rank", [3, 1.0])
def test_resuming_is_bitwise(moments, transport, rank):
    rule = Muon() if rank == 1.0 else Adam()
    options = {"moments": moments, "transport": transport, "rank": rank, "rule": rule, "residual": Feedback()}
    p, whole = build(**options)
    train(p, whole, 0, 5)
    q, resumed = build(**options)
    with torch.no_grad():
        for a, b in zip(p, q, strict=True):
            b.copy_(a)
    resumed.load_state_dict(saved(whole))
    states_equal(flat_states(whole), flat_states(resumed))
    for params, optimizer in ((p, whole), (q, resumed)):
        train(params, optimizer, 5, 10)
    assert all(torch.equal(a, b) for a, b in zip(p, q, strict=True))
    states_equal(flat_states(whole), flat_states(resumed))


@CODED
@pytest.mark.parametrize("transport", [Reset(), Rotate(), Carry()], ids=str)
def test_a_checkpoint_of_other_ranks_is_carried_over(moments, transport):
    """The coded optimizer goes on as one of full moments that starts from the decoded ones."""
    options = {"transport": transport, "refresh_every": 50}
    p, source = build(moments=moments, **options)
    train(p, source, 0, 5)
    q, target = build(moments=moments, rank=5, **options)
    target.load_state_dict(saved(source))
    train(q, target, 5, 6)
    assert state_bytes(target) == explain(target).state_bytes
    projected = next(x for x in q if target.sites[x].projected)
    unit = cells(target, projected)[0]
    assert unit.moments["moment.first"].shape == target.sites[projected].core_shape
    before = cells(source, p[0])[0]
    if transport.projects and moments in GAP:
        frame, m = unit.frame, unit.moments["moment.first"]
        moved = frame.overlap(before.frame).move(before.moments["moment.first"])
        expected = 0.9 * moved + 0.1 * frame.project(q[0].grad)
        assert (m - expected).norm() < GAP[moments] * expected.norm()


@CODED
@pytest.mark.parametrize("rank", [3, 1.0])
@pytest.mark.parametrize("transport", [Rotate(), Carry()], ids=str)
def test_adamws_state_becomes_coded(moments, rank, transport):
    shapes = SHAPES[:3]
    model = Holder(*(randn(shape, dtype, i) for i, (shape, dtype) in enumerate(shapes)))
    theirs = torch.optim.AdamW(model.parameters())
    train(list(model.parameters()), theirs, 0, 5)
    options = {"rank": rank, "transport": transport, "residual": Feedback()}
    (p, coded), (q, full) = (build(shapes, moments=m, **options) for m in (moments, Full()))
    starts = [x.detach().clone() for x in q]
    for params, optimizer in ((p, coded), (q, full)):
        optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
        train(params, optimizer, 5, 7)
    assert state_bytes(coded) == explain(coded).state_bytes
    assert [int(coded.state[x]["step"]) for x in p] == [7, 7, 7]
    if moments in GAP:
        assert travelled(p, q, starts) < GAP[moments]


@CODED
def test_adaptive_ranks(moments):
    policy = Energy(minimum=1, maximum=0.8, step=1)
    params, optimizer = build(moments=moments, ranks=policy, transport=Carry(), residual=Feedback())
    train(params, optimizer, 0, 12)
    projected = [p for p in params if optimizer.sites[p].projected]
    ranks = [optimizer.state[p]["ranks"].tolist() for p in projected]
    initial = [[-1 if r is None else r for r in optimizer.sites[p].ranks] for p in projected]
    assert ranks != initial
    q, resumed = build(moments=moments, ranks=policy, transport=Carry(), residual=Feedback())
    with torch.no_grad():
        for a, b in zip(params, q, strict=True):
            b.copy_(a)
    resumed.load_state_dict(saved(optimizer))
    train(params, optimizer, 12, 16)
    train(q, resumed, 12, 16)
    assert all(torch.equal(a, b) for a, b in zip(params, q, strict=True))
    assert state_bytes(optimizer) == sum(optimizer.roster.claim(p).bytes_now() for p in projected) + sum(
        row.bytes for row in explain(optimizer).rows if not row.projected
    )


@CODED
def test_adaptive_ranks_within_a_budget(moments):
    shapes, policy = SHAPES[:2], Energy(minimum=1, maximum=0.8, step=1)
    budget = 9000
    params, optimizer = build(shapes, moments=moments, ranks=policy, transport=Carry(), budget=budget)
    for t in range(12):
        train(params, optimizer, t, t + 1)
        assert state_bytes(optimizer, projected=True) <= budget


@CODED
@pytest.mark.parametrize("dtype", [F32, C64], ids=str)
def test_blocks(moments, dtype):
    """Each block is coded on its own; idle ones stay as they are, and a checkpoint resumes bitwise."""

    def make(start):
        return lone(start, moments=moments, frame=Blocks(), rank=3, refresh_every=2, transport=Carry())

    def go(p, optimizer, first, last, idle):
        for t in range(first, last):
            g = randn(tuple(p.shape), dtype, t)
            g[idle] = 0
            step(optimizer, p, g)

    p, optimizer = make(randn((4, 12, 16), dtype))
    go(p, optimizer, 0, 3, [])
    assert state_bytes(optimizer) == explain(optimizer).state_bytes
    before = copy.deepcopy({**Section(optimizer.state[p], "2")})
    go(p, optimizer, 3, 5, [2])
    states_equal([before], [{**Section(optimizer.state[p], "2")}])
    q, resumed = make(p.detach())
    resumed.load_state_dict(saved(optimizer))
    go(p, optimizer, 5, 9, [])
    go(q, resumed, 5, 9, [])
    assert torch.equal(p, q)
    dense = torch.nn.Parameter(randn((4, 12, 16), dtype))
    theirs = torch.optim.AdamW([dense])
    step(theirs, dense, randn((4, 12, 16), dtype, 1))
    r, loaded = make(dense.detach())
    loaded.load_state_dict(theirs.state_dict())
    go(r, loaded, 1, 3, [])
    assert r.isfinite().all()
    assert state_bytes(loaded) == explain(loaded).state_bytes


@CODED
@pytest.mark.parametrize("rank", [3, 1.0])
@pytest.mark.parametrize("steps", [0, 3, 4])
def test_a_skipped_step_changes_nothing(moments, rank, steps):
    options = {"moments": moments, "rank": rank, "transport": Carry(), "residual": Feedback(), "refresh_every": 1}
    params, optimizer = build(on_nonfinite="skip", **options)
    train(params, optimizer, 0, steps)
    values, before = [p.detach().clone() for p in params], copy.deepcopy(flat_states(optimizer))
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, value) for p, value in zip(params, values, strict=True))
    if steps:
        after = flat_states(optimizer)
        for state in (*after, *before):
            state.pop("tick", None)  # the host counts on
        states_equal(after, before)
    train(params, optimizer, steps, steps + 2)
    twins, other = build(on_nonfinite="skip", **options)
    train(twins, other, 0, steps + 2)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@CODED
def test_zero_gradients_give_no_nan(moments):
    params, optimizer = build(moments=moments, transport=Carry(), residual=Feedback(), weight_decay=0.0)
    starts = [p.detach().clone() for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, start) for p, start in zip(params, starts, strict=True))


@CODED
def test_a_window_of_gradients_leaves_stored_moments_alone(moments):
    """Absorbing without a refresh encodes nothing; a checkpoint within the window resumes bitwise."""
    options = {"moments": moments, "rank": 3, "refresh_every": 3, "transport": Carry(), "residual": Feedback()}
    p, optimizer = lone(randn((24, 40), F32), **options)
    step(optimizer, p, randn((24, 40), F32, 1))
    stored = {n: x.clone() for n, x in optimizer.state[p].items() if n.startswith("moment.")}
    optimizer.absorb(p, randn((24, 40), F32, 2))
    assert all(torch.equal(x, optimizer.state[p][n]) for n, x in stored.items())
    q, resumed = lone(p.detach(), **options)
    resumed.load_state_dict(saved(optimizer))
    for params, optimizers in ((p, optimizer), (q, resumed)):
        optimizers.absorb(params, randn((24, 40), F32, 3))
        optimizers.apply(params)
    assert torch.equal(p, q)


@CODED
def test_frames_that_store_no_directions(moments):
    options = {"moments": moments, "rank": 3, "refresh_every": 2, "frame": Seeded(), "finder": RandomProjection()}
    p, optimizer = lone(randn((24, 40), F32), **options)
    for t in range(5):
        step(optimizer, p, randn((24, 40), F32, t))
    assert p.isfinite().all()
    assert state_bytes(optimizer) == explain(optimizer).state_bytes
    q, resumed = lone(p.detach(), **options)
    resumed.load_state_dict(saved(optimizer))
    for params, optimizers in ((p, optimizer), (q, resumed)):
        for t in range(5, 8):
            step(optimizers, params, randn((24, 40), F32, t))
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["int4", "rank_one", "int8", "bfloat16"])
def test_codecs_of_moments_have_names(name):
    model = Holder(randn((24, 40), F32))
    optimizer = comoving.build("ldadam", model, rank=3, moments=name)
    (p,) = model.parameters()
    step(optimizer, p, randn((24, 40), F32, 1))
    assert (
        f"moment.first.{'rows' if name == 'rank_one' else 'value' if name == 'bfloat16' else 'codes'}"
        in (optimizer.state[p])
    )


def test_feedback_returns_what_the_codec_of_moments_rounds():
    """With feedback the sum of all updates of momentum and buffer is that of all gradients, whatever m is stored in."""
    options = {"rank": 3, "refresh_every": 2, "residual": Feedback(), "betas": (0.8, 0.95), "moments": Int4()}
    p, optimizer = lone(randn((24, 40), F32), **options)
    total, sums = torch.zeros(24, 40), torch.zeros(24, 40)
    for t in range(12):
        g = randn((24, 40), F32, t)
        total = total + g
        step(optimizer, p, g)
        unit = cells(optimizer, p)[0]
        m = unit.frame.lift(unit.moments["moment.first"])
        sums = sums + m
    used = unit.moments["moment.first"] * unit.residual["feedback.weight"] + unit.residual["feedback.momenta.value"]
    kept = unit.residual["feedback.gradients.value"] - unit.frame.lift(used)
    close(sums + 4.0 * m + kept, total, 1e-4)


@CODED
def test_frames_that_are_drawn_lie_beside_coded_moments_in_a_window(moments):
    """Such a frame takes its dtype from the core, of which the state shows none but in codes."""
    p, optimizer = lone(randn((12, 20)), moments=moments, frame=Seeded(), finder=RandomProjection(), rank=3)
    before = p.detach().clone()
    for t in range(3):
        optimizer.absorb(p, randn((12, 20), seed=2 * t))
        optimizer.absorb(p, randn((12, 20), seed=2 * t + 1))
        optimizer.apply(p)
    assert p.isfinite().all() and not torch.equal(p, before)
