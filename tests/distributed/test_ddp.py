"""Under plain DistributedDataParallel every process makes the same steps, bit for bit, over refreshes."""

import torch

from comoving.codecs import Int8
from comoving.finders import Exact, Nystroem, Randomized
from comoving.residual import Discard, Fira
from comoving.rules import SOAP, Muon
from comoving.transport import Carry
from distributed.models import Net, loss_of, optimizer_of, weights_of, wrapped
from distributed.processes import run

RECIPES = {
    "feedback": {"codec": Int8()},
    "carry": {"transport": Carry(), "finder": Exact(), "side": "both"},
    "random": {"finder": Randomized(), "residual": Discard(), "refresh_every": 1},
    "nystroem": {"finder": Nystroem(), "residual": Fira()},
    "soap": {"rule": SOAP(), "residual": Discard()},
    "muon": {"rule": Muon(), "rank": 1.0, "residual": Discard()},
}


def _trained(rank, dtype):
    found = {}
    for name, options in RECIPES.items():
        ddp = wrapped(Net(dtype))
        optimizer = optimizer_of(ddp.module, **options)
        for t in range(7):
            loss_of(ddp, t, rank, dtype).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = {
            (site.name, slot): x
            for p, site in optimizer.sites.items()
            for slot, x in optimizer.state[p].items()
            if isinstance(x, torch.Tensor)
        }
        found[name] = weights_of(ddp.module) | state
    return found


def test_weights_and_states_are_bitwise_equal():
    first, second = run(2, _trained, torch.float32)
    for name in RECIPES:
        assert first[name].keys() == second[name].keys()
        for key, x in first[name].items():
            assert torch.equal(x, second[name][key]), (name, key)
    assert not torch.equal(first["feedback"]["layers.0.weight"], weights_of(Net(torch.float32))["layers.0.weight"])
