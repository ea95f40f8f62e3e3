"""Moments at low rank: the formula's own properties, and what it does where it is singular."""

import math

import pytest
import torch

import comoving
from comoving.clock import Clock
from comoving.rules import LowRankAdam, LowRankMuon, Muon
from comoving.slots import Kind
from comoving.transport import initial
from contract.support import COMPLEX, REAL, Bare, close, lone, randn, step

RULES = [
    LowRankAdam(3),
    LowRankAdam(0.4, newest=False),
    LowRankMuon(3),
    LowRankMuon(0.4, inner=Muon(nesterov=False, method="polar")),
]
EVERY = pytest.mark.parametrize("rule", RULES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)


def momentum(bare, shape):
    return (bare.state["moment.first.left"] @ bare.state["moment.first.right"].mH).reshape(shape)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_a_standing_gradient_is_found_and_forgotten_as_the_average_forgets(dtype):
    """At full rank: what stands is the only fit; without a gradient both factors shrink, by sqrt(b) each."""
    bare, z = Bare(LowRankMuon(6, inner=Muon(decay=0.64)), (6, 6), dtype), randn((6, 6), dtype)
    for _ in range(60):
        bare.take(z)
    close(momentum(bare, (6, 6)), z, 1e-6)
    before = momentum(bare, (6, 6))
    bare.take(torch.zeros_like(z))
    close(momentum(bare, (6, 6)), 0.64 * before, 1e-9)


@EVERY
@DTYPES
@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_any_size_and_any_rank_of_gradients(rule, dtype, size):
    """Of rank one, of zeros, of one entry; afterwards the factors can still follow another direction."""
    bare = Bare(rule, (6, 8), dtype)
    for t in range(12):
        z = torch.zeros(6, 8, dtype=dtype)
        if t % 3 == 0:
            z = randn((6, 1), dtype, 1) * randn((1, 8), dtype, 2)
        elif t % 3 == 1:
            z[t % 6, t % 8] = 1
        d = bare.take(z * size)
        assert d.isfinite().all()
        assert all(x.isfinite().all() for x in bare.state.values())
    other = randn((6, 1), dtype, 3) * randn((1, 8), dtype, 4) * size
    for _ in range(200):
        assert bare.take(other).isfinite().all()
    assert (momentum(bare, (6, 8)) / size - other / size).norm() < 0.05 * (other / size).norm()


@EVERY
def test_zeros_do_not_lame_it(rule):
    bare = Bare(rule, (6, 8), torch.float32)
    for _ in range(3):
        assert not bare.take(torch.zeros(6, 8)).any()
    bare.take(randn((6, 8), torch.float32))
    for _ in range(2000):  # with b1 = 0.9 below the smallest number, were A not kept at its scale
        rule.absorb(torch.zeros(6, 8), bare.state, Clock(bare.t, 0.9, 0.99, 1))
    z = randn((6, 1), torch.float32, 3) * randn((1, 8), torch.float32, 4)
    for _ in range(200):
        bare.take(z)
    assert (momentum(bare, (6, 8)) - z).norm() < 0.05 * z.norm()


@EVERY
@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 5), (1, 7), (5,)], ids=str)
def test_rows_are_as_if_they_were_alone(rule, dtype, shape):
    alone = [Bare(rule, shape, dtype) for _ in range(3)]
    state = {name: torch.stack([bare.state[name] for bare in alone]) for name in alone[0].state}
    for t in range(6):
        z = torch.stack([randn(shape, dtype, 10 * t + b) * 10.0 ** (9 * b) for b in range(3)])
        clock = Clock(torch.tensor(t + 1.0), 0.9, 0.99, t + 1, 1)
        rule.absorb(z, state, clock)
        d = rule.direction(state, clock, 1e-8)
        for b, bare in enumerate(alone):
            close(d[b], bare.take(z[b]), 1e-9)


@pytest.mark.parametrize("newest", [True, False])
def test_entries_are_cut(newest):
    """Few live rows, and others later: the fit of |z| vanishes where that of z does not."""
    sizes = {}
    for limit in (2.0, None):
        bare = Bare(LowRankAdam(2, newest=newest, limit=limit), (6, 8), REAL)
        sizes[limit] = []
        for t in range(60):
            z = torch.zeros(6, 8, dtype=REAL)
            z[t // 7 % 6, :3], z[t % 6, t % 5] = randn((3,), seed=t), 0.1
            sizes[limit].append(float(bare.take(z).abs().max()))
    assert max(sizes[2.0]) == pytest.approx(2)
    assert max(sizes[None]) > 20


def test_its_slots():
    slots = {slot.name: slot for slot in LowRankAdam(0.3).slots((4, 3, 5))}
    assert [slot.size for slot in slots.values()] == [(4, 2), (15, 2), (4, 2), (15, 2)]
    assert all(slot.kind is Kind.THIN for slot in slots.values())
    assert [slot.real for slot in slots.values()] == [False, False, True, True]
    a = initial(slots["moment.first.right"], torch.empty(15, 2))
    close(a.T @ a, torch.eye(2), 1e-6)
    assert LowRankMuon(9).slots((4, 6))[0].size == (4, 4)


def test_it_serves_whole_frames_only():
    with pytest.raises(ValueError, match=r"rule=LowRankMuon.* is projected, and it keeps its momentum in factors of"):
        lone(randn((8, 12)), rank=2, rule=LowRankMuon(2))
    p, optimizer = lone(randn((8, 12)), rank=1.0, rule=LowRankMuon(2))
    step(optimizer, p, randn((8, 12)))
    assert sum(x.numel() for n, x in optimizer.state[p].items() if n.startswith("moment")) == 2 * (8 + 12)


def test_by_text():
    part = comoving.parts.part("rule", "low_rank_muon(rank=4, inner='muon(decay=0.9)')")
    assert part == LowRankMuon(4, inner=Muon(decay=0.9))
    with pytest.raises(ValueError, match="inner must be a Muon"):
        LowRankMuon(inner=LowRankAdam())
    for rank in (0, 0.0, 1.5):
        with pytest.raises(ValueError, match=f"rank must .*got {rank}"):
            LowRankAdam(rank)
    with pytest.raises(ValueError, match="newest must"):
        LowRankAdam(newest=2)
    assert math.isclose(LowRankMuon().recursion(Clock(torch.tensor(1.0), 0.9, 0.99))[0], 0.95)
