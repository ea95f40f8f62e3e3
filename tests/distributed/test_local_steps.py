"""Local steps: DiLoCo as published at rank 1.0, the communication hook at one inner step, and its own in between."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import comoving
from comoving import LowRankOptimizer
from comoving.distributed import LocalSteps, compress
from comoving.residual import Feedback
from comoving.rules import Momentum
from contract.support import COMPLEX, close, feedback_of, randn
from distributed.models import Net, loss_of, raised, slots_of, weights_of, wrapped
from distributed.processes import run

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
EVERY, ROUNDS = 3, 5


def train(model, local, rank, begin, end):
    for t in range(begin, end):
        loss_of(model, t, rank, next(model.parameters()).dtype).backward()
        local.step()
        local.zero_grad()


def inner_of(model, name="torch"):
    if name == "torch":
        return torch.optim.AdamW(model.parameters(), lr=0.01)
    return comoving.AdamW(model.named_parameters(), lr=0.01, rank=0.25)


def projected(optimizer):
    return {site.name: p for p, site in optimizer.sites.items() if site.projected}


# ---------------------------------------------------------------------------------------------------- what is computed


def matrices():
    """Net without what is dense: compress() leaves that to AdamW."""
    model = Net()
    for layer in model.layers:
        layer.bias = None
    return model


def _one_inner_step(rank):
    local_model, hooked = matrices(), wrapped(matrices())
    options = dict(momentum=0.9, wire="same", refresh_every=2, residual=Feedback())
    local = LocalSteps(local_model, torch.optim.SGD(local_model.parameters(), lr=1.0), every=1, **options)
    optimizer = LowRankOptimizer(
        comoving.param_groups(hooked.module, 0.25), 0.7, betas=(0.9, 0.999), weight_decay=0.0, residual=Feedback(),
        rule=Momentum(nesterov=True), scale=10.0, refresh_every=2,
    )  # fmt: skip
    sent = compress(hooked, optimizer, "same")
    train(local_model, local, rank, 0, 8)
    for t in range(8):
        loss_of(hooked, t, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert local.sent.frames.bytes == sent.frames.bytes > 0
    other = {site.name: p for p, site in optimizer.sites.items()}
    for name, start in projected(local.outer).items():
        close(start, other[name].detach(), 1e-9)
        close(feedback_of(local.outer, start), feedback_of(optimizer, other[name]), 1e-9)
    return len(other)


def test_one_inner_step_is_the_hook():
    assert run(2, _one_inner_step) == [5, 5]


def reference(count, rank, rounds=ROUNDS):
    """Algorithm 1 of the paper, workers one after the other; projected parameters by one optimizer of the mean."""
    start, workers = Net(), [Net() for _ in range(count)]
    inner = [inner_of(model) for model in workers]
    outer = LowRankOptimizer(
        comoving.param_groups(start, rank), 0.7, betas=(0.9, 0.999), weight_decay=0.0, residual=Feedback(decay=0.7),
        rule=Momentum(nesterov=True), scale=10.0, refresh_every=2,
    )  # fmt: skip
    cores, buffers = projected(outer), {name: torch.zeros_like(p) for name, p in start.named_parameters()}
    for r in range(rounds):
        for i, model in enumerate(workers):
            for t in range(EVERY * r, EVERY * (r + 1)):
                loss_of(model, t, i).backward()
                inner[i].step()
                inner[i].zero_grad()
        with torch.no_grad():
            for (name, p), *own in zip(start.named_parameters(), *(m.parameters() for m in workers), strict=True):
                delta = sum(p - w for w in own) / count
                if name in cores:
                    p.grad = delta
                    continue
                buffers[name] = 0.9 * buffers[name] + delta
                p.sub_(0.7 * (delta + 0.9 * buffers[name]))
            outer.step()
            outer.zero_grad()
            for model in workers:
                model.load_state_dict(start.state_dict())
    return weights_of(start), {name: feedback_of(outer, p) for name, p in cores.items()}


def _rounds(rank, share, wire, inner, dtype, steps):
    model = Net(dtype)
    momentum = None if share == 1.0 else 0.9
    local = LocalSteps(model, inner_of(model, inner), EVERY, 0.7, momentum, share, wire=wire, refresh_every=2)
    train(model, local, rank, 0, steps)
    feedback = {name: feedback_of(local.outer, p) for name, p in projected(local.outer).items()}
    return weights_of(model), feedback, slots_of(local.outer) if feedback else {}


@pytest.mark.parametrize(("share", "count"), [(1.0, 3), (0.25, 2)], ids=["plain", "cores"])
def test_rounds_are_those_of_simulated_workers(share, count):
    """As published at rank 1.0; else as one process that has the mean, whose feedback is the mean of all."""
    results = run(count, _rounds, share, "same", "torch", torch.float64, EVERY * ROUNDS)
    weights, feedback = reference(count, share)
    assert bool(feedback) == (share < 1)
    for name, w in weights.items():
        close(results[0][0][name], w, 1e-9)
    for name, e in feedback.items():
        close(sum(own[1][name] for own in results) / count, e, 1e-9)
        assert not torch.allclose(results[0][1][name], results[1][1][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_weights_and_frames_are_bitwise_equal_after_a_round(wire, dtype):
    first, second = run(2, _rounds, 0.25, wire, "comoving-adamw", dtype, 8 * EVERY)
    for name, w in first[0].items():
        assert torch.equal(w, second[0][name]), name
        assert not torch.equal(w, weights_of(Net(dtype))[name])
    assert all(torch.equal(x, second[2][key]) for key, x in first[2].items() if key[1] != "diagnostics")


class Experts(nn.Module):
    """Experts in one tensor, a complex matrix, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(randn((4, 12, 8)))
        self.waves = nn.Parameter(randn((12, 12), COMPLEX))
        self.frozen = nn.Parameter(randn((12, 12)), requires_grad=False)

    def forward(self, x, chosen):
        y = (x.to(COMPLEX) @ self.waves).real @ self.frozen
        return sum((y @ self.experts[i]).square().mean() for i in chosen)


def _experts(rank):
    model = Experts()
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    local = LocalSteps(model, inner, 2, experts="experts", wire="int8")
    before = weights_of(model)
    for t in range(9):
        model(randn((5, 12), seed=10 * t + rank), [[0], [0, 2]][rank] if t % 4 < 2 else [1]).backward()
        local.step()
        local.zero_grad()
    local.average()
    local.average()
    return before, weights_of(model), local.sent.dense.bytes, comoving.explain(local.outer)


def test_experts_that_some_processes_do_not_use_and_complex_and_frozen_parameters():
    (before, first, dense, table), (_, second, *_) = run(2, _experts)
    assert all(torch.equal(w, second[name]) for name, w in first.items())
    moved = [not torch.equal(a, b) for a, b in zip(before["experts"], first["experts"], strict=True)]
    assert moved == [True, True, True, False]
    assert torch.equal(before["frozen"], first["frozen"]) and not torch.equal(before["waves"], first["waves"])
    assert dense == 0
    assert "frozen" not in str(table)


# --------------------------------------------------------------------------------------------------- checkpoints, bytes


def _resumed(rank, inner):
    model = Net()
    local = LocalSteps(model, inner_of(model, inner), EVERY, wire="int8", refresh_every=2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(local.inner, 0.9)
    train(model, local, rank, 0, 7)
    schedule.step()
    saved = pickle.loads(pickle.dumps((model.state_dict(), local.state_dict())))
    assert saved[1]["taken"] == 1
    again = Net()
    other = LocalSteps(again, inner_of(again, inner), EVERY, wire="int8", refresh_every=2)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert other.inner.param_groups[0]["lr"] == pytest.approx(0.009)
    train(model, local, rank, 7, 16)
    train(again, other, rank, 7, 16)
    between = weights_of(model)
    assert all(torch.equal(w, between[name]) for name, w in weights_of(again).items())
    local.average()
    other.average()
    assert all(torch.equal(w, weights_of(model)[name]) for name, w in weights_of(again).items())
    return between, weights_of(model)


@pytest.mark.parametrize("inner", ["torch", "comoving-adamw"])
def test_resumes_bitwise_in_the_middle_of_a_round(inner):
    first, second = run(2, _resumed, inner)
    assert not torch.equal(first[0]["layers.1.weight"], second[0]["layers.1.weight"])
    assert all(torch.equal(w, second[1][name]) for name, w in first[1].items())


def _counted(rank):
    found = {}
    for share, wire in ((1.0, "same"), (1 / 8, "same"), (1 / 8, "bfloat16"), (1 / 8, "int8")):
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
        for layer in model:
            nn.init.eye_(layer.weight)
        local = LocalSteps(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, rank=share, wire=wire)
        for t in range(16):
            if t == 8:
                before = local.sent.frames.bytes
            model(torch.randn(8, 128)).square().mean().backward()
            local.step()
            local.zero_grad()
        found[share, wire] = local.sent.dense.bytes, local.sent.cores.bytes, local.sent.frames.bytes - before
    return found


def test_bytes_are_those_of_cores_once_a_round():
    """8 rounds of 4 matrices, each with a new frame in 4 of them; a number with cores, and one before, tell of NaNs."""
    rounds, whole = 8, 4 * 128 * 128 * 4
    for found in run(2, _counted):
        assert found[1.0, "same"] == (rounds * whole, rounds * 4, 0)
        assert found[1 / 8, "same"][:2] == (0, rounds * (whole // 8 + 4 + 4))
        assert found[1 / 8, "bfloat16"][:2] == (0, rounds * (whole // 16 + 2 + 4))
        assert rounds * whole // 32 < found[1 / 8, "int8"][1] < 1.1 * rounds * whole // 32
        assert found[1 / 8, "same"][2] == 2 * whole // 8 + 4 * 4  # of the last 4 rounds; and a figure of each
        assert found[1 / 8, "bfloat16"][2] == pytest.approx(2 * whole // 16, abs=4 * 4)


def _example(rank):
    sys.path.insert(0, str(EXAMPLES))
    import local_steps  # noqa: PLC0415

    return local_steps.train(steps=200), local_steps.train(steps=200, rank=1.0)


def test_the_example_trains_on_a_fraction_of_the_bytes():
    """Plain DiLoCo sends 1/20 of the gradients of all steps; cores are a fraction of that, for the same loss."""
    for cores, plain in run(2, _example):
        gradients = 200 * 4 * (32 * 64 + 64 * 64 + 64 * 8 + 64 + 64 + 8)
        assert plain[1] == gradients // 20 + 10 * 4
        assert cores[1] < plain[1] / 2
        assert cores[0] < 1.1 * plain[0]


# ------------------------------------------------------------------------------------------------- faults and refusals


def _spoiled(rank, on_nonfinite, share, layer):
    model = Net()
    local = LocalSteps(model, torch.optim.SGD(model.parameters(), lr=0.1), EVERY, rank=share, on_nonfinite=on_nonfinite)
    train(model, local, rank, 0, 2 * EVERY - 1)
    start, state = weights_of(model), copy.deepcopy(local.state_dict())
    if rank == 1:
        with torch.no_grad():
            model.get_parameter(layer)[0] = torch.inf
    said = raised(local.step)  # without gradients
    after = local.state_dict()
    stays = all(torch.equal(x, after["start"][name]) for name, x in state["start"].items())
    back = {name: bool(torch.equal(w, state["start"][name])) for name, w in weights_of(model).items()}
    kept = all(torch.equal(w, start[name]) for name, w in weights_of(model).items() if name != layer)
    if on_nonfinite == "skip":
        train(model, local, rank, 6, 9)
    return said, stays, all(back.values()), kept, local.skipped_rounds, weights_of(model)


@pytest.mark.parametrize(
    ("share", "layer"), [(0.25, "layers.2.weight"), (0.25, "layers.2.bias"), (1.0, "layers.0.weight")]
)
def test_bad_weights_on_one_process_end_the_round_on_all(share, layer):
    first, second = run(2, _both, share, layer)
    for key in ("skip", "raise"):
        assert torch.equal(first[key][5]["layers.1.weight"], second[key][5]["layers.1.weight"]) == (key == "skip")
    for own, names in ((first, "weights of another process"), (second, f"{layer} of this process")):
        said, stays, _, kept, skipped, _ = own["raise"]
        assert f"RuntimeError: non-finite numbers at the end of a round in {names}" in said
        assert stays and kept and not skipped
        said, stays, back, _, skipped, weights = own["skip"]
        assert said == "nothing" and stays and back and skipped == 1
        assert all(w.isfinite().all() for w in weights.values())


def _both(rank, share, layer):
    return {key: _spoiled(rank, key, share, layer) for key in ("skip", "raise")}


def _refused(rank):
    found = {}
    model = Net()
    inner = inner_of(model)
    found["ddp"] = raised(LocalSteps, wrapped(model), inner)
    found["foreign"] = raised(LocalSteps, Net(), inner)
    sharded, coded = nn.Sequential(nn.Linear(12, 16)), Net()
    fully_shard(sharded)
    found["sharded"] = raised(LocalSteps, sharded, inner_of(sharded))
    comoving.weights.quantize(coded)
    found["codes"] = raised(LocalSteps, coded, inner_of(coded, "comoving-adamw"))
    found["rank 0"] = raised(LocalSteps, model, inner, rank=0)
    found["nothing"] = raised(LocalSteps, model.requires_grad_(False), inner)
    model.requires_grad_(True)
    found["option"] = raised(LocalSteps, model, inner, weight_decay=0.1)
    found["unknown"] = raised(LocalSteps, model, inner, refresh=3)
    found["momentum"] = raised(LocalSteps, model, inner, momentum=1.0)
    found["finder"] = raised(LocalSteps, model, inner, finder=comoving.finders.Nystroem())
    found["every"] = raised(LocalSteps, model, inner, every=3 + rank)
    found["rank"] = raised(LocalSteps, model, inner, rank=2 + rank)
    found["wire"] = raised(LocalSteps, model, inner, wire=["same", "int8"][rank])
    with torch.no_grad():
        model.layers[3].weight[0, 0] += rank
    found["weights"] = raised(LocalSteps, model, inner)
    again = Net()
    local = LocalSteps(again, inner_of(again), EVERY)
    other = nn.Sequential(nn.Linear(8, 8))
    saved = LocalSteps(other, inner_of(other)).state_dict()
    found["state"] = raised(local.load_state_dict, saved)
    found["no state"] = raised(local.load_state_dict, {})
    saved = local.state_dict()
    saved["start"]["layers.0.weight"][0, 0] += rank
    saved["taken"] = 1
    local.load_state_dict(saved)
    found["loaded"] = raised(local.average)
    return found


def test_refusals_say_what_to_do():
    for found in run(2, _refused):
        for name, text in {
            "ddp": "ValueError: DistributedDataParallel averages gradients",
            "foreign": "ValueError: 10 parameters of the inner optimizer are not the model's",
            "sharded": "ValueError: 0.weight, 0.bias: LocalSteps needs whole parameters",
            "codes": "layers.4.weight: LocalSteps takes no weights in codes",
            "rank 0": "rank",
            "nothing": "ValueError: Net has no trainable parameters",
            "option": "TypeError: weight_decay: the outer step has",
            "unknown": "TypeError: unknown hyper-parameters ['refresh']",
            "momentum": "ValueError: momentum must lie in [0, 1), got 1.0",
            "finder": "ValueError: LocalSteps is refused for parameter group 0: finder",
            "every": "RuntimeError: processes disagree about every: 3 on rank 0 of the group, 4 on rank 1",
            "rank": "RuntimeError: processes disagree about",
            "wire": "RuntimeError: processes disagree about wire",
            "weights": "RuntimeError: processes disagree about the weights of layers.3.weight",
            "state": "ValueError: layers.0.weight is not in both",
            "no state": "ValueError: layers.0.weight is not in both",
            "loaded": "RuntimeError: processes disagree about the weights of layers.0.weight",
        }.items():
            assert text in found[name], (name, found[name])
