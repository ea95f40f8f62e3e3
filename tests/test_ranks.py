"""Adaptive ranks: they find what there is, change at refreshes only, lose nothing that stays, and keep to a budget."""

import copy
import io
import pickle
import random
from dataclasses import dataclass, field
from math import ceil, cos, pi

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import comoving
from comoving import LowRankOptimizer, explain, state_bytes
from comoving import state as slots
from comoving.codecs import Int8
from comoving.drivers import gradients
from comoving.finders import Exact, Power
from comoving.frames import Modes
from comoving.parts import part
from comoving.ranks import Energy, Fixed, Reading, Record, Temperature, Tolerance
from comoving.ranks import adapting as engine
from comoving.ranks import budget as budgets
from comoving.residual import Discard, Feedback
from comoving.transport import Carry, Keep, Reset, Rotate
from contract.support import COMPLEX, REAL, Holder, close, frame_of, known_rank, lone, randn, random_frame, step
from test_feedback import Sums

FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
M, V = "moment.first", "moment.second"
ADAPT = Energy(low=0.9, high=0.95)


def ranks_of(optimizer, p):
    return frame_of(optimizer, p).ranks


def unit(x):
    return x * (x.numel() ** 0.5 / x.norm())


def run(start, policy, signal, count, noise=0.0, **options):
    """The ranks after each step on a steady signal with noise of its own for each step."""
    p, optimizer = lone(torch.zeros_like(signal), lr=1e-3, rank=start, ranks=policy, **options)
    seen = []
    for t in range(count):
        step(optimizer, p, signal + noise * randn(signal.shape, signal.dtype, 700 + t))
        seen.append(ranks_of(optimizer, p))
    return seen, p, optimizer


def shares(values):
    """A reading of one mode."""
    return Reading((tuple(values),))


@dataclass(frozen=True)
class Stay(Power):
    """Hands back the frame it is given."""

    def find(self, operand, start, warm, memory):
        return start


@dataclass(frozen=True)
class Counting(Power):
    """Remembers one number for each direction of the first mode, and how many gradients it has seen."""

    def schema(self, shape, ranks, dtype):
        return {"each": slots.Spec((ranks[0],), dtype)}

    def observe(self, gradient, memory, rows=0):
        memory["each"] += 1


# ------------------------------------------------------------------------------------------------------- what is found


@FIELDS
@pytest.mark.parametrize("finder", [Power(), Exact()], ids=["power", "exact"])
@pytest.mark.parametrize("policy", [Energy(low=0.9, high=0.97), Tolerance(error=0.3)], ids=["energy", "tolerance"])
@pytest.mark.parametrize("start", [8, 40])
def test_the_rank_of_a_matrix_is_found_from_both_sides(start, policy, finder, dtype):
    signal = unit(known_rank((48, 60), (24, None), dtype))
    seen, _, _ = run((start, None), policy, signal, 27, 0.1, finder=finder, refresh_every=3)
    ranks = [r for r, _ in seen]
    assert ranks[0] == start
    assert ranks[9:] == [24] * 18
    assert all(a == b for t, (a, b) in enumerate(zip(ranks, ranks[1:], strict=False)) if (t + 1) % 3)


@FIELDS
@pytest.mark.parametrize("policy", [Energy(low=0.9, high=0.97), Tolerance(error=0.3)], ids=["energy", "tolerance"])
@pytest.mark.parametrize("start", [(4, 6, 1), (12, 20, 18)])
def test_the_ranks_of_a_tensor_are_found_mode_by_mode(start, policy, dtype):
    signal = unit(known_rank((16, 24, 20), (8, 16, 8), dtype))
    seen, _, _ = run(start, policy, signal, 14, 0.05, finder=Exact(sweeps=1))
    assert seen[0] == ((8, 8, 1) if start[0] == 4 else (16, 24, 20))
    assert seen[5:] == [(8, 16, 8)] * 9


@pytest.mark.parametrize("start", [1, 5])
def test_a_mode_no_longer_than_a_step_finds_its_rank_exactly(start):
    signal = unit(known_rank((7, 40), (3, None)))
    seen, _, _ = run((start, None), Tolerance(error=0.1), signal, 12, 0.01, finder=Exact())
    assert seen[0] == (start, None)
    assert seen[5:] == [(3, None)] * 7


@pytest.mark.parametrize(("low", "high", "calm"), [(0.6, 0.85, True), (0.75, 0.7500001, False)])
def test_between_the_thresholds_nothing_flaps(low, high, calm):
    """A signal whose strength against the noise wavers: 24 directions hold 0.65 to 0.84 of the energy."""
    signal, p = unit(known_rank((48, 60), (24, None))), nn.Parameter(torch.zeros(48, 60, dtype=REAL))
    optimizer = LowRankOptimizer([p], 1e-3, (24, None), ranks=Energy(low=low, high=high), finder=Exact(inertia=0.9))
    ranks, captured = [], []
    for t in range(40):
        step(optimizer, p, signal + (0.7 + 0.25 * (-1) ** (t // 2)) * randn((48, 60), REAL, 50 + t))
        ranks.append(ranks_of(optimizer, p)[0])
        captured.append(optimizer.diagnostics()["parameter 0"]["captured"])
    changes = sum(a != b for a, b in zip(ranks, ranks[1:], strict=False))
    assert (changes == 0) if calm else (changes > 8)
    if calm:
        assert min(captured) < 0.75 < max(captured)


def test_a_change_never_calls_for_its_opposite():
    """Whatever the spectrum: after growing a mode does not shrink back, after shrinking it does not grow back."""
    for seed in range(60):
        spectrum = randn((40,), REAL, seed).exp().pow(1 + seed % 4).sort(descending=True).values
        spectrum = (spectrum / spectrum.sum()).tolist()
        for policy in (Energy(low=0.6, high=0.9), Tolerance(error=0.5)):
            for rank in policy.admissible(40):
                (new,) = policy.wanted(shares(spectrum[:rank]), (rank,), (rank,), (40,), 9, 0)
                (then,) = policy.wanted(shares(spectrum[:new]), (new,), (rank,), (40,), 10, 0)
                assert (then - new) * (new - rank) >= 0, (policy, spectrum, rank, new, then)


def test_thresholds_are_met_exactly():
    spectrum = (0.3, 0.2, *[0.025] * 14)  # 16 directions hold 0.85, 8 hold 0.65
    wanted = [
        policy.wanted(shares(spectrum), (16,), (16,), (64,), 1, 0)[0]
        for policy in (
            Energy(low=0.86, high=0.9),
            Energy(low=0.84, high=0.9),
            Energy(low=0.1, high=0.66),
            Energy(low=0.1, high=0.64),
            Energy(low=0.1, high=0.29),
            Tolerance(error=0.38),  # 0.144 < 0.15 outside
            Tolerance(error=0.39),
            Tolerance(error=0.65, margin=0.9),  # 0.342 < 0.35
            Tolerance(error=0.66, margin=0.9),  # 0.353
            Tolerance(error=0.66, margin=0.89),  # 0.345
        )
    ]
    assert wanted == [24, 16, 16, 8, 1, 24, 16, 16, 8, 16]
    two = Reading((spectrum, spectrum))
    assert Tolerance(error=0.5).wanted(two, (16, 16), (16, 16), (64, 64), 1, 0) == (24, 24)  # 0.25 / 2 < 0.15 each
    assert Tolerance(error=0.56).wanted(two, (16, 16), (16, 16), (64, 64), 1, 0) == (16, 16)


@pytest.mark.parametrize(
    ("policy", "size", "expected"),
    [
        (Energy(), 5, [1, 2, 3, 4, 5]),
        (Energy(), 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (Energy(), 9, [1, 8, 9]),
        (Energy(), 32, [1, 8, 16, 24, 32]),
        (Energy(minimum=8), 20, [8, 16, 20]),
        (Energy(minimum=8), 6, [6]),
        (Energy(minimum=10, maximum=30), 64, [10, 16, 24, 30]),
        (Energy(minimum=0.25, maximum=0.5), 64, [16, 24, 32]),
        (Energy(minimum=0.3, maximum=0.7), 50, [15, 16, 24, 32, 35]),
        (Energy(maximum=4), 64, [1, 4]),
        (Energy(minimum=16, maximum=0.25), 32, [8]),
        (Energy(maximum=0.01), 32, [1]),
        (Energy(step=5), 12, [1, 5, 10, 12]),
    ],
    ids=str,
)
def test_admissible_ranks(policy, size, expected):
    assert list(policy.admissible(size)) == expected
    assert [policy.at_least(size, r) for r in range(1, size + 1)] == [
        min((e for e in expected if e >= r), default=expected[-1]) for r in range(1, size + 1)
    ]
    assert [policy.below(size, e) for e in expected] == [None, *expected[:-1]]


# ---------------------------------------------------------------------------------------------------- what is kept


@FIELDS
@pytest.mark.parametrize("transport", [Carry(), Rotate()], ids=["carry", "rotate"])
@pytest.mark.parametrize("both", [False, True])
def test_growing_keeps_the_old_moments(transport, both, dtype):
    """8 directions, then 8 more: the new frame holds the old one, and F m is what it was."""
    shape, few, more = (32, 40), (8, 8 if both else None), (16, 16 if both else None)
    if both:
        small = random_frame(shape, few, dtype, 3).lift(torch.diag(torch.linspace(1, 2, 8)).to(dtype))
        new = random_frame(shape, few, dtype, 4).lift(torch.diag(torch.linspace(1, 2, 8)).to(dtype))
    else:
        small, new = known_rank(shape, few, dtype, 1), known_rank(shape, few, dtype, 2)
    p, optimizer = lone(
        torch.zeros(shape, dtype=dtype), lr=0.0, rank=few, ranks=Energy(low=0.9, high=0.99), transport=transport,
        finder=Exact(method="svd"), refresh_every=4, betas=(0.8, 0.95),
    )  # fmt: skip
    for _ in range(4):
        step(optimizer, p, small)
    old, state = frame_of(optimizer, p), {n: x.clone() for n, x in optimizer.state[p].items() if n.startswith("mom")}
    step(optimizer, p, small + new)
    assert (old.ranks, ranks_of(optimizer, p)) == (few, more)
    close(frame_of(optimizer, p).lift(optimizer.state[p][M]), 0.8 * old.lift(state[M]) + 0.2 * (small + new), 1e-7)
    assert optimizer.state[p][V].shape == optimizer.state[p][M].shape == slots.layout(
        slots.current(optimizer.sites[p], optimizer.param_groups[0], optimizer.state[p]), optimizer.param_groups[0]
    )[V].shape  # fmt: skip


@FIELDS
@pytest.mark.parametrize("shape", [(32, 20), (24, 20, 16)], ids=["matrix", "tensor"])
def test_shrinking_drops_the_least_energetic_directions(shape, dtype):
    """The frame found is the best of its rank inside the old span, whatever basis the old one had."""
    ranks = (24, None) if len(shape) == 2 else (24, 16, 16)
    low = random_frame(shape, (8, None) if len(shape) == 2 else (8, 8, 8), dtype)
    g = low.lift(randn(low.project(randn(shape, dtype)).shape, dtype, 5)) + 0.02 * randn(shape, dtype, 6)
    policy = Energy(low=0.01, high=0.5, minimum=8)
    p, optimizer = lone(
        torch.zeros(shape, dtype=dtype), lr=0.0, rank=ranks, ranks=policy, finder=Stay(), betas=(0.8, 0.95)
    )
    step(optimizer, p, g)
    old, m = frame_of(optimizer, p), optimizer.state[p][M].clone()
    step(optimizer, p, g)
    new = frame_of(optimizer, p)
    changed = [n for n, (a, b) in enumerate(zip(old.ranks, new.ranks, strict=True)) if a != b]
    assert changed and new.defect() < 1e-12
    for n in changed:
        u, v = old.factors[n], new.factors[n]
        unfolded = g.movedim(n, 0).reshape(shape[n], -1)
        close(u @ (u.mH @ v), v)  # inside the old span
        best = torch.linalg.svdvals(u.mH @ unfolded)[: v.shape[1]].square().sum()
        close((v.mH @ unfolded).norm().square(), best)
    close(optimizer.state[p][M], 0.8 * new.project(old.lift(m)) + 0.2 * new.project(g))


@FIELDS
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("transport", [Carry(), Rotate(), Reset()], ids=["carry", "rotate", "reset"])
@pytest.mark.parametrize(("shape", "ranks"), [((12, 9), (4, None)), ((9, 8, 10), (2, 4, None))], ids=["2-D", "3-D"])
def test_error_feedback_telescopes_across_changes_of_rank(shape, ranks, transport, lazy, dtype):
    sums = Sums(
        randn(shape, dtype), rank=ranks, transport=transport, refresh_every=2, betas=(0.8, 0.95),
        residual=Feedback(lazy), ranks=Temperature(start=2.0, end=0.25, steps=9, step=1, patience=1),
    )  # fmt: skip
    for t in range(16):
        sums.step(randn(shape, dtype, 30 + t))
        assert sums.gap().norm() <= 1e-10
        if t == 11:
            for loss in (1.0, 2.0):
                sums.optimizer.report_validation(loss)
    sizes = [frame.ranks[0] for frame in sums.frames]
    steps = [b - a for a, b in zip(sizes, sizes[1:], strict=False)]
    assert min(steps) < 0 < max(steps)
    assert sums.feedback.norm() > 0


def test_shapes_change_at_refreshes_only_and_are_those_of_the_layout():
    p, optimizer = lone(
        torch.zeros(32, 40), lr=1e-2, rank=(8, None), ranks=Energy(low=0.9, high=0.95), finder=Counting(),
        residual=Feedback(), codec=Int8(), transport=Carry(), refresh_every=4,
    )  # fmt: skip
    group, before, changed = optimizer.param_groups[0], None, []
    for t in range(24):
        step(optimizer, p, randn((32, 40), torch.float32, t))
        state = optimizer.state[p]
        shapes = {n: (tuple(x.shape), x.dtype) for n, x in state.items() if isinstance(x, torch.Tensor)}
        site = slots.current(optimizer.sites[p], group, state)
        expected = slots.layout(site, group)
        assert shapes == {n: (spec.shape, spec.dtype) for n, spec in expected.items()}
        (row,) = explain(optimizer).rows
        assert row.ranks == ranks_of(optimizer, p) and row.bytes == state_bytes(optimizer, projected=True)
        if before is not None and shapes != before:
            changed.append(t)
        before = shapes
    assert changed == [4, 8, 12]
    assert state["ranks"].tolist() == [32, -1]
    assert state["finder.each"].tolist() == [11.0] * 32  # forgotten at step 12, which it had seen already


def test_ranks_are_read_once_for_each_refreshed_parameter(monkeypatch):
    model = Holder(*(torch.zeros(24, 30) for _ in range(3)))
    optimizer = LowRankOptimizer(model.parameters(), 1e-2, (8, None), ranks=Energy(), refresh_every=3)
    reads = []
    monkeypatch.setattr(engine, "read", lambda *given: reads.append(t) or original(*given))
    from comoving.ranks.reading import read as original  # noqa: PLC0415

    for t in range(9):
        for i, p in enumerate(model.parameters()):
            p.grad = randn((24, 30), torch.float32, 10 * t + i)
        optimizer.step()
    assert sorted(reads) == list(range(1, 9))


def test_a_gradient_of_zero_says_nothing():
    p, optimizer = lone(torch.zeros(24, 30), rank=(8, None), ranks=Energy(low=0.9, high=0.95))
    step(optimizer, p, torch.zeros(24, 30))
    step(optimizer, p, randn((24, 30), torch.float32))  # the first that shows anything: no frame was looked for yet
    assert ranks_of(optimizer, p) == (8, None)
    step(optimizer, p, randn((24, 30), torch.float32, 1))
    step(optimizer, p, randn((24, 30), torch.float32, 2))
    grown = ranks_of(optimizer, p)
    assert grown > (8, None)
    step(optimizer, p, torch.zeros(24, 30))
    assert ranks_of(optimizer, p) == grown


@pytest.mark.parametrize("residual", [Discard(), Feedback()], ids=["discard", "feedback"])
@pytest.mark.parametrize("budget", [None, 10**9])
def test_ranks_that_never_change_are_bit_for_bit_fixed_ones(residual, budget):
    def trained(policy):
        model = Holder(randn((24, 30), torch.float32), randn((16, 12, 9), torch.complex64), torch.ones(5))
        optimizer = LowRankOptimizer(
            [{"params": [model.w0], "rank": (8, None)}, {"params": [model.w1], "rank": (8, 8, None)},
             {"params": [model.w2]}],
            1e-2, ranks=policy, residual=residual, refresh_every=2, budget=budget,
        )  # fmt: skip
        for t in range(9):
            for i, p in enumerate(model.parameters()):
                p.grad = randn(p.shape, p.dtype, 10 * t + i)
            optimizer.step()
        return model, optimizer

    (a, fixed), (b, adaptive) = trained(Fixed()), trained(Energy(low=0.0, high=1.0))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        own = {n: x for n, x in adaptive.state[q].items() if not n.startswith("ranks")}
        assert own.keys() == fixed.state[p].keys()
        assert all(torch.equal(x, own[n]) for n, x in fixed.state[p].items() if isinstance(x, torch.Tensor))
    assert not any(n.startswith("ranks") for p in a.parameters() for n in fixed.state[p])
    assert all("validation" not in group for group in fixed.state_dict()["param_groups"])


# ------------------------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("curve", ["cosine", "exponential"])
@pytest.mark.parametrize("every", [1, 3])
def test_the_schedule_is_followed_exactly(curve, every):
    start, end, steps, base = 3.0, 0.25, 20, 16
    policy = Temperature(start=start, end=end, steps=steps, curve=curve)
    p, optimizer = lone(torch.zeros(64, 70), rank=(base, None), ranks=policy, refresh_every=every)
    expected = None
    for t in range(27):
        step(optimizer, p, randn((64, 70), torch.float32, t))
        if t % every == 0:
            done = min(t / steps, 1)
            cosine = end + (start - end) * (1 + cos(pi * done)) / 2
            factor = cosine if curve == "cosine" else start ** (1 - done) * end**done
            expected = max(8, 8 * ceil(round(factor * base / 8, 9))) if factor * base > 1 else 1
        assert ranks_of(optimizer, p) == (expected, None)
    assert expected == 8
    assert optimizer.sites[p].ranks == (48, None)
    assert optimizer.sites[p].base == (16, None)


@pytest.mark.parametrize("size", [64, 6])
def test_validation_without_improvement_raises_ranks(size):
    notch = 8 if size == 64 else 1
    base = 2 * notch
    policy = Temperature(start=2.0, end=0.5, steps=1, patience=2)
    p, optimizer = lone(torch.zeros(size, 70), rank=(base, None), ranks=policy, refresh_every=2)

    def advance():
        for _ in range(2):
            step(optimizer, p, randn((size, 70), torch.float32))
        return ranks_of(optimizer, p)[0]

    assert [advance(), advance()] == [2 * base, notch]
    seen = []
    for loss in (3.0, 2.0, 2.0, 1.9, 1.9, 2.5, 2.4, 2.3, 1.0, 1.5, 0.9, 4, 4, 4, 4, 4, 4):
        optimizer.report_validation(loss)
        seen.append(advance() // notch)
    assert seen == [1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4]  # never beyond the start


@pytest.mark.parametrize("policy", [Fixed(), Energy(), Tolerance(), Temperature()], ids=lambda p: type(p).__name__)
def test_reports_are_remembered(policy):
    p, optimizer = lone(torch.zeros(24, 30), rank=(8, None), ranks=policy)
    optimizer.report_validation(2.0)
    optimizer.report_validation(3)
    assert optimizer.state_dict()["param_groups"][0]["validation"] == (2.0, 1, 0)
    for value, error in ((float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError), (None, TypeError)):
        with pytest.raises(error, match=f"loss must .*{value}"):
            optimizer.report_validation(value)
    assert optimizer.state_dict()["param_groups"][0]["validation"] == (2.0, 1, 0)
    step(optimizer, p, randn((24, 30), torch.float32))
    fresh = lone(torch.zeros(24, 30), rank=(8, None), ranks=policy)[1]
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    assert tuple(fresh.param_groups[0]["validation"]) == (2.0, 1, 0)
    silent = lone(torch.zeros(24, 30), rank=(8, None), ranks=policy)[1]
    fresh.load_state_dict(silent.state_dict())
    assert fresh.param_groups[0].get("validation", Record()) == Record()
    assert ("validation" in fresh.param_groups[0]) is policy.adaptive
    fresh.load_state_dict(lone(torch.zeros(24, 30), rank=(8, None))[1].state_dict())
    assert ("validation" in fresh.param_groups[0]) is policy.adaptive


# ------------------------------------------------------------------------------------------------------------ budget


def competing(budget, policy, every=2, model=None, **options):
    model = model or Holder(torch.zeros(64, 80), torch.zeros(48, 100), torch.zeros(24, 20, 30), torch.zeros(7))
    groups = [
        {"params": [model.w0, model.w1], "rank": (8, None)},
        {"params": [model.w2], "rank": (8, 8, 8)},
        {"params": [model.w3]},
    ]
    defaults = {"residual": Feedback(), "codec": Int8(), "transport": Carry(), "refresh_every": every}
    return model, LowRankOptimizer(groups, 1e-2, ranks=policy, budget=budget, **defaults | options)


def feed(model, optimizer, t, dtype=torch.float32):
    for i, p in enumerate(model.parameters()):
        p.grad = randn(p.shape, dtype, 97 * t + i)
    optimizer.step()


@pytest.mark.parametrize("policy", [Energy(low=0.9, high=0.95), Tolerance(error=0.2), Temperature(2.0, 1.0, 50)])
@pytest.mark.parametrize("room", [1.0, 1.3, 1.8, 3.0])
def test_the_budget_is_never_exceeded(policy, room):
    if isinstance(policy, Temperature):
        policy = Temperature(start=6.0, end=1.0, steps=50)
    model, optimizer = competing(None, Energy(low=0.0, high=1.0))
    feed(model, optimizer, 0)
    budget = int(room * state_bytes(optimizer, projected=True))
    model, optimizer = competing(budget, policy)
    sizes = []
    for t in range(30):
        feed(model, optimizer, t)
        sizes.append(state_bytes(optimizer, projected=True))
        assert sizes[-1] <= budget
    assert max(sizes) > 0.85 * min(budget, 1.8 * budget / room)
    if room < 3:  # which is more than is wanted
        model, free = competing(None, policy)
        for t in range(12):
            feed(model, free, t)
        assert state_bytes(free, projected=True) > budget or isinstance(policy, Temperature)


@pytest.mark.parametrize("seed", range(6))
def test_the_budget_holds_whatever_happens(seed):
    """Parameters without gradients, accumulated and skipped steps, validation, copies through files, tight budgets."""
    rng = random.Random(seed)
    policy = rng.choice([Energy(low=0.8, high=0.9), Tolerance(error=0.2), Temperature(start=5.0, steps=9, patience=1)])
    model, optimizer = competing(None, Fixed())
    feed(model, optimizer, 0)
    budget = int(rng.uniform(1.02, 2.0) * state_bytes(optimizer, projected=True))
    options = dict(every=rng.choice([1, 2, 3]), on_nonfinite="skip", residual=rng.choice([Discard(), Feedback()]))
    model, optimizer = competing(budget, policy, **options)
    grown, first = False, optimizer.state_dict()
    for t in range(24):
        for i, p in enumerate(model.parameters()):
            frame = random_frame((p.shape[0], p.numel() // p.shape[0]), (min(p.shape[0], 8 + t), None), seed=t + i)
            g = frame.lift(randn(frame.project(torch.zeros(p.shape[0], p.numel() // p.shape[0], dtype=REAL)).shape))
            p.grad = None if rng.random() < 0.2 else g.float().reshape(p.shape)
        if rng.random() < 0.15 and model.w1.grad is not None:
            model.w1.grad[0, 0] = torch.nan
        if rng.random() < 0.2 and model.w0.grad is not None:
            optimizer.absorb(model.w0, model.w0.grad)
        optimizer.step()
        assert state_bytes(optimizer, projected=True) <= budget
        roster = optimizer.roster
        assert all(size == roster.claim(p).bytes_now() for p, size in roster._bytes.items())  # what is remembered
        grown |= any(
            (now or 0) > (first or 0)
            for p, site in optimizer.sites.items()
            if site.projected and M in optimizer.state.get(p, {})
            for now, first in zip(ranks_of(optimizer, p), site.ranks, strict=True)
        )
        optimizer.report_validation(rng.random())
        if rng.random() < 0.2:
            state = through_file(optimizer.state_dict())
            if rng.random() < 0.5:
                _, optimizer = competing(budget, policy, model=model, **options)
            optimizer.load_state_dict(state if rng.random() < 0.5 else first)
        first = through_file(optimizer.state_dict()) if t == 0 else first
    assert grown or isinstance(policy, Temperature)


def test_energy_moves_to_where_it_is_worth_more():
    """One parameter gets along with less, the other needs more: the bytes move, once, and stay."""
    a, b = nn.Parameter(torch.zeros(64, 64, dtype=REAL)), nn.Parameter(torch.zeros(64, 64, dtype=REAL))
    flat = random_frame((64, 64), (48, 48)).lift(torch.eye(48, dtype=REAL))
    steep = random_frame((64, 64), (48, 48), seed=2).lift(torch.diag(0.7 ** torch.arange(48, dtype=REAL)))
    options = dict(lr=1e-3, rank=(24, None), ranks=Energy(low=0.999999, high=1.0, minimum=8), finder=Exact())
    probe = LowRankOptimizer([a, b], **options)
    for p, g in ((a, flat), (b, steep)):
        p.grad = g.clone()
    probe.step()
    budget = state_bytes(probe, projected=True) + 100
    optimizer, seen = LowRankOptimizer([a, b], **options, budget=budget), []
    for _ in range(16):
        optimizer.step()
        assert state_bytes(optimizer, projected=True) <= budget
        seen.append((ranks_of(optimizer, a)[0], ranks_of(optimizer, b)[0]))
    assert seen[0] == (24, 24)
    assert seen[-1] == (40, 8)
    assert seen[6:] == seen[-1:] * 10
    for p, g in ((a, flat), (b, flat)):
        p.grad = g.clone()
    even, seen = LowRankOptimizer([a, b], **options, budget=budget), []
    for _ in range(8):
        even.step()
        seen.append((ranks_of(even, a)[0], ranks_of(even, b)[0]))
    assert seen == [(24, 24)] * 8  # equals take nothing from one another


def test_of_two_modes_the_one_with_more_outside_grows():
    p, optimizer = lone(torch.zeros(40, 40), rank=(8, 8), ranks=ADAPT)
    claim, now = optimizer.roster.claim(p), optimizer.roster.claim(p).bytes_at((8, 8))
    one = claim.bytes_at((16, 8)) - now
    for reading, first in (
        (Reading(((0.1,) * 8, (0.05,) * 8)), (8, 16)),
        (Reading(((0.05,) * 8, (0.1,) * 8)), (16, 8)),
    ):
        outside = max(reading.outside(0), reading.outside(1))
        assert budgets.grant(claim, (16, 16), reading, claim.bytes_at((16, 16))) == ((16, 16), 0.0)
        ranks, gain = budgets.grant(claim, (16, 16), reading, now + one)
        assert ranks == first and gain > 0
        ranks, gain = budgets.grant(claim, (16, 16), reading, now + one - 1)
        assert ranks == (8, 8)
        assert gain == pytest.approx(outside * 8 / 32 / one)


def test_the_least_energy_per_byte_is_released_for_twice_as_much():
    model = Holder(*(torch.zeros(32, 40) for _ in range(3)))
    optimizer = LowRankOptimizer(model.parameters(), rank=(16, None), ranks=ADAPT, refresh_every=100)
    feed(model, optimizer, 0)
    states = {p: optimizer.state[p] for p in model.parameters()}
    for p, price in zip(model.parameters(), (3.0, 1.0, 2.0), strict=True):
        states[p]["ranks.value"][0] = price

    def released(gain):
        budgets.release(gain, states, optimizer.roster.claim)
        return [int(state["ranks"][0]) for state in states.values()]

    assert released(2.0) == [16, 16, 16]
    assert released(2.1) == [16, 8, 16]
    assert states[model.w1]["ranks.value"].tolist() == [torch.inf] * 2  # not again before its next reading
    sizes = [optimizer.roster.claim(w).bytes_now() for w in (model.w0, model.w1)]
    assert sizes[0] == sizes[1]  # nothing is freed yet
    assert released(4.1) == [16, 8, 8]
    states[model.w2]["ranks.value"][0] = 0.5  # still at rank 16: asked already
    assert released(4.1) == [16, 8, 8]
    assert released(6.1) == [8, 8, 8]
    assert not any(name.startswith("ranks") for name in gradients._clones(states[model.w0]))  # no host read to undo
    feed(model, optimizer, 1)
    assert [ranks_of(optimizer, p) for p in states] == [(8, None)] * 3


@pytest.mark.parametrize("policy", [Energy(minimum=8), Temperature(minimum=8, end=0.1), Fixed()], ids=str)
def test_an_impossible_budget_is_refused_with_both_numbers(policy):
    model, lowest = competing(None, Fixed())
    feed(model, lowest, 0)
    least = state_bytes(lowest, projected=True)
    extra = 0 if isinstance(policy, Fixed) else 16 * (2 + 2 + 3)  # ranks and prices, 8 bytes each, for every mode
    with pytest.raises(ValueError, match=rf"budget must be at least {least + extra} bytes.*got {least + extra - 1}$"):
        competing(least + extra - 1, policy)
    model, optimizer = competing(least + extra, policy)
    for t in range(5):
        feed(model, optimizer, t)
        assert state_bytes(optimizer, projected=True) == least + extra


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-5, ValueError), (1e6, ValueError), (True, TypeError)])
def test_a_bad_budget_is_refused(value, error):
    with pytest.raises(error, match=f"budget must be .*{value}".replace("+", "[+]")):
        lone(torch.zeros(8, 8), budget=value)


def test_a_group_that_joins_makes_room_for_itself():
    model, optimizer = competing(None, Energy(low=0.9, high=0.95))
    feed(model, optimizer, 0)
    budget = 2 * state_bytes(optimizer, projected=True)
    model, optimizer = competing(budget, Energy(low=0.9, high=0.95))
    for t in range(20):
        feed(model, optimizer, t)
    before = [ranks_of(optimizer, p) for p in list(model.parameters())[:3]]
    late = nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(ValueError, match="budget must be at least"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(900, 900))], "rank": (100, None)})
    assert len(optimizer.param_groups) == 3 and len(optimizer.sites) == 4
    optimizer.add_param_group({"params": [late], "rank": (32, None)})
    late.grad = randn((64, 64), torch.float32, 5)
    for t in range(4):
        feed(model, optimizer, 20 + t)
        assert state_bytes(optimizer, projected=True) <= budget
    assert [ranks_of(optimizer, p) for p in list(model.parameters())[:3]] != before


# ------------------------------------------------------------------------------------------------------- checkpoints


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(a, b):
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)
        x, y = a[1].state[p], b[1].state[q]
        assert x.keys() == y.keys()
        for name, value in x.items():
            assert torch.equal(value, y[name]) if isinstance(value, torch.Tensor) else value == y[name], name


RESUMED = {
    "energy": (Energy(low=0.9, high=0.95), None),
    "tolerance": (Tolerance(error=0.9, margin=0.5), None),
    "temperature": (Temperature(start=3.0, end=0.5, steps=10, patience=1), None),
    "budget": (Energy(low=0.9, high=0.95), 2.2),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_training_is_bitwise_uninterrupted_training(case):
    policy, room = RESUMED[case]
    budget = None
    if room is not None:
        model, optimizer = competing(None, Fixed())
        feed(model, optimizer, 0)
        budget = int(room * state_bytes(optimizer, projected=True))
    model, optimizer = competing(budget, policy)
    saved, seen = [], []
    for t in range(16):
        feed(model, optimizer, t)
        optimizer.report_validation(1 / (t + 1) if t < 10 else 2.0)
        seen.append([ranks_of(optimizer, p) for p in (model.w0, model.w1, model.w2)])
        saved.append((t + 1, copy.deepcopy(model), through_file(optimizer.state_dict())))
    assert sum(a != b for a, b in zip(seen, seen[1:], strict=False)) >= 2
    for start, resumed, state in saved[:13:3]:
        _, other = competing(budget, policy, model=resumed)
        other.load_state_dict(state)
        for t in range(start, 16):
            feed(resumed, other, t)
            other.report_validation(1 / (t + 1) if t < 10 else 2.0)
        assert_same((resumed, other), (model, optimizer))
        assert tuple(other.param_groups[0]["validation"]) == tuple(optimizer.param_groups[0]["validation"])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_bitwise(how):
    both = competing(10**6, Energy(low=0.9, high=0.95))
    for t in range(5):
        feed(*both, t)
    twins = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert twins[1].budget == 10**6
    for t in range(5, 10):
        feed(*both, t)
        feed(*twins, t)
    assert_same(both, twins)


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_state_dict_roundtrip(flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def made(model):
        return LowRankOptimizer(
            model.named_parameters(), 1e-2, 8, select="shape", ranks=Energy(low=0.9, high=0.95), refresh_every=2
        )

    model = Holder(torch.zeros(32, 40), torch.zeros(24, 20, 30), torch.zeros(7))
    optimizer = made(model)
    for t in range(7):
        feed(model, optimizer, t)
    optimizer.report_validation(1.5)
    resumed, state = copy.deepcopy(model), get_optimizer_state_dict(model, optimizer, options=options)
    state = copy.deepcopy(state)
    other = made(resumed)
    set_optimizer_state_dict(resumed, other, state, options=options)
    assert tuple(other.param_groups[0]["validation"]) == (1.5, 0, 0)
    for t in range(7, 12):
        feed(model, optimizer, t)
        feed(resumed, other, t)
    assert_same((resumed, other), (model, optimizer))


@pytest.mark.parametrize("source", ["adaptive", "fixed", "torch"])
@pytest.mark.parametrize("target", [ADAPT, Fixed()], ids=["adaptive", "fixed"])
def test_checkpoints_go_between_policies(source, target):
    """Adaptive ranks are resumed; a fixed optimizer keeps its own; from others the first ranks are those decided."""
    p = nn.Parameter(torch.zeros(32, 40))
    old = (
        torch.optim.AdamW([p], 1e-2)
        if source == "torch"
        else LowRankOptimizer([p], 1e-2, (8, None), ranks=ADAPT if source == "adaptive" else Fixed())
    )
    for t in range(3):
        step(old, p, randn((32, 40), torch.float32, t))
    new = LowRankOptimizer([p], 1e-2, (16, None), ranks=target)
    new.load_state_dict(through_file(old.state_dict()))
    step(new, p, randn((32, 40), torch.float32, 9))
    resumed = source == "adaptive" and target.adaptive
    if resumed:
        assert ranks_of(old, p) == (24, None)
    assert ranks_of(new, p) == ((32, None) if resumed else (16, None))
    step(new, p, randn((32, 40), torch.float32, 10))
    assert ("ranks" in new.state[p]) is target.adaptive
    assert bool(torch.isfinite(p).all())


@pytest.mark.parametrize("ranks", [[99, -1], [0, -1], [8, 8], [8]])
def test_a_checkpoint_with_ranks_that_do_not_fit_is_refused(ranks):
    p, optimizer = lone(torch.zeros(32, 40), rank=(8, None), ranks=ADAPT)
    step(optimizer, p, randn((32, 40), torch.float32))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["ranks"] = torch.tensor(ranks)
    before = optimizer.state[p]["frame.0"].clone()
    with pytest.raises(ValueError, match=r"parameter 0: the checkpoint has ranks .*\(32, 40\)"):
        optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[p]["frame.0"], before)


def test_a_smaller_budget_is_met_after_one_step():
    model, optimizer = competing(None, ADAPT)
    for t in range(9):
        feed(model, optimizer, t)
    large = state_bytes(optimizer, projected=True)
    other = LowRankOptimizer(
        [{k: v for k, v in g.items() if k != "validation"} for g in optimizer.param_groups],
        budget=large // 2,
    )
    state = through_file(optimizer.state_dict())
    asked = {key: entry["ranks"].clone() for key, entry in state["state"].items() if "ranks" in entry}
    other.load_state_dict(state)
    assert all(torch.equal(state["state"][key]["ranks"], value) for key, value in asked.items())  # not the caller's
    for t in range(9, 14):
        feed(model, other, t)
        assert large // 4 < state_bytes(other, projected=True) <= large // 2


# -------------------------------------------------------------------------------------------------- refusals, skipping


@dataclass(frozen=True)
class Other:
    """A layout that is not mode-wise, as far as the engine can tell."""

    inner: Modes = field(default_factory=Modes)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.inner, name)


@pytest.mark.parametrize("policy", [Energy(), Tolerance(), Temperature()], ids=lambda p: type(p).__name__)
def test_what_cannot_change_ranks_is_refused_with_the_reason(policy):
    for options, reason in (({"transport": Keep()}, "Keep.. cannot take moments"), ({"frame": Other()}, "spectrum")):
        with pytest.raises(ValueError, match=f"ranks={type(policy).__name__}.*parameter 0 is projected.*{reason}"):
            lone(torch.zeros(32, 40), rank=8, ranks=policy, **options)
        lone(torch.zeros(32, 40), rank=8, ranks=Fixed(), **options)
        lone(torch.zeros(32, 40), rank=1.0, ranks=policy, **options)  # dense: there is nothing to change


def test_bad_policies_are_refused():
    for value in ("energy", Energy, None, 8):
        with pytest.raises(TypeError, match="ranks must be a ranks part.*number of directions.*rank="):
            lone(torch.zeros(32, 40), ranks=value)
    for low, high in ((8, 4), (0.5, 0.25)):
        with pytest.raises(ValueError, match=f"minimum must be <= maximum, {high}, got {low}"):
            Energy(minimum=low, maximum=high)
    p, optimizer = lone(torch.zeros(32, 40), rank=8, ranks=Energy())
    optimizer.param_groups[0]["ranks"] = Fixed()
    with pytest.raises(ValueError, match="ranks cannot be edited"):
        step(optimizer, p, randn((32, 40), torch.float32))


def test_policies_have_names():
    assert part("ranks", "energy(low=0.4, minimum=8)") == Energy(low=0.4, minimum=8)
    assert part("ranks", "tolerance(error=0.2)") == Tolerance(error=0.2)
    assert part("ranks", "Temperature(steps=5, curve='exponential')") == Temperature(steps=5, curve="exponential")
    assert part("ranks", "fixed") == Fixed()
    optimizer = comoving.build("comoving-adamw", nn.Linear(32, 40), rank=8, ranks="energy(low=0.5)", budget=10**6)
    assert optimizer.param_groups[0]["ranks"] == Energy(low=0.5)
    assert through_file(optimizer.state_dict())["param_groups"][0]["ranks"]["part"] == "Energy"


@pytest.mark.parametrize("bad_at", [2, 4, 6])
@pytest.mark.parametrize("budget", [None, 10**6])
def test_a_skipped_step_at_a_change_of_rank_leaves_no_trace(bad_at, budget):
    def trained(with_bad):
        model, optimizer = competing(budget, ADAPT, every=2, on_nonfinite="skip")
        seen = []
        for t in range(9):
            if with_bad and t == bad_at:
                for p in model.parameters():
                    p.grad = torch.full_like(p, torch.nan)
                optimizer.step()
            feed(model, optimizer, t)
            seen.append([ranks_of(optimizer, p) for p in list(model.parameters())[:3]])
        return model, optimizer, seen

    a, b = trained(False), trained(True)
    assert a[2] == b[2]
    assert a[2][bad_at] != a[2][bad_at - 1]
    assert b[1].skipped_steps == 1
    assert_same(a, b)


def test_a_skipped_step_between_refreshes_is_undone():
    p, optimizer = lone(torch.zeros(32, 40), rank=(8, None), ranks=ADAPT, refresh_every=4, on_nonfinite="skip")
    for t in range(6):
        step(optimizer, p, randn((32, 40), torch.float32, t))
    before = {n: x.clone() for n, x in optimizer.state[p].items() if isinstance(x, torch.Tensor)}
    value = p.detach().clone()
    step(optimizer, p, torch.full((32, 40), torch.inf))
    assert torch.equal(p, value)
    assert all(torch.equal(x, optimizer.state[p][n]) for n, x in before.items() if n != "diagnostics")


def test_a_checkpoint_after_a_skipped_first_step_loads():
    p, optimizer = lone(torch.zeros(32, 40), rank=(8, None), ranks=ADAPT, on_nonfinite="skip")
    step(optimizer, p, torch.full((32, 40), torch.nan))
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    step(optimizer, p, randn((32, 40), torch.float32))
    assert ranks_of(optimizer, p) == (8, None)
