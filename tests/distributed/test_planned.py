"""What the planner says of several ranks is what they have and send."""

from itertools import pairwise

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


OPTIONS = {"refresh_every": 4}


def _counted(rank, recipe):
    """Bytes of state, and what the optimizer sends in four steps after the first four."""
    torch.manual_seed(0)
    model = fully_shard(Net(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = comoving.build(recipe, model, 1e-3, rank=8, **OPTIONS)
    sent = [0]
    note = Traffic.add
    Traffic.add = lambda self, count: (sent.append(sent.pop() + count), note(self, count))[1]
    for step in range(8):
        if step == 4:
            sent[0] = 0
        model(torch.ones(2, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return comoving.state_bytes(optimizer), sent[0]


@pytest.mark.parametrize("recipe", ["comoving", "galore", "muon", "adamw"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_plan_of_sharded_parameters_is_what_they_take(recipe, count):
    plan = comoving.plan(Net(), recipe, 8, fsdp=count, device="cpu", **OPTIONS)
    found = run(count, _counted, recipe)
    assert plan.state_bytes == max(size for size, _ in found)
    own = ("dealt", "norms", "refreshes")
    # In every step all processes ask one another whether a gradient is bad: four bytes for each group of them.
    assert 4 * sum(plan.wire[name] for name in own) == pytest.approx(found[0][1], rel=1e-3, abs=64)
