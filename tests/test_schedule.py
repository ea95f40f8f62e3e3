"""When frames are refreshed."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from comoving import LowRankOptimizer
from comoving.finders import Exact, Power
from comoving.frames import Blocks
from comoving.residual import Discard, Feedback
from comoving.schedule import stagger

COSTS = st.lists(st.floats(0.5, 1e6), min_size=1, max_size=40)


@given(costs=COSTS, every=st.integers(1, 12))
def test_loads_differ_by_at_most_the_dearest_refresh(costs, every):
    phases = stagger(costs, every)
    assert len(phases) == len(costs) and all(0 <= phase < every for phase in phases)
    load = [sum(c for c, phase in zip(costs, phases, strict=True) if phase == k) for k in range(every)]
    assert max(load) - min(load) <= max(costs) * (1 + 1e-9)


@given(costs=COSTS, later=COSTS, every=st.integers(1, 12))
def test_later_groups_fill_the_gaps(costs, later, every):
    load = dict.fromkeys(range(every), 0.0)
    for batch in (costs, later):
        for cost, phase in zip(batch, stagger(batch, every, load), strict=True):
            load[phase] += cost
    assert max(load.values()) - min(load.values()) <= max(costs + later) * (1 + 1e-9)


@given(cost=st.floats(0.5, 1e6), every=st.integers(1, 12))
def test_a_single_parameter_has_phase_0(cost, every):
    assert stagger([cost], every) == [0]


def parameters(count):
    return [nn.Parameter(torch.randn(12 + 2 * i, 20, generator=torch.Generator().manual_seed(i))) for i in range(count)]


def frame_of(optimizer, p):
    return {n: x.clone() for n, x in optimizer.state[p].items() if n.startswith("frame.")}


@pytest.mark.parametrize("finder", [Exact(), Power()])
@pytest.mark.parametrize("residual", [Discard(), Feedback()])
@pytest.mark.parametrize("every", [1, 3, 10])
def test_frames_change_exactly_when_due(every, residual, finder):
    params = parameters(4)
    optimizer = LowRankOptimizer(params, 1e-3, 4, refresh_every=every, residual=residual, finder=finder)
    phases = {p: optimizer.sites[p].phase for p in params}
    assert len(set(phases.values())) == min(every, 4)
    refreshes = []

    @contextmanager
    def scope():
        refreshes.append(True)
        yield

    optimizer.refresh_scope = scope
    generator = torch.Generator().manual_seed(0)
    for tick in range(25):
        before = {p: frame_of(optimizer, p) for p in params}
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        due = {p for p in params if tick == 0 or tick % every == phases[p]}
        changed = {
            p
            for p in params
            if not before[p] or any(not torch.equal(x, before[p][n]) for n, x in frame_of(optimizer, p).items())
        }
        assert changed == due, tick
        assert len(refreshes) == len(due)
        refreshes.clear()


def test_no_step_after_the_first_refreshes_much_more_than_another():
    params = [nn.Parameter(torch.randn(256, 260)) for _ in range(12)]
    optimizer = LowRankOptimizer(params, 1e-3, 4, refresh_every=4)
    count = []

    @contextmanager
    def scope():
        count[-1] += 1
        yield

    optimizer.refresh_scope = scope
    for _ in range(9):
        count.append(0)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert count == [12] + [3] * 8


def test_small_alike_parameters_refresh_together_and_many_of_them_in_turn():
    few = [nn.Parameter(torch.randn(16, 24)) for _ in range(12)]
    assert {site.phase for site in LowRankOptimizer(few, 1e-3, 4, refresh_every=4).sites.values()} == {0}
    many = [nn.Parameter(torch.randn(128, 128)) for _ in range(40)]
    phases = Counter(site.phase for site in LowRankOptimizer(many, 1e-3, 4, refresh_every=4).sites.values())
    assert phases == {0: 20, 1: 20}  # not 32 and 8
    together = LowRankOptimizer([nn.Parameter(torch.randn(160, 64, 64))], 1e-3, 4, frame=Blocks(0), refresh_every=4)
    (site,) = together.sites.values()
    assert Counter(site.block(b).phase for b in range(160)) == {0: 128, 1: 32}


def test_the_clock_stands_still_without_a_gradient():
    """A parameter's refresh clock counts its own steps."""
    busy, idle = parameters(2)
    optimizer = LowRankOptimizer([{"params": [busy]}, {"params": [idle]}], 1e-3, 4, refresh_every=3)
    ticks, first_at = [], 5

    @contextmanager
    def scope():
        ticks.append(tick)
        yield

    optimizer.refresh_scope = scope
    for tick in range(10):
        busy.grad = torch.randn_like(busy)
        idle.grad = torch.randn_like(idle) if tick >= first_at else None
        optimizer.step()
    phases = {p: optimizer.sites[p].phase for p in (busy, idle)}
    own = [first_at + t for t in range(5) if t == 0 or t % 3 == phases[idle]]
    assert ticks == sorted([t for t in range(10) if t == 0 or t % 3 == phases[busy]] + own)


def test_scope_surrounds_the_refresh_and_nothing_else():
    """Inside neither parameter nor state changes: the new frame takes its place once nothing can fail any more."""
    (p,) = parameters(1)
    optimizer = LowRankOptimizer([p], 1e-2, 4, refresh_every=2)
    seen = []

    @contextmanager
    def scope():
        inside = {name: x.clone() for name, x in frame_of(optimizer, p).items()}, p.detach().clone()
        yield
        now = frame_of(optimizer, p)
        kept = now.keys() == inside[0].keys() and all(torch.equal(x, now[name]) for name, x in inside[0].items())
        seen.append((inside[0].keys(), kept, torch.equal(inside[1], p)))

    optimizer.refresh_scope = scope
    for _ in range(3):
        p.grad = torch.randn_like(p)
        before, found = frame_of(optimizer, p).get("frame.0", p.new_zeros(())), len(seen)
        optimizer.step()
        assert torch.equal(frame_of(optimizer, p)["frame.0"], before) == (len(seen) == found)
    assert seen == [(set(), True, True), ({"frame.0"}, True, True)]
