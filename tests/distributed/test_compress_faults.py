"""What goes wrong on one process is seen by all; what cannot be compressed is refused; copies and checkpoints."""

import copy
import pickle
from unittest.mock import patch

import pytest
import torch
from torch import nn

from comoving import LowRankOptimizer
from comoving.distributed import agree, compress
from comoving.drivers.replicas import Open
from comoving.finders import Nystroem, Power
from comoving.frames import Blocks
from comoving.precondition import Factored
from comoving.ranks import Tolerance
from comoving.residual import Feedback, Fira
from comoving.transport import Carry
from contract.support import close
from distributed.models import Net, loss_of, optimizer_of, raised, slots_of, weights_of, wrapped
from distributed.processes import run


def frozen(optimizer):
    return {
        (site.name, name): x.clone() if isinstance(x, torch.Tensor) else x
        for p, site in optimizer.sites.items()
        for name, x in optimizer.state.get(p, {}).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(x, b[key]) if isinstance(x, torch.Tensor) else x == b[key] for key, x in a.items()
    )


# ---------------------------------------------------------------------------------------------------------- bad numbers


def _spoiled(rank, skip, wire, dense, first):
    ddp = wrapped(Net(), bucket_cap_mb=0.001)
    optimizer = optimizer_of(ddp.module, on_nonfinite="skip" if skip else "raise")
    compress(ddp, optimizer, wire)
    for t in range(0 if first else 4):
        loss_of(ddp, t, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, state = weights_of(ddp.module), frozen(optimizer)
    layer = ddp.module.layers[2]
    spoil = (layer.bias if dense else layer.weight).register_hook(lambda g: g * torch.nan if rank == 1 else g)
    loss_of(ddp, 4, rank).backward()
    spoil.remove()
    said = raised(optimizer.step)
    stays = same(weights, weights_of(ddp.module)) and (same(state, frozen(optimizer)) or not skip)
    optimizer.zero_grad()
    stays = stays and same(state, frozen(optimizer))
    loss_of(ddp, 5, rank).backward()
    optimizer.step()
    return said, stays, optimizer.skipped_steps, weights_of(ddp.module)


@pytest.mark.parametrize("wire", ["same", "bfloat16", "int8"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_bad_gradient_on_one_process_skips_the_step_on_all(wire, dense):
    first, second = run(2, _spoiled, True, wire, dense, wire == "same")
    for said, stays, skipped, _ in (first, second):
        assert (said, stays, skipped) == ("nothing", True, 1)
    assert same(first[3], second[3])
    assert all(w.isfinite().all() for w in first[3].values())


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_bad_gradient_on_one_process_raises_on_all(wire, dense):
    first, second = run(2, _spoiled, False, wire, dense, False)
    assert "non-finite gradient in" in first[0]
    assert ("layers.2.bias" if dense else "another process") in first[0]
    assert ("layers.2.bias" if dense else "layers.2.weight") in second[0]
    for _, stays, skipped, _ in (first, second):
        assert stays and skipped == 0
    assert same(first[3], second[3])


# ------------------------------------------------------------------------------------------------- unused parameters


class Experts(nn.Module):
    """Four experts in one tensor, of which each process uses some, and layers that only one uses, or no second pass."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts = nn.Parameter(torch.randn((4, 12, 8), generator=generator, dtype=torch.float64))
        self.used = nn.Parameter(torch.randn((12, 12), generator=generator, dtype=torch.float64))
        self.rarely = nn.Parameter(torch.randn((12, 12), generator=generator, dtype=torch.float64))
        self.first = nn.Parameter(torch.randn((12, 12), generator=generator, dtype=torch.float64))
        self.never = nn.Parameter(torch.randn((12, 12), generator=generator, dtype=torch.float64))

    def forward(self, x, chosen, rarely, second=0):
        y = x @ self.used if second else x @ self.used @ self.first
        y = y @ self.rarely if rarely else y
        return sum((y @ self.experts[i]).square().mean() for i in chosen)


def choices(t, rank):
    return [[0], [0, 2]][rank] if t % 3 else [[1], [2]][rank], t % 2 == 1 and rank == 1


def passes(t):
    return 2 if t % 3 == 1 else 1


APART = Open.apart


def _experts(rank):
    ddp = wrapped(Experts(), find_unused_parameters=True)
    optimizer = experts_optimizer(ddp.module)
    compress(ddp, optimizer, "same")
    cut = []
    with patch.object(Open, "apart", lambda own: cut.append(own.which.stacked) or APART(own)):
        for t in range(8):
            for i in range(passes(t)):
                ddp(inputs(t + i, rank), *choices(t + i, rank), i).backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights_of(ddp.module), slots_of(optimizer), sum(cut)


def inputs(t, rank):
    return torch.randn((5, 12), generator=torch.Generator().manual_seed(10 * t + rank), dtype=torch.float64)


def experts_optimizer(model):
    groups = [
        {"params": [("experts", model.experts)], "frame": Blocks()},
        {"params": [(name, p) for name, p in model.named_parameters() if name != "experts"]},
    ]
    return LowRankOptimizer(groups, 0.01, 3, residual=Feedback(), refresh_every=2, eps=1e-3, finder=Power())


def test_experts_and_layers_that_one_process_leaves_out():
    model = Experts()
    optimizer = experts_optimizer(model)
    for t in range(8):
        for i in range(passes(t)):
            (sum(model(inputs(t + i, rank), *choices(t + i, rank), i) for rank in range(2)) / 2).backward()
            for p in model.parameters():
                if p.grad is not None:
                    optimizer.absorb(p, p.grad)
                    p.grad = None
        optimizer.step()
        optimizer.zero_grad()
    first, second = run(2, _experts)
    assert first[2] > 0  # batches had to be taken apart, where a second pass left some of their rows out
    assert same(first[0], second[0])
    for name, w in weights_of(model).items():
        close(first[0][name], w, 1e-9)
    assert {key for key in first[1] if key[0] == "never"} == set()
    for key, x in first[1].items():
        assert key[1].endswith("diagnostics") or torch.equal(second[1][key], x), key


# -------------------------------------------------------------------------------------------------------- checkpoints


def _saved(rank):
    ddp = wrapped(Net())
    optimizer = optimizer_of(ddp.module)
    compress(ddp, optimizer, "bfloat16")
    found = {}
    for t in range(5):
        loss_of(ddp, t, rank).backward()
        if t == 4:
            found["state_dict"] = raised(optimizer.state_dict)
            found["copy"] = raised(copy.deepcopy, optimizer)
            found["load"] = raised(optimizer.load_state_dict, {})
            found["norm"] = raised(nn.utils.clip_grad_norm_, ddp.parameters(), 1.0)
        optimizer.step()
        found["left"] = [p for p, site in optimizer.sites.items() if site.projected and p.grad is not None]
        optimizer.zero_grad()
    packed = pickle.loads(pickle.dumps(optimizer.state_dict()))
    clone = copy.deepcopy(optimizer)
    found["clone"] = clone._driver is None and clone.engine.comm.alone and same(frozen(clone), frozen(optimizer))
    found["options"] = [raised(call) for call in (optimizer.step_in_backward, optimizer.capture)]
    weights = copy.deepcopy(ddp.module.state_dict())

    again = wrapped(Net())
    again.module.load_state_dict(weights)
    other = optimizer_of(again.module)
    compress(again, other, "bfloat16")
    other.load_state_dict(packed)
    found["loaded"] = same(frozen(optimizer), frozen(other))
    for model, own in ((ddp, optimizer), (again, other)):
        for t in range(5, 10):
            loss_of(model, t, rank).backward()
            own.step()
            own.zero_grad()
    found["resumed"] = same(weights_of(ddp.module), weights_of(again.module)) and same(frozen(optimizer), frozen(other))
    return found


def test_a_state_that_each_process_saves_goes_on_as_it_was():
    for found in run(2, _saved):
        assert found["loaded"] and found["resumed"] and found["clone"]
        assert found["left"] == []
        for name in ("state_dict", "copy", "load"):
            assert "call step() first" in found[name], name
        assert "compress() was called" in found["norm"] and "as its core alone" in found["norm"]
        assert all("compress()" in said for said in found["options"])


def _not_sent(rank):
    ddp = wrapped(Net())
    optimizer = optimizer_of(ddp.module)
    compress(ddp, optimizer)
    with ddp.no_sync():
        loss_of(ddp, 0, rank).backward()
    said = raised(optimizer.step)
    optimizer.zero_grad()
    loss_of(ddp, 1, rank).backward()
    optimizer.zero_grad()
    before = weights_of(ddp.module)
    optimizer.step()
    return said, same(before, weights_of(ddp.module)) and not optimizer.state


def test_gradients_that_were_not_sent_are_refused_and_those_that_are_dropped_leave_nothing():
    for said, dropped in run(2, _not_sent):
        assert "no_sync()" in said and dropped


# ----------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "finder": ({"finder": Nystroem()}, "finder Nystroem"),
    "ranks": ({"ranks": Tolerance(step=1), "transport": Carry()}, "ranks Tolerance"),
    "precondition": ({"precondition": Factored()}, "precondition Factored"),
    "residual": ({"residual": Fira()}, "residual Fira"),
    "dense": ({"rank": 1.0}, "has none"),
}


def _refused(rank):
    found = {}
    for name, (options, _) in REFUSED.items():
        model = Net()
        optimizer = optimizer_of(model, **options)
        before = [group["residual"] for group in optimizer.param_groups]
        found[name] = raised(compress, wrapped(model), optimizer)
        assert [group["residual"] for group in optimizer.param_groups] == before
    model = Net()
    found["module"] = raised(compress, model, optimizer_of(model))
    found["torch"] = raised(compress, wrapped(model), torch.optim.AdamW(model.parameters()))
    found["wire"] = raised(compress, wrapped(model), optimizer_of(model), "float8")
    found["others"] = raised(compress, wrapped(model), optimizer_of(Net()))
    optimizer = optimizer_of(model)
    ddp = wrapped(model)
    loss_of(ddp, 0, rank).backward()
    found["gradient"] = raised(compress, ddp, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    found["state"] = raised(compress, ddp, optimizer)
    optimizer = optimizer_of(model)
    compress(ddp, optimizer)
    found["again"] = raised(compress, ddp, optimizer)
    found["hooked"] = raised(compress, ddp, optimizer_of(model))
    found["group"] = raised(optimizer.add_param_group, {"params": [("new", nn.Parameter(torch.zeros(3)))]})
    return found


def test_what_cannot_be_compressed_is_refused_with_the_reason():
    expected = {name: text for name, (_, text) in REFUSED.items()} | {
        "module": "wrap the model", "torch": "optimizer of comoving", "wire": "int8",
        "others": "parameters of the optimizer",
        "gradient": "has a gradient already", "state": "own=True", "again": "compress()", "hooked": "hook already",
        "group": "add_param_group() is refused",
    }  # fmt: skip
    for found in run(2, _refused):
        for name, text in expected.items():
            assert text in found[name], (name, found[name])


def _in_backward(rank):
    ddp = wrapped(Net())
    optimizer = optimizer_of(ddp.module)
    optimizer.step_in_backward()
    return raised(compress, ddp, optimizer)


def test_stepping_in_the_backward_pass_is_refused():
    assert "step_after_backward()" in run(1, _in_backward)[0]


DIFFERENT = {
    "rank": ({"rank": 4}, "ranks of layers.0.weight"),
    "lr": ({"lr": 0.02}, "lr of layers.0.weight"),
    "seed": ({"seed": 1}, "seed"),
    "finder": ({"finder": Power(inertia=0.0)}, "finder of layers.0.weight"),
}


def _disagreeing(rank):
    found = {}
    for name, (options, _) in DIFFERENT.items():
        ddp = wrapped(Net())
        optimizer = optimizer_of(ddp.module, **(options if rank else {}))
        compress(ddp, optimizer)
        before = weights_of(ddp.module)
        found[name] = raised(lambda ddp=ddp: loss_of(ddp, 0, rank).backward())
        assert same(before, weights_of(ddp.module)) and not optimizer.state
    model = nn.Linear(8 + rank, 9)
    optimizer = LowRankOptimizer(model.named_parameters(), rank=2, select="shape")
    found["shape"] = raised(agree, optimizer)
    return found


def test_processes_that_disagree_are_told_what_about():
    first, second = run(2, _disagreeing)
    expected = {name: text for name, (_, text) in DIFFERENT.items()} | {"shape": "shape of weight"}
    for name, text in expected.items():
        for found in (first, second):
            assert "RuntimeError: " in found[name] and f"disagree about {text}" in found[name], found[name]
            assert "on rank 0" in found[name] and "on rank 1" in found[name]
