"""Stepping in the backward pass of DistributedDataParallel, by averaged gradients."""

from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.utils import clip_grad_norm_

from contract.support import close
from distributed.models import Net, loss_of, optimizer_of, weights_of, wrapped
from distributed.processes import run
from distributed.test_compress_faults import Experts, choices, experts_optimizer, inputs, raised

STEPS = 7
WAYS = {
    "at once": ({}, {}),
    "views": ({"accumulate": 2}, {"gradient_as_bucket_view": True}),
    "cut": ({"accumulate": 2}, {"bucket_cap_mb": 0.001}),
    "clipped": ({"accumulate": 2, "clip": 0.3}, {}),
    "running": ({"clip": 0.3, "norm": "running"}, {"gradient_as_bucket_view": True}),
    "sent once": ({"clip": 0.3}, {}),
}


def passes(name):
    return 2 if name == "sent once" else WAYS[name][0].get("accumulate", 1)


def _trained(rank):
    found = {}
    for name, (way, options) in WAYS.items():
        ddp = wrapped(Net(), **options)
        optimizer = optimizer_of(ddp.module)
        optimizer.step_in_backward(**way, model=ddp)
        norms = []
        for t in range(STEPS):
            for i in range(passes(name)):
                with ddp.no_sync() if name == "sent once" and i == 0 else nullcontext():
                    loss_of(ddp, 10 * t + i, rank).backward()
            if t == 3:
                assert "was taken up inside backward" in raised(clip_grad_norm_, ddp.parameters(), 1.0)
            optimizer.step()
            norms.append(optimizer.gradient_norm or 0.0)
        found[name] = weights_of(ddp.module), torch.tensor(norms)
    return found, _experts(rank), _faults(rank)


def _experts(rank):
    ddp = wrapped(Experts(), find_unused_parameters=True)
    optimizer = experts_optimizer(ddp.module)
    optimizer.step_in_backward(2, model=ddp)
    for t in range(8):
        for i in range(2):
            ddp(inputs(t + i, rank), *choices(t + i, rank), i).backward()
        optimizer.step()
    return weights_of(ddp.module)


def _faults(rank):
    found = {}
    for on_nonfinite in ("raise", "skip"):
        ddp = wrapped(Net())
        optimizer = optimizer_of(ddp.module, on_nonfinite=on_nonfinite)
        optimizer.step_in_backward(clip=1.0, model=ddp)
        before = weights_of(ddp.module)
        loss = loss_of(ddp, 0, rank) * (float("nan") if rank else 1.0)
        found[on_nonfinite] = raised(loss.backward)
        if on_nonfinite == "skip":
            optimizer.step()
        else:
            found["again"] = raised(loss_of(ddp, 1, rank).backward)  # the model goes on
        found[f"{on_nonfinite} stays"] = all(torch.equal(w, before[n]) for n, w in weights_of(ddp.module).items())
    ddp = wrapped(Net())
    optimizer = optimizer_of(ddp.module)
    found["alone"] = raised(optimizer.step_in_backward)
    found["module"] = raised(optimizer.step_in_backward, model=ddp.module)
    found["others"] = raised(optimizer_of(Net()).step_in_backward, model=ddp)
    assert not optimizer.steps_in_backward
    optimizer.step_in_backward(model=ddp)
    found["hook"] = raised(optimizer_of(ddp.module).step_in_backward, model=ddp)
    found["group"] = raised(optimizer.add_param_group, {"params": [("new", nn.Parameter(torch.zeros(3)))]})
    assert len(get_optimizer_state_dict(ddp, optimizer)["state"]) == len(optimizer.sites)
    assert not deepcopy(optimizer).steps_in_backward
    with ddp.no_sync():
        loss_of(ddp, 0, rank).backward()
    found["own"] = raised(optimizer.step)
    optimizer.zero_grad()
    optimizer.step_after_backward()
    loss_of(ddp, 0, rank).backward()
    optimizer.step()
    found["after"] = weights_of(ddp.module)
    return found


def expected(name):
    model = Net()
    optimizer = optimizer_of(model)
    optimizer.step_in_backward(**WAYS[name][0])
    norms = []
    for t in range(STEPS):
        losses = [sum(loss_of(model, 10 * t + i, rank) for rank in range(2)) / 2 for i in range(passes(name))]
        for loss in [sum(losses)] if name == "sent once" else losses:
            loss.backward()
        optimizer.step()
        norms.append(optimizer.gradient_norm or 0.0)
    return weights_of(model), torch.tensor(norms)


def test_gradients_are_taken_up_once_they_are_averaged():
    """As one process with the mean: windows, with and without no_sync(), clipped, with unused ones; and faults."""
    (first, experts, said), (second, others, told) = run(2, _trained)
    for name, (way, _) in WAYS.items():
        weights, norms = expected(name)
        tolerance = 1e-6 if "clip" in way else 1e-9  # norms are added in single precision
        torch.testing.assert_close(first[name][1], norms, rtol=1e-5, atol=1e-6)
        for key, w in weights.items():
            assert torch.equal(first[name][0][key], second[name][0][key]), name
            close(first[name][0][key], w, tolerance)
    model = Experts()
    optimizer = experts_optimizer(model)
    optimizer.step_in_backward(2)
    for t in range(8):
        for i in range(2):
            (sum(model(inputs(t + i, rank), *choices(t + i, rank), i) for rank in range(2)) / 2).backward()
        optimizer.step()
    for key, w in weights_of(model).items():
        assert torch.equal(experts[key], others[key])
        close(experts[key], w, 1e-9)
    for found in (said, told):
        assert "non-finite gradient" in found["raise"] and found["skip"] == "nothing" == found["again"]
        assert found["raise stays"] and found["skip stays"]
        for name, text in {
            "alone": "step_in_backward(model=...)", "module": "wrap the model", "others": "parameters of the optimizer",
            "hook": "hook already", "group": "averages no other", "own": "no_sync()",
        }.items():  # fmt: skip
            assert text in found[name], (name, found[name])
    assert all(torch.equal(w, told["after"][key]) for key, w in said["after"].items())
