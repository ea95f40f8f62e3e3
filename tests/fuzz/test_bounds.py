"""Bounds on steps: reached by the worst gradients, never exceeded, and known for every recipe but one."""

from math import inf, sqrt

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving.codecs import BFloat16, Int4, Int8, RankOne
from comoving.frames import Blocks
from comoving.fuzz import largest, step_bound
from comoving.fuzz.bounds import adam_bound, scheduled_bound
from comoving.precondition import Factored
from comoving.ranks import Energy
from comoving.recipes import recipes
from comoving.residual import Channel, Feedback, Fira, Sign
from comoving.rules import (
    SWAN,
    Adafactor,
    Adam,
    AdamS,
    Lion,
    Momentum,
    Muon,
    Normalized,
    NorMuon,
    Scheduled,
    Shampoo,
)
from comoving.transport import Keep

BETAS = [(0.9, 0.999), (0.9, 0.99), (0.8, 0.9), (0.95, 0.95), (0.0, 0.99), (0.99, 0.9)]


def weights(decays):
    """How much of each gradient an average holds that decays by these numbers."""
    shares = torch.zeros(0, dtype=torch.float64)
    for decay in decays:
        shares = torch.cat([shares * decay, shares.new_tensor([1 - decay])])
    return shares


@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
def test_adams_bound_is_reached_by_the_worst_gradients(beta1, beta2):
    """Equality in Cauchy and Schwarz: gradients in proportion to the quotient of the two weights."""
    most = 0.0
    for t in range(1, 41):
        first, second = weights([beta1] * t), weights([beta2] * t)
        worst = first / second
        m, v = (first * worst).sum(), (second * worst.square()).sum()
        most = max(most, float(m / (1 - beta1**t) / (v / (1 - beta2**t)).sqrt()))
        assert adam_bound(beta1, beta2, t) == pytest.approx(most, rel=1e-9)


def test_adams_bound_in_the_long_run():
    assert adam_bound(0.9, 0.999, 1) == pytest.approx(1)
    assert adam_bound(0.9, 0.999, 20_000) == pytest.approx(7.27, abs=0.01)
    assert adam_bound(0.0, 0.0, 9) == 1
    assert adam_bound(0.9, 0.0, 9) == inf


@pytest.mark.parametrize("rule", [Scheduled(growth=1.0), Scheduled(growth=1.0, decay=-0.8)], ids=str)
def test_the_scheduled_bound_is_reached_by_the_worst_gradients(rule):
    most = 0.0
    for t in range(1, 30):
        first, second = weights([0.9] * t), weights([1 - s**rule.decay for s in range(1, t + 1)])
        most = max(most, float((first.square() / second).sum().sqrt()))
        assert scheduled_bound(rule, 0.9, t) == pytest.approx(most, rel=1e-9)
    assert scheduled_bound(Scheduled(growth=0.9), 0.9, 29) > scheduled_bound(Scheduled(growth=1.0), 0.9, 29)


def test_muons_polynomial_keeps_its_interval():
    x, largest = torch.linspace(0, 1, 200_001, dtype=torch.float64), 0.0
    a, b, c = Muon().coefficients
    for _ in range(8):
        x = a * x + b * x**3 + c * x**5
        largest = max(largest, float(x.max()))
    assert 1.2 < largest < 1.2025


def bound(shape=(24, 16), rank=0.25, steps=12, absorbed=1, **options):
    optimizer = LowRankOptimizer([nn.Parameter(torch.zeros(shape))], 1e-3, rank, **options)
    (site,) = optimizer.sites.values()
    return step_bound(site, optimizer.param_groups[0], steps, absorbed)


def test_what_frames_and_scales_make_of_it():
    b, root = adam_bound(0.9, 0.999, 12), sqrt(0.25)
    assert bound(scale="match").rms == pytest.approx(b)
    assert bound(scale="0.2-match").rms == pytest.approx(0.2 * b)
    assert bound(scale=0.5).rms == pytest.approx(0.5 * root * b)
    assert bound(scale=0.5).entry == pytest.approx(0.5 * sqrt(4) * b)
    assert bound(rank=1.0).rms == bound(rank=1.0).entry == pytest.approx(b)


def test_what_residuals_add():
    b, options = adam_bound(0.9, 0.999, 3), dict(scale=0.5, steps=3)
    inside, outside = 0.25 * b, sqrt(0.75) * b
    assert bound(residual=Sign(rate=0.3), **options).rms == pytest.approx(inside + 0.3)
    assert bound(residual=Fira(), **options).rms == pytest.approx(inside + outside * 1.01**2, rel=1e-6)
    assert bound(residual=Channel(growth=2.0), **options).rms == pytest.approx(0.5 * b * 2.0**2, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "rms"),
    [
        (dict(rule=Lion()), 1.0),
        (dict(rule=Adafactor(clip=0.5)), 0.5),
        (dict(rule=Adafactor(clip=0.5, average=None)), 0.5),
        (dict(rule=Normalized(scale=0.3)), 0.3),
        (dict(rule=SWAN(scale=0.3)), 0.3),
        (dict(rule=AdamS(), betas=(0.9, 0.95)), sqrt(0.81 / 0.95 + 0.01 / 0.05)),
        (dict(rule=Muon(method="polar")), 0.2),
        (dict(rule=Muon()), 0.2 * 1.2025),
        (dict(rule=Muon(after="both", coefficients="polar-express")), 0.2),
        (dict(rule=NorMuon(method="polar")), 0.2),
        (dict(rule=Momentum(), precondition=Factored(clip=0.5)), 0.5),
        (dict(rule=Momentum(), precondition=Factored(), absorbed=3), 3.0),
    ],
)
def test_bounds_of_other_rules(options, rms):
    assert bound(rank=1.0, **options).rms == pytest.approx(rms)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(rule=Momentum()), "Momentum has the size of the gradients"),
        (dict(rule=Momentum(), precondition=Factored(), residual=Feedback(), rank=0.25), "feedback returns many"),
        (dict(rule=Shampoo(graft=False)), "without grafting"),
        (dict(rule=Adafactor(clip=None)), "without clip"),
        (dict(rule=Muon(coefficients=(2.0, -1.5, 0.5))), "polynomial"),
        (dict(rule=Scheduled(), moments=RankOne()), "far below"),
        (dict(rule=Scheduled(), moments=Int8(), transport=Keep(), rank=0.25), "far below"),
        (dict(moments=RankOne()), "far below"),
        (dict(rule=Momentum(), precondition=Factored(), ranks=Energy(), rank=0.25), "where ranks fall"),
        (dict(residual=Fira(growth=None), rank=0.25), "puts no limit"),
        (dict(residual=Channel(growth=None), rank=0.25), "puts no limit"),
        (dict(betas=(0.9, 0.0)), "forgets every gradient but the last"),
        (dict(rule=AdamS(), betas=(0.9, 0.0)), "divides by the gradient alone"),
    ],
)
def test_where_there_is_no_bound_the_reason_is_said(options, reason):
    found = bound(**{"rank": 1.0} | options)
    assert found.none
    assert found.entry == inf
    assert reason in found.reason


@pytest.mark.parametrize("codec", [BFloat16(), Int8(), Int8(table="dynamic"), Int4(), Int4(table="linear")], ids=str)
def test_rounded_moments_stay_within_their_bound(codec):
    """On spikes among small gradients, where codes keep the least of second moments."""
    worst = 0.0
    for seed in range(6):
        source = torch.Generator().manual_seed(seed)
        p = nn.Parameter(torch.zeros(8, 32))
        optimizer = LowRankOptimizer([p], 1.0, 1.0, moments=codec, rule=Adam(), weight_decay=0.0)
        for step in range(25):
            spikes = torch.rand(8, 32, generator=source) < 0.02
            p.grad = torch.where(spikes, 300.0, 1.0) * torch.randn(8, 32, generator=source)
            before = p.detach().clone()
            optimizer.step()
            most = step_bound(optimizer.sites[p], optimizer.param_groups[0], step + 1).entry
            worst = max(worst, float((p.detach() - before).abs().amax()) / most)
    assert worst <= 1.001


def test_the_last_update_is_measured_block_by_block_and_without_decay():
    p = nn.Parameter(torch.ones(3, 8, 6))
    optimizer = LowRankOptimizer([p], 0.1, 0.5, frame=Blocks(), rule=Lion(), weight_decay=0.5, scale=1.0)
    p.grad, before = torch.zeros(3, 8, 6), p.detach().clone()
    p.grad[1] = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    share, what = largest(optimizer, p, before, 1)
    assert share == pytest.approx(1, abs=1e-4)  # signs in the core: the idle blocks, not decayed, count for nothing
    assert what == "RMS 0.7071 lr, bound 0.7071"


NONE = {"smmf", "sumo"}


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_has_a_bound_or_a_reason(name):
    model = nn.Linear(16, 24, bias=False)
    optimizer = comoving.build(name, model, 1e-3)
    found = step_bound(optimizer.sites[model.weight], optimizer.param_groups[0], 1000)
    assert found.none is (name in NONE)
    assert bool(found.reason) is (name in NONE)
    assert found.none or found.rms <= found.entry


def test_counts_are_checked():
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        bound(steps=0)
    with pytest.raises(ValueError, match="absorbed must be >= 1, got 0"):
        bound(absorbed=0)
