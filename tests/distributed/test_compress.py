"""Processes that send cores train as one process that has the mean of their gradients, and no bits of frames differ."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from comoving import LowRankOptimizer
from comoving.cadence import Lazy
from comoving.codecs import Int8
from comoving.distributed import compress
from comoving.finders import Delayed, Exact, Oja, Randomized
from comoving.residual import Discard, Feedback
from comoving.rules import Momentum
from comoving.transport import Carry
from contract.support import COMPLEX, close, feedback_of, randn
from distributed.models import Net, loss_of, optimizer_of, slots_of, weights_of, wrapped
from distributed.processes import run

RECIPES = {
    "default": {},
    "every step": {"refresh_every": 1, "transport": Carry()},
    "both sides": {"side": "both", "finder": Exact(), "transport": Carry()},
    "random": {"finder": Randomized(), "refresh_every": 2},
    "delayed": {"finder": Delayed(), "refresh_every": 2},
    "momentum": {"rule": Momentum(), "finder": Oja()},
    "decays": {"residual": Feedback(decay=0.8, window=4), "cadence": Lazy()},
    "plain feedback": {"residual": Feedback(lazy=False, momentum=False)},
    "discard": {"residual": Discard()},
    "alone": {},
}
STEPS = 8


def projected(optimizer):
    return [p for p, site in optimizer.sites.items() if site.projected]


def windows(t):
    """How many backward passes a step has that are not sent, and how many that are."""
    return (1 if t % 4 == 2 else 0, 2 if t % 4 == 0 else 1)  # buckets are cut anew after the first pass


def _training(rank, names, wire, buckets):
    found = {}
    for name in names:
        ddp = wrapped(Net(), bucket_cap_mb=buckets, gradient_as_bucket_view=name == "random")
        optimizer = optimizer_of(ddp.module, **RECIPES[name])
        if name == "alone":
            optimizer.stacked_entries = 0
        compress(ddp, optimizer, wire)
        for t in range(STEPS):
            quiet, sent = windows(t)
            for i in range(quiet + sent):
                with ddp.no_sync() if i < quiet else nullcontext():
                    loss_of(ddp, 10 * t + i, rank).backward()
            optimizer.step()
            optimizer.zero_grad()
        feedback = [] if name == "discard" else [feedback_of(optimizer, p) for p in projected(optimizer)]
        found[name] = weights_of(ddp.module), slots_of(optimizer), feedback
    return found


def expected(name, count):
    model = Net()
    optimizer = optimizer_of(model, **RECIPES[name])
    if name == "alone":
        optimizer.stacked_entries = 0
    for t in range(STEPS):
        quiet, sent = windows(t)
        for i in range(quiet + sent):
            (sum(loss_of(model, 10 * t + i, rank) for rank in range(count)) / count).backward()
            for p in projected(optimizer) if i >= quiet else ():
                optimizer.absorb(p, p.grad)
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
    feedback = [] if name == "discard" else [feedback_of(optimizer, p) for p in projected(optimizer)]
    return weights_of(model), slots_of(optimizer), feedback


@pytest.mark.parametrize(
    ("count", "buckets"),
    [(2, 25), (3, 0.001), *(pytest.param(*case, marks=pytest.mark.full) for case in ((2, 0.001), (3, 25)))],
)
def test_cores_of_several_processes_step_as_the_mean_of_their_gradients(count, buckets):
    """Weights, frames, moments, and the mean of what each keeps; with windows, and several sent passes a step."""
    results = run(count, _training, list(RECIPES), "same", buckets)
    for name in RECIPES:
        weights, slots, feedback = expected(name, count)
        own = [result[name] for result in results]
        for key, w in weights.items():
            close(own[0][0][key], w, 1e-9)
        for key, x in slots.items():
            if key[1] != "diagnostics":
                assert all(torch.equal(other[1][key], own[0][1][key]) for other in own), key
                close(own[0][1][key], x, 1e-9)
        for i, e in enumerate(feedback):
            close(torch.stack([other[2][i] for other in own]).mean(0), e, 1e-9)
            assert not torch.allclose(own[0][2][i], own[1][2][i])


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_what_rounding_takes_comes_again(wire):
    """The e of each process holds what its cores lost on the way."""
    for found in run(2, _telescoping, wire):
        assert found < 1e-9


def _telescoping(rank, wire):
    """|sum of what was given - sum of what was used - e| of one process, relative, while its frame stands."""
    ddp = wrapped(Net())
    optimizer = optimizer_of(ddp.module, refresh_every=100)
    compress(ddp, optimizer, wire)
    p = next(p for p, site in optimizer.sites.items() if site.projected and site.phase == 0)
    seen, used = torch.zeros_like(p), torch.zeros_like(p)

    def note(g):
        seen.add_(g)

    p.register_hook(note)
    for t in range(6):
        loss_of(ddp, t, rank).backward()
        row = optimizer.engine.row(p)
        (cell, place) = optimizer._driver._open[row].cell, optimizer._driver._open[row].which.rows.index(row)
        newest = cell.open.newest
        used += cell.frame.lift(newest)[place] if cell.rows else cell.frame.lift(newest)
        optimizer.step()
        optimizer.zero_grad()
    return float((seen - used - feedback_of(optimizer, p)).norm() / seen.norm())


@pytest.mark.parametrize("wire", ["int8", *(pytest.param(w, marks=pytest.mark.full) for w in ("same", "bfloat16"))])
def test_frames_are_bitwise_equal_after_200_steps(wire):
    results = run(2, _long, wire)
    for key, x in results[0][0].items():
        if key[1] != "diagnostics":
            assert torch.equal(results[1][0][key], x), key
    assert results[0][1] == results[1][1]
    assert results[0][2] < 0.75 * results[0][3]


def _long(rank, wire):
    ddp = wrapped(Net(torch.float32))
    optimizer = optimizer_of(ddp.module, refresh_every=5, codec=Int8())
    compress(ddp, optimizer, wire)
    losses = []
    for t in range(200):
        loss = loss_of(ddp, t % 20, rank, torch.float32)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: w.sum().item() for n, w in weights_of(ddp.module).items()}
    return slots_of(optimizer), weights, sum(losses[-20:]), sum(losses[:20])


class Waves(nn.Module):
    """Complex matrices, and a dense complex vector."""

    def __init__(self):
        super().__init__()
        for i, shape in enumerate([(8, 10), (8, 10), (6, 10), (10,)]):
            self.register_parameter(f"w{i}", nn.Parameter(randn(shape, COMPLEX, i)))

    def forward(self, t, rank):
        return sum(
            (randn(tuple(p.shape), COMPLEX, 100 * t + 10 * rank + i).conj() * p).sum().abs()
            for i, p in enumerate(self.parameters())
        )


def _complex(rank, wire):
    ddp = wrapped(Waves())
    optimizer = LowRankOptimizer(ddp.module.named_parameters(), 0.01, 2, residual=Feedback(), refresh_every=2, eps=1e-3)
    compress(ddp, optimizer, wire)
    for t in range(6):
        ddp(t, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(ddp.module)


def test_complex_parameters():
    model = Waves()
    optimizer = LowRankOptimizer(model.named_parameters(), 0.01, 2, residual=Feedback(), refresh_every=2, eps=1e-3)
    for t in range(6):
        ((model(t, 0) + model(t, 1)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = weights_of(model)
    for wire, tolerance in (("same", 1e-9), ("bfloat16", 0.1), ("int8", 0.1)):
        first, second = run(2, _complex, wire)
        for name, w in expected.items():
            assert torch.equal(first[name], second[name])
            close(first[name], w, tolerance)


def _short(rank):
    ddp = wrapped(Net(torch.bfloat16))
    optimizer = optimizer_of(ddp.module, rounding="stochastic")
    compress(ddp, optimizer, "int8")
    for t in range(6):
        loss_of(ddp, t, rank, torch.bfloat16).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(ddp.module), slots_of(optimizer)


def test_weights_that_are_rounded_stochastically_stay_equal():
    first, second = run(2, _short)
    assert all(torch.equal(w, second[0][name]) for name, w in first[0].items())
    assert all(torch.equal(x, second[1][key]) for key, x in first[1].items() if key[1] != "diagnostics")
    assert not torch.equal(first[0]["layers.1.weight"], weights_of(Net(torch.bfloat16))["layers.1.weight"])


# --------------------------------------------------------------------------------------------------------------- bytes


def _counted(rank, wire):
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
    ddp = wrapped(model)
    optimizer = LowRankOptimizer(model.parameters(), rank=16, refresh_every=10, residual=Feedback(), select="shape")
    sent = compress(ddp, optimizer, wire)
    before = 0
    for t in range(40):
        before = sent.bytes if t == 20 else before
        ddp(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sent.bytes - before, sent.cores.bytes, sent.dense.bytes


@pytest.mark.parametrize(
    ("wire", "share", "of_cores"), [("same", 1 / 6, 1.01), ("bfloat16", 1 / 12, 0.51), ("int8", 1 / 20, 0.27)]
)
def test_an_eighth_of_the_bytes_and_less(wire, share, of_cores):
    """Of float32 gradients at rank 1/8, a refresh every 10 steps included; int8 has steps beside its codes."""
    plain, cores = 20 * 4 * 128 * 128 * 4, 40 * 4 * 16 * 128 * 4
    for total, own, dense in run(2, _counted, wire):
        assert total <= share * plain
        assert own <= of_cores * cores
        assert dense == 0
