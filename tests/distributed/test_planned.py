"""What the planner says of several ranks is what they have and send."""

from itertools import pairwise
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import comoving
from comoving.distributed import Traffic
from distributed.processes import run


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(m, n, bias=False) for m, n in pairwise((32, 48, 24, 40))])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Cube(nn.Module):
    def __init__(self):
        super().__init__()
        self.twin = nn.Parameter(torch.ones(24, 20, 16))
        self.same, self.odd = nn.Parameter(torch.ones(24, 20, 16)), nn.Parameter(torch.ones(30, 8, 9))

    def forward(self, x):
        return sum((p * p.detach().flatten()[:1]).sum() for p in self.parameters()) * x.sum()


CASES = {
    "comoving-adamw": ("comoving-adamw", Net, 8, {}),
    "galore": ("galore", Net, 8, {}),
    "muon": ("muon", Net, 8, {}),
    "adamw": ("adamw", Net, 8, {}),
    "left": ("comoving-adamw", Net, 8, {"side": "left"}),
    "tensors": ("tucker-adam", Cube, 0.1, {}),
}


def _options(name):
    recipe, net, rank, options = CASES[name]
    return recipe, net, rank, {"refresh_every": 4} | options


def _counted(rank, names):
    return {name: _counted_of(name) for name in names}


def _counted_of(name):
    """Bytes of state, and what the optimizer sends in four steps after the first four."""
    torch.manual_seed(0)
    recipe, net, rank, options = _options(name)
    model = fully_shard(net(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = comoving.build(recipe, model, 1e-3, rank=rank, **options)
    sent = [0]
    note = Traffic.add
    Traffic.add = lambda self, count: (sent.append(sent.pop() + count), note(self, count))[1]
    for step in range(8):
        if step == 4:
            sent[0] = 0
        model(torch.ones(2, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    Traffic.add = note
    shared = [site for site in optimizer.sites.values() if site.one_core]
    return comoving.state_bytes(optimizer), sent[0], sum(4 * prod(site.core_shape) for site in shared)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_plan_of_sharded_parameters_is_what_they_take(count):
    found = run(count, _counted, [*CASES])
    for name in CASES:
        recipe, net, rank, options = _options(name)
        plan = comoving.plan(net(), recipe, rank, fsdp=count, device="cpu", **options)
        assert plan.state_bytes == max(own[name][0] for own in found), name
        _, sent, cores = found[0][name]
        assert plan.wire["cores"] == cores, name
        assert (cores > 0) is (name in {"left", "tensors"}), name
        # In every step all processes ask one another whether a gradient is bad: four bytes for each group of them.
        planned = 4 * sum(plan.wire[own] for own in ("dealt", "norms", "cores", "refreshes"))
        assert planned == pytest.approx(sent, rel=1e-3, abs=64), name
