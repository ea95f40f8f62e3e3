"""What the planner says of processes that send cores is what they have and send, to the byte."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import comoving
from comoving.codecs import Int8
from comoving.distributed import WireFrame, compress
from comoving.finders import Exact
from comoving.memory import measure
from contract.support import COMPLEX, randn
from distributed.models import wrapped
from distributed.processes import run

PERIOD = 2


class Net(nn.Module):
    """Alike matrices, one of another shape, a tensor, a complex matrix, dense ones; more than one bucket."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(520, 512)
        self.layers = nn.ModuleList([nn.Linear(48, 40) for _ in range(3)] + [nn.Linear(40, 30, bias=False)])
        self.tensor = nn.Parameter(randn((14, 24, 20), torch.float32, 1))
        self.waves = nn.Parameter(randn((20, 14), COMPLEX, 2))

    def forward(self, t):
        given = [randn(tuple(p.shape), p.dtype, 10 * t + i) for i, p in enumerate(self.parameters())]
        return sum((p * x).sum().abs() for p, x in zip(self.parameters(), given, strict=True))


class Half(nn.Module):
    """Matrices in bfloat16, and one in float64."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(70, 50, dtype=torch.bfloat16), nn.Linear(30, 44, dtype=torch.float64)

    forward = Net.forward


class Experts(nn.Module):
    """Four experts in one tensor, and a dense bias."""

    def __init__(self):
        super().__init__()
        self.experts, self.bias = nn.Parameter(randn((4, 24, 20), torch.float32, 1)), nn.Parameter(torch.ones(7))

    forward = Net.forward


CASES = {
    "default": ("comoving-adamw", Net, {"rank": 4}),
    "galore": ("galore", Net, {"rank": 5}),
    "both sides": ("tucker-adam", Half, {"rank": 0.2}),
    "muon": ("comoving-adamw", Half, {"rank": 6, "rule": "muon", "moments": "int8"}),
    "experts": ("comoving-adamw", Experts, {"rank": 4, "frame": "blocks"}),
    "whole": ("muon", Net, {}),
    "whole experts": ("comoving-adamw", Experts, {"rank": 1.0, "rule": "muon", "frame": "blocks"}),
}
WHOLE = {
    "whole": WireFrame(5, PERIOD),
    "whole experts": WireFrame(0.25, PERIOD, "both", Exact(), Int8()),
}


SENT = [("default", "same"), ("default", "bfloat16"), ("default", "int8"), ("galore", "same"), ("both sides", "int8"),
        ("muon", "bfloat16"), ("experts", "int8"), ("whole", "bfloat16"), ("whole", "int8"),
        ("whole experts", "same")]  # fmt: skip


def _options(name):
    recipe, net, options = CASES[name]
    return recipe, net, options | ({} if recipe == "muon" else {"refresh_every": PERIOD})


def _counted(rank):
    """Bytes of state, and what is sent in as many steps as frames stand for, after the first such."""
    found = {}
    for name, wire in SENT:
        recipe, net, options = _options(name)
        torch.manual_seed(0)
        ddp = wrapped(net())
        optimizer = comoving.build(recipe, ddp.module, 1e-3, **options)
        sent = compress(ddp, optimizer, wire, whole=WHOLE.get(name))
        before = 0, 0, 0
        for t in range(2 * PERIOD):
            if t == PERIOD:
                before = sent.dense.bytes, sent.cores.bytes, sent.frames.bytes
            ddp(10 * t + rank).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = sent.dense.bytes, sent.cores.bytes, sent.frames.bytes
        state = sum(x.to_local().nbytes if isinstance(x, DTensor) else x.nbytes
                    for own in optimizer.state_dict()["state"].values() for key, x in own.items()
                    if key.startswith("wire.") and isinstance(x, torch.Tensor))  # fmt: skip
        state += comoving.state_bytes(optimizer)
        found[name, wire] = state, [b - a for a, b in zip(before, after, strict=True)]
    return found


def test_a_plan_of_cores_is_what_is_sent():
    count = 3
    found = run(count, _counted)
    for (name, wire), (state, sent) in found[0].items():
        recipe, net, options = _options(name)
        plan = comoving.plan(net(), recipe, ddp=count, compress=wire, whole=WHOLE.get(name), device="cpu", **options)
        assert plan.state_bytes == state, (name, wire)
        dense, cores, frames = sent
        assert (plan.wire["dense"], plan.wire["cores"]) == (dense / PERIOD, cores / PERIOD), (name, wire)
        assert plan.wire["frames"] == frames // PERIOD, (name, wire)
        assert plan.wire["cores"] > 0


def _measured(rank, name, wire):
    """The peak of the first step, of one without a refresh, and of one with a refresh of everything."""
    recipe, net, options = _options(name)
    ddp = wrapped(net())
    optimizer = comoving.build(recipe, ddp.module, 1e-3, **options)
    compress(ddp, optimizer, wire)
    for p, site in optimizer.sites.items():
        optimizer.sites[p] = replace(site, phase=10**6 - 1)
    peaks = []
    for every in (1, 10**6, 1):
        for group in optimizer.param_groups:
            group["refresh_every"] = every
        for p in ddp.module.parameters():
            p.grad = torch.randn_like(p)
        given = {p: p.grad for p, site in optimizer.sites.items() if site.projected}
        for p in given:
            p.grad = None

        def step(given=given):
            with torch.no_grad():
                optimizer._driver.take(given, False)
            optimizer.step()

        peaks.append(measure(step, _there(ddp.module, optimizer, given)).peak)
    return peaks


def _there(model, optimizer, given):
    """Weights, gradients and state; no list keeps what the step replaces."""
    yield from model.parameters()
    yield from (p.grad for p in model.parameters() if p.grad is not None)
    yield from given.values()
    for state in optimizer.state.values():
        yield from (x for x in state.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(
    ("name", "wire"), [("galore", "same"), ("both sides", "int8"), ("muon", "bfloat16"), ("experts", "bfloat16")]
)
def test_what_is_open_from_the_backward_pass_to_the_step_is_planned(name, wire):
    recipe, net, options = _options(name)
    plan = comoving.plan(net(), recipe, ddp=2, compress=wire, device="cpu", **options)
    first, plain, refresh = run(2, _measured, name, wire)[0]
    resident = plan.weights + plan.gradients + plan.state_bytes
    assert resident + plan.step_temporaries == pytest.approx(plain, rel=0.1)
    assert resident + plan.refresh_temporaries == pytest.approx(max(first, refresh), rel=0.1)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("adamw", {}, "has none: lower rank="),
        ("muon", {}, "whole=WireFrame"),
        ("muon", {"compress": False, "whole": WireFrame()}, "give compress"),
        ("coap", {"rank": 4}, "sees more of a gradient than contractions"),
        ("comoving-adamw", {"rank": 4, "layerwise": True}, "refused with layerwise"),
        ("comoving-adamw", {"rank": 4, "ddp": None}, "give ddp"),
        ("comoving-adamw", {"rank": 4, "compress": "int4"}, "compress must be"),
    ],
)
def test_what_compress_refuses_is_not_planned(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        comoving.plan(Half(), recipe, **{"ddp": 2, "compress": True, **options})
