"""Cautious weight decay (arXiv 2510.12402): w <- w - lr (u + lambda [Re(conj(u) w) >= 0] w), whatever makes u."""

import pytest
import torch

import comoving
from comoving import LowRankOptimizer
from comoving.codecs import Int8
from comoving.decay import decay_agreeing
from comoving.finders import Exact
from comoving.residual import Channel, Feedback, Fira, MomentumBuffer, Sign, Sparse
from comoving.rules import Columns, Muon
from comoving.weights import quantize
from contract.support import COMPLEX, REAL, Holder, close, randn

STEPS, LR, DECAY = 12, 0.05, 3.0
WAYS = {
    "whole": {"rank": 1.0, "rule": Muon()},
    "feedback": {"rank": 3, "residual": Feedback(), "refresh_every": 3},
    "fira": {"rank": 3, "residual": Fira(), "refresh_every": 3},
    "channel": {"rank": 3, "residual": Channel(), "refresh_every": 3},
    "sparse": {"rank": 3, "residual": Sparse(), "refresh_every": 3, "finder": Exact()},
    "sign": {"rank": 3, "residual": Sign(), "refresh_every": 3},
    "buffer": {"rank": 3, "residual": MomentumBuffer(), "rule": Columns(), "codec": Int8()},
}


def built(shapes, dtype, **options):
    model = Holder(*(randn(shape, dtype, i) for i, shape in enumerate(shapes)))
    return [*model.parameters()], LowRankOptimizer(model.named_parameters(), LR, **options)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
@pytest.mark.parametrize("way", WAYS)
def test_what_agrees_decays_and_nothing_else(way, dtype):
    """Beside a twin without decay, put where ours are before each step; two alike matrices, another, and a vector."""
    shapes = [(6, 8), (6, 8), (9, 5), (7,)]
    params, optimizer = built(shapes, dtype, weight_decay=DECAY, decay="cautious", **WAYS[way])
    twins, other = built(shapes, dtype, weight_decay=0.0, **WAYS[way])
    decayed = 0
    for t in range(STEPS):
        before = [p.detach().clone() for p in params]
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = randn(shapes[i], dtype, 100 * i + t)
            q.grad = p.grad.clone()
            q.data.copy_(p.data)
        optimizer.step()
        other.step()
        for p, q, old in zip(params, twins, before, strict=True):
            agrees = ((old - q.detach()).conj() * old).real >= 0
            close(p.detach(), q.detach() - LR * DECAY * old * agrees, 1e-12)
            decayed += int(agrees.sum())
    entries = STEPS * sum(p.numel() for p in params)
    assert 0.3 * entries < decayed < 0.7 * entries


def test_adamw_written_out():
    w, m, v = torch.tensor([2.0, -1.0, 0.5, -3.0], dtype=REAL), torch.zeros(4, dtype=REAL), torch.zeros(4, dtype=REAL)
    (p,), optimizer = built([(4,)], REAL, weight_decay=DECAY, decay="cautious")
    p.data.copy_(w)
    for t in range(1, STEPS):
        p.grad = g = randn((4,), REAL, t)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w - LR * (u + DECAY * torch.where(u * w >= 0, w, 0))
        close(p.detach(), w)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_signs_decide_at_any_size(size):
    old = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]) * size
    new = old - torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0]) * size
    expected = new - 0.1 * old * torch.tensor([1, 0, 0, 1, 1])
    torch.testing.assert_close(decay_agreeing(new.clone(), old, 0.1), expected, rtol=1e-6, atol=0)


def test_codes_and_stochastic_rounding_are_written_as_ever():
    """Coded and bfloat16 weights are where the float32 ones are, to rounding; decay of the rest would show."""
    start = randn((16, 32), torch.float32, 1)
    for kind in ("codes", "bfloat16"):
        model = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False))
        model[0].weight.data.copy_(start)
        if kind == "codes":
            quantize(model, Int8())
        else:
            model.bfloat16()
        optimizer = comoving.build("muon", model, 0.1, weight_decay=2.0, decay="cautious", rounding="stochastic")
        twin = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False))
        twin[0].weight.data.copy_(start)
        other = comoving.build("muon", twin, 0.1, weight_decay=2.0, decay="cautious")
        (p,), (q,) = model.parameters(), twin.parameters()
        q.grad = randn((16, 32), torch.float32, 2)
        p.grad = q.grad.to(p.dtype)
        optimizer.step()
        other.step()
        ours = model[0](torch.eye(32, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)).T.float()
        assert (ours - q).norm() < 0.12 * (q - start).norm()


def test_it_may_be_chosen_for_each_group_and_is_validated():
    params, optimizer = built([(6, 8), (6, 8)], REAL, decay="all")
    optimizer.param_groups[0]["decay"] = "cautious"
    params[0].grad = randn((6, 8))
    optimizer.step()
    with pytest.raises(ValueError, match="decay must be .*'all', 'cautious'.*'some'"):
        built([(6, 8)], REAL, decay="some")


def test_it_is_refused_where_changes_stay_in_a_frame_beside_codes():
    model = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False))
    quantize(model, Int8(), compensate=1)
    with pytest.raises(ValueError, match="decay='cautious' would move it outside"):
        comoving.build("loqt", model, rank=4, decay="cautious")
