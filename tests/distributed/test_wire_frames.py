"""Gradients of whole frames are sent as cores of a frame that serves the wire alone, and arrive as gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from comoving import LowRankOptimizer
from comoving.codecs import Full, Int4, Int8, Root
from comoving.distributed import WireFrame, compress, load
from comoving.finders import Exact, Nystroem, Power
from comoving.frames import Blocks
from comoving.rules import Muon
from contract.support import COMPLEX, close, randn
from distributed.models import Net, raised, wrapped
from distributed.processes import run

RANK, EVERY, STEPS = 3, 3, 8


class Mixed(nn.Module):
    """Matrices of both orientations, a complex one, experts, a dense vector; the gradients are what is given."""

    def __init__(self):
        super().__init__()
        self.tall, self.wide = (
            nn.Parameter(randn((14, 9), torch.float64, 1)),
            nn.Parameter(randn((8, 20), torch.float64, 2)),
        )
        self.waves = nn.Parameter(randn((10, 12), COMPLEX, 3))
        self.experts = nn.Parameter(randn((3, 8, 10), torch.float64, 4))
        self.bias = nn.Parameter(randn((7,), torch.float64, 5))

    def forward(self, given):
        return sum((p * g.conj()).sum().real for p, g in zip(self.parameters(), given, strict=True))


def gradients(model, t, rank):
    """Of one process, as the forward pass makes them: of falling singular values, which tells directions apart."""
    found = []
    for i, p in enumerate(model.parameters()):
        x = randn(tuple(p.shape), p.dtype, 100 * t + 10 * rank + i)
        if x.ndim > 1:
            u, s, v = torch.linalg.svd(x, full_matrices=False)
            x = u * (s * 0.6 ** torch.arange(s.shape[-1]))[..., None, :] @ v
        found.append(x)
    return found


def optimizer_of(model, **options):
    groups = [
        {"params": [("experts", model.experts)], "frame": Blocks()},
        {"params": [(name, p) for name, p in model.named_parameters() if name != "experts"]},
    ]
    return LowRankOptimizer(groups, 0.01, 1.0, rule=Muon(), **options)


def _training(rank, side, buckets, unsent):
    ddp = wrapped(Mixed(), bucket_cap_mb=buckets, gradient_as_bucket_view=side == "auto")
    optimizer = optimizer_of(ddp.module)
    settings = WireFrame(RANK, EVERY, side, Exact(), Int8() if side == "int8" else Full())
    compress(ddp, optimizer, "same", accumulate=1 + unsent, whole=settings)
    steps = []
    for t in range(STEPS):
        for i in range(1 + unsent):
            ddp(gradients(ddp.module, 50 * i + t, rank)).backward()
        steps.append({name: p.grad.clone() for name, p in ddp.module.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return steps, {name: p.detach().clone() for name, p in ddp.module.named_parameters()}, frames_of(optimizer)


def frames_of(optimizer):
    """Everything of the wire that all processes have alike."""
    lanes = optimizer._driver.beside._lanes.values()
    return {(lane.site.name, name): x for lane in lanes for name, x in lane.state.items() if ".frame." in name}


def expected(side, count, unsent):
    """What arrives, from the definition: the mean of F F^H (g_i + e_i), F the leading directions of their mean."""
    model = Mixed()
    phases = {name: i % EVERY for i, name in enumerate(("experts", "tall", "wide", "waves"))}
    errors = {name: [torch.zeros_like(p)] * count for name, p in model.named_parameters()}
    frames, steps = {}, []
    for t in range(STEPS):
        given = [gradients(model, t, rank) for rank in range(count)]
        for i in range(1, 1 + unsent):
            given = [[a + b for a, b in zip(x, gradients(model, 50 * i + t, rank), strict=True)]
                     for rank, x in enumerate(given)]  # fmt: skip
        arriving = {}
        for i, (name, p) in enumerate(model.named_parameters()):
            own = [given[rank][i] for rank in range(count)]
            if p.ndim == 1:
                arriving[name] = sum(own) / count
                continue
            totals = [g + e for g, e in zip(own, errors[name], strict=True)]
            if t == 0 or t % EVERY == phases[name]:
                frames[name] = projectors(sum(totals) / count, side)
            left, right = frames[name]
            cores = [left @ x @ right for x in totals]
            errors[name] = [x - core for x, core in zip(totals, cores, strict=True)]
            arriving[name] = sum(cores) / count
        steps.append(arriving)
    return steps


def projectors(x, side):
    """On the leading directions of the sides that are compressed; the identity for others."""
    m, n = x.shape[-2:]
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    u, v = u[..., :RANK], vh.mH[..., :RANK]
    left, right = torch.eye(m, dtype=x.dtype), torch.eye(n, dtype=x.dtype)
    on_left = {"auto": m <= n, "right": False, "both": True}[side]
    return (u @ u.mH if on_left else left), (v @ v.mH if not on_left or side == "both" else right)


@pytest.mark.parametrize(("side", "buckets", "unsent"), [("auto", 25, 0), ("right", 0.0005, 0), ("both", 0.0005, 1)])
def test_what_arrives_is_the_mean_of_what_the_frame_holds(side, buckets, unsent):
    results = run(2, _training, side, buckets, unsent)
    model = Mixed()
    optimizer = optimizer_of(model)
    for t, arriving in enumerate(expected(side, 2, unsent)):
        for name, g in arriving.items():
            close(results[0][0][t][name], g, 1e-9)
        for name, p in model.named_parameters():
            p.grad = arriving[name]
        optimizer.step()
    for name, p in model.named_parameters():
        close(results[0][1][name], p.detach(), 1e-9)
    for i in (1, 2):
        assert all(torch.equal(x, results[1][i][key]) for key, x in results[0][i].items())
    assert {name for name, _ in results[0][2]} == {"experts", "tall", "wide", "waves"}


def _balanced(rank, wire, codec):
    """|sum of gradients - sum of what was sent - e| of this process, relative; and how far the means are apart."""
    ddp = wrapped(Net())
    optimizer = LowRankOptimizer(ddp.module.named_parameters(), 0.01, 1.0, rule=Muon())
    sent = compress(ddp, optimizer, wire, whole=WireFrame(0.25, 2, finder=Power(iterations=2), codec=codec))
    frames, p, own = optimizer._driver.beside, ddp.module.layers[1].weight, []
    projected = frames._projected

    def note(lane, g):
        piece, frame, error = projected(lane, g)
        if lane.site.name == "layers.1.weight":
            own.append((g.clone(), frame.lift(frames.wire.sent(piece.core, 0))))
        return piece, frame, error

    frames._projected = note
    arrived = torch.zeros_like(p)
    for t in range(5):
        ddp(randn((6, 12), torch.float64, 10 * t + rank)).square().mean().backward()
        arrived += p.grad
        optimizer.step()
        optimizer.zero_grad()
    given, used = (sum(part) for part in zip(*own, strict=True))
    state = {name.removeprefix("wire.error."): x for name, x in frames._lanes[p].state.items() if ".error." in name}
    e = codec.decode(state, tuple(p.shape), p.dtype)
    dist.all_reduce(used)
    lost = float((given - sum(part[1] for part in own) - e).norm() / given.norm())
    return lost, float((used / 2 - arrived).norm() / arrived.norm()), sent.dense.bytes, sent.cores.bytes


@pytest.mark.parametrize(
    ("wire", "codec", "kept", "arrived"),
    [("bfloat16", Full(), 1e-9, 1e-2), ("int8", Full(), 1e-9, 2e-2), ("same", Int8(), 2e-2, 1e-9)],
)
def test_what_was_not_sent_is_kept(wire, codec, kept, arrived):
    for lost, apart, dense, cores in run(2, _balanced, wire, codec):
        assert lost < kept and apart < arrived
        assert 0 < cores and dense == 5 * 8 * (4 * 16 + 8)  # biases alone


# ---------------------------------------------------------------------------------------------------------- bad numbers


def _spoiled(rank, skip, which):
    ddp = wrapped(Mixed(), bucket_cap_mb=0.0005)
    optimizer = optimizer_of(ddp.module, on_nonfinite="skip" if skip else "raise")
    compress(ddp, optimizer, whole=WireFrame(RANK, EVERY))
    found = []
    for t in range(4):
        given = gradients(ddp.module, t, rank)
        if t == 2 and rank == 1:
            given[which].view(-1)[5] = torch.nan
        before = {name: p.detach().clone() for name, p in ddp.module.named_parameters()}
        lanes = {p: (lane.tick, dict(lane.state)) for p, lane in optimizer._driver.beside._lanes.items()}
        ddp(given).backward()
        said = raised(optimizer.step)
        if t == 2:
            kept = all(torch.equal(p, before[name]) for name, p in ddp.module.named_parameters())
            for p, lane in optimizer._driver.beside._lanes.items():
                kept = kept and lane.tick == lanes[p][0]
                kept = kept and all(torch.equal(x, lanes[p][1][name]) for name, x in lane.state.items())
            found = [said, kept]
        optimizer.zero_grad()
    return [*found, {name: p.detach() for name, p in ddp.module.named_parameters()}]


@pytest.mark.parametrize(("skip", "which"), [(False, 1), (True, 1), (True, 4)])
def test_a_bad_gradient_on_one_process_is_seen_by_all(skip, which):
    first, second = run(2, _spoiled, skip, which)
    for said, kept, weights in (first, second):
        assert kept and all(w.isfinite().all() for w in weights.values())
        assert said == "nothing" if skip else "non-finite gradient in wide:" in said
    assert all(torch.equal(w, second[2][name]) for name, w in first[2].items())


def _dropped(rank):
    """What is there after a pass that is dropped, and what two passes before one step have left of their gradients."""
    ddp = wrapped(Mixed())
    optimizer = optimizer_of(ddp.module)
    compress(ddp, optimizer, "same", whole=WireFrame(RANK, EVERY))
    _trained(ddp, optimizer, rank, 0, 2)
    before = _lanes(optimizer)
    ddp(gradients(ddp.module, 2, rank)).backward()
    waiting = optimizer.state_dict()["state"][1]
    optimizer.zero_grad()
    after = _lanes(optimizer)
    stays = all(torch.equal(x, after[key]) for key, x in before.items())
    stays = stays and waiting["wire.tick"] == 2
    given = [gradients(ddp.module, t, rank) for t in (3, 4)]
    for g in given:
        ddp(g).backward()
    arrived = {name: p.grad.clone() for name, p in ddp.module.named_parameters()}
    optimizer.step()
    left = {name: x - before[name, slot] for (name, slot), x in _lanes(optimizer).items() if "error" in slot}
    names = dict(ddp.module.named_parameters())
    total = {name: a + b for name, a, b in zip(names, *given, strict=True)}
    return stays, {name: (total[name] - x, arrived[name]) for name, x in left.items()}


def test_what_is_not_stepped_by_is_forgotten_and_passes_add_up():
    first, second = run(2, _dropped)
    assert first[0] and second[0]
    for name, (sent, arrived) in first[1].items():
        close((sent + second[1][name][0]) / 2, arrived, 1e-9)


def _differing(rank, own):
    ddp = wrapped(Mixed())
    optimizer = optimizer_of(ddp.module)
    compress(ddp, optimizer, **({"whole": WireFrame(RANK, EVERY)} | ({} if rank else own)))
    return raised(lambda: ddp(gradients(ddp.module, 0, rank)).backward())


@pytest.mark.parametrize("own", [{"wire": "int8"}, {"accumulate": 2}, {"whole": WireFrame(RANK + 1, EVERY)}])
def test_processes_that_would_send_otherwise_are_told(own):
    for said in run(2, _differing, own):
        assert f"processes disagree about {next(iter(own))}" in said


def _unused(rank):
    """One process leaves experts out now and then, both leave a matrix out; gradients of what nobody used."""
    ddp = wrapped(Mixed(), find_unused_parameters=True)
    optimizer = optimizer_of(ddp.module)
    compress(ddp, optimizer, "same", whole=WireFrame(RANK, EVERY))
    absent = []
    for t in range(5):
        given, own = gradients(ddp.module, t, rank), dict(ddp.module.named_parameters())
        used = [name for name in own if not (name == "wide" or name == "experts" and (t + rank) % 2)]
        ddp.module.forward = lambda given, used=used: sum(
            (p * g.conj()).sum().real
            for (name, p), g in zip(ddp.module.named_parameters(), given, strict=True)
            if name in used
        )
        ddp(given).backward()
        absent.append(own["wide"].grad is None and own["experts"].grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    return all(absent), {name: p.detach() for name, p in ddp.module.named_parameters()}


def test_what_some_or_all_processes_leave_out():
    first, second = run(2, _unused)
    assert first[0] and second[0]
    assert all(torch.equal(w, second[1][name]) for name, w in first[1].items())
    assert torch.equal(first[1]["wide"], Mixed().wide.detach())
    assert not torch.equal(first[1]["experts"], Mixed().experts.detach())


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _built(count, codec, side):
    torch.manual_seed(0)
    ddp = wrapped(Mixed())
    optimizer = optimizer_of(ddp.module)
    compress(ddp, optimizer, "same", whole=WireFrame(RANK, EVERY, side, codec=codec))
    return ddp, optimizer


def _trained(ddp, optimizer, rank, start, steps):
    for t in range(start, start + steps):
        ddp(gradients(ddp.module, t, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _lanes(optimizer):
    lanes = optimizer._driver.beside._lanes.values()
    return {(lane.site.name, name): x.clone() for lane in lanes for name, x in (*lane.state.items(),)} | {
        (lane.site.name, "tick"): torch.tensor(lane.tick) for lane in lanes
    }


def _saving(rank, folder):
    found = {}
    for name, codec in {"full": Full(), "int4": Int4()}.items():
        ddp, optimizer = _built(2, codec, "auto")
        _trained(ddp, optimizer, rank, 0, 4)
        saved = {"optimizer": get_optimizer_state_dict(ddp, optimizer)}
        dcp.save(saved, checkpoint_id=f"{folder}/{name}")
        weights = {key: p.detach().clone() for key, p in ddp.module.named_parameters()}
        again, other = _built(2, codec, "auto")
        again.module.load_state_dict(weights)
        fresh = {"optimizer": get_optimizer_state_dict(again, other)}
        own = fresh["optimizer"]["state"]["tall"]
        assert {key for key, x in own.items() if isinstance(x, DTensor)} == {
            f"wire.error.{slot}" for slot, spec in codec.schema((14, 9), torch.float64).items() if not spec.seed
        }
        dcp.load(fresh, checkpoint_id=f"{folder}/{name}")
        set_optimizer_state_dict(again, other, fresh["optimizer"])
        before, after = _lanes(optimizer), _lanes(other)
        assert all(torch.equal(x, after[key]) for key, x in before.items())
        _trained(ddp, optimizer, rank, 4, 4)
        _trained(again, other, rank, 4, 4)
        left = dict(again.module.named_parameters())
        assert (
            differ := [name for name, p in ddp.module.named_parameters() if not torch.equal(p, left[name])]
        ) == [], differ
        found[name] = before, weights
    return found


def _alone(_, folder):
    """One process reads what two have saved: the mean of their errors; of other sides frames are sought anew."""
    found = {}
    for name, codec in {"full": Full(), "int4": Int4()}.items():
        for side in ("auto", "both"):
            ddp, optimizer = _built(1, codec, side)
            fresh = {"optimizer": get_optimizer_state_dict(ddp, optimizer)}
            load(fresh, checkpoint_id=f"{folder}/{name}")
            set_optimizer_state_dict(ddp, optimizer, fresh["optimizer"])
            found[name, side] = _lanes(optimizer)
    begun = optimizer.state_dict()
    begun["state"] = {}
    optimizer.load_state_dict(begun)
    assert not any(x.any() for x in _lanes(optimizer).values())
    set_optimizer_state_dict(ddp, optimizer, fresh["optimizer"])
    plain = optimizer_of(Mixed())
    plain.load_state_dict(optimizer.state_dict())
    assert not any(key.startswith("wire.") for state in plain.state.values() for key in state)
    return found


def _between(rank, folder):
    """What is taken over from a run without frames of the wire, from one process's tensors, and of another codec."""
    plain = wrapped(Mixed())
    optimizer = optimizer_of(plain.module)
    _trained(plain, optimizer, rank, 0, 2)
    dcp.save({"optimizer": get_optimizer_state_dict(plain, optimizer)}, checkpoint_id=folder)
    ddp, own = _built(2, Full(), "auto")
    _trained(ddp, own, rank, 0, 3)
    before = _lanes(own)
    first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    saved = get_optimizer_state_dict(ddp, own, options=first)
    again, other = _built(2, Full(), "auto")
    set_optimizer_state_dict(again, other, saved, options=first)
    assert all(torch.equal(x, before[key]) for key, x in _lanes(other).items())
    coded, third = _built(2, Int8(), "auto")
    whole = StateDictOptions(full_state_dict=True)
    said = raised(
        set_optimizer_state_dict, coded, third, get_optimizer_state_dict(ddp, own, options=whole), options=whole
    )
    fresh = {"optimizer": get_optimizer_state_dict(ddp, own)}
    load(fresh, checkpoint_id=folder)
    set_optimizer_state_dict(ddp, own, fresh["optimizer"])
    return said, not any(x.any() for x in _lanes(own).values()), own.state[ddp.module.tall]["tick"]


def test_other_runs_checkpoints(tmp_path):
    for said, anew, tick in run(2, _between, str(tmp_path)):
        assert "stored by another codec" in said and anew and tick == 2


def test_checkpoints_have_the_frames_and_every_process_s_error(tmp_path):
    first, second = run(2, _saving, str(tmp_path))
    (found,) = run(1, _alone, str(tmp_path))
    for name, bound in {"full": 1e-12, "int4": 0.2}.items():
        (mine, _), (theirs, _) = first[name], second[name]
        codec = {"full": Full(), "int4": Int4()}[name]
        for key, x in found[name, "auto"].items():
            if ".error." not in key[1]:
                assert torch.equal(x, mine[key]), key
        for parameter, shape in {"tall": (14, 9), "experts": (3, 8, 10)}.items():
            own = [errors(x, parameter, codec, shape) for x in (mine, theirs, found[name, "auto"], found[name, "both"])]
            close(own[2], (own[0] + own[1]) / 2, bound)
            close(own[3], (own[0] + own[1]) / 2, bound)
            assert not torch.allclose(own[0], own[1])
        assert int(found[name, "both"]["tall", "tick"]) == 0


def errors(lanes, parameter, codec, shape):
    stored = {
        name.removeprefix("wire.error."): x
        for (own, name), x in lanes.items()
        if own == parameter and ".error." in name
    }
    return codec.decode(stored, shape, torch.float64)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be an int >= 1"),
        ({"rank": (3, None)}, TypeError, "an int or a float"),
        ({"refresh_every": 0}, ValueError, "refresh_every"),
        ({"side": "top"}, ValueError, "side must be"),
        ({"finder": Nystroem()}, ValueError, "cannot find frames"),
        ({"codec": Root()}, ValueError, "no signs"),
    ],
)
def test_settings_outside_their_interval_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        WireFrame(**options)


def _refused(rank):
    frozen = wrapped(Mixed())
    frozen.module.tall.requires_grad_(False)
    optimizer = optimizer_of(frozen.module)
    compress(frozen, optimizer, whole=WireFrame(RANK))
    assert {name for name, _ in _lanes(optimizer)} == {"experts", "wide", "waves"}
    ddp = wrapped(Net())
    muon = LowRankOptimizer(ddp.module.named_parameters(), 0.01, 1.0, rule=Muon())
    low = LowRankOptimizer(ddp.module.named_parameters(), 0.01, 3)
    return [raised(compress, ddp, muon), raised(compress, ddp, low, whole=WireFrame())]


def test_an_optimizer_that_has_nothing_to_send_so_is_told():
    for muon, low in run(1, _refused):
        assert "whole=WireFrame(rank=...)" in muon
        assert "no parameter in a whole frame" in low
