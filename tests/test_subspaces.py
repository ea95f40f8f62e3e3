"""Methods that walk, sample or orthogonalize in their subspace: each recipe against its paper's reference."""

import math

import pytest
import torch

import comoving
from comoving.draws import gaussian
from comoving.finders import Grassmann, Operand, RandomWalk
from comoving.frames import ModeFrame
from comoving.residual import Raw
from comoving.rules import LowRankAdam, LowRankMuon, Muon
from contract.support import COMPLEX, REAL, Holder, close, randn, random_frame
from references.algebra import every
from references.lora_pre import LoraPreAdam, LoraPreMuon
from references.side import Side
from references.subtrack import SubTrack, tracked, walked
from references.sumo import Sumo

STEPS = 24
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
MATRICES = pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)], ids=["wide", "tall", "square"])


def gradients(shape, dtype, seed):
    """A drifting signal in noise, whose size goes up and down: a limiter acts in some steps and not in others."""
    low, high = randn(shape, dtype, seed), randn(shape, dtype, seed + 1)
    drifting = [
        low * (1 - t / STEPS) + high * (t / STEPS) + 0.5 * randn(shape, dtype, 70 * seed + t) for t in range(STEPS)
    ]
    return [g * (1 + 0.5 * math.sin(t)) for t, g in enumerate(drifting)]


def built(recipe, shape, dtype, rank=None, **options):
    """Two parameters of one shape, which are stepped together, and the optimizer of both."""
    model = Holder(randn(shape, dtype, 1), randn(shape, dtype, 2))
    optimizer = comoving.build(recipe, model, 0.03, rank=rank, weight_decay=0.1, **options)
    return list(model.parameters()), optimizer


def follow(params, optimizer, references, check=lambda p, reference, g, t: None, tolerance=1e-8):
    """Step both sides side by side; the optimizer first, so that references can be told its frames."""
    series = [gradients(tuple(p.shape), p.dtype, 10 + i) for i, p in enumerate(params)]
    for t in range(STEPS):
        for p, own in zip(params, series, strict=True):
            p.grad = own[t].clone()
        optimizer.step()
        for p, reference, own in zip(params, references, series, strict=True):
            close(p.detach(), reference.step(own[t]), tolerance)
            check(p, reference, own[t], t)


def basis_of(optimizer, p):
    """The only factor of p's frame; G Q = G x_2 U^H needs Q = conj(U)."""
    state = optimizer.state[p]
    left, right = optimizer.param_groups[0]["frame"].load(state, tuple(p.shape), state["moment.first"]).factors
    return (left if right is None else right.conj()).clone()


# ------------------------------------------------------------------------------------------------------------- SUMO


@FIELDS
@MATRICES
def test_sumo(shape, dtype):
    """Block 3 has nothing to limit: moments of full rank have |O| = sqrt(r). Frames are the optimizer's own."""
    rule = Muon(decay=0.8, nesterov=False, method="polar", scale=0.7)
    params, optimizer = built("sumo", shape, dtype, 3, rule=rule, refresh_every=5, residual=Raw(rate=0.4))
    references = [
        Sumo(
            p.detach(), 0.03, 3, mu=0.8, weight_decay=0.1, scale=0.7, rest=0.4,
            find=lambda g, p=p: basis_of(optimizer, p), refresh_at=every(5, optimizer.sites[p].phase),
        )
        for p in params
    ]  # fmt: skip
    captured = []

    def check(p, reference, g, t):
        if reference.refresh_at(t):
            best = Side(shape).project(Side(shape).leading(g, 3), g).norm()
            captured.append(float(reference.side.project(reference.q, g).norm() / best))
        assert torch.equal(reference.q, basis_of(optimizer, p))

    follow(params, optimizer, references, check)
    assert len(captured) == 10
    assert min(captured) > 0.995  # a sketch that is read four times
    assert not any(reference.limited for reference in references)


def test_sumo_by_itself():
    """As it is built: an update of c Q O, c = 0.2 sqrt(max(m, n)), and the rest of the gradient as it is."""
    params, optimizer = built("sumo", (6, 10), REAL, 2)
    references = [
        Sumo(p.detach(), 0.03, 2, weight_decay=0.1, find=lambda g, p=p: basis_of(optimizer, p)) for p in params
    ]
    follow(params, optimizer, references)
    group = optimizer.param_groups[0]
    assert (group["refresh_every"], group["finder"].inertia, group["rule"].decay) == (200, 0.0, 0.95)


# --------------------------------------------------------------------------------- SubTrack++, GrassWalk and GrassJump

MOMENTS = {"betas": (0.8, 0.95), "eps": 1e-3}


def recovering(params, optimizer, rank, turn, **options):
    """References whose first frame is the optimizer's, for its signs are LAPACK's; ``turn`` makes the others."""

    def of(p):
        def first_or_turned(s, g):
            return basis_of(optimizer, p) if s is None else turn(p, s, g)

        refresh = every(optimizer.param_groups[0]["refresh_every"], optimizer.sites[p].phase)
        return SubTrack(
            p.detach(), 0.03, rank, first_or_turned, weight_decay=0.1, first_bounded=True, refresh_at=refresh,
            **MOMENTS, **options,
        )  # fmt: skip

    return [of(p) for p in params]


@FIELDS
@MATRICES
def test_subtrack(shape, dtype):
    """The frames too are the reference's: no refresh turns more than one direction, and none by more than pi/2."""
    params, optimizer = built(
        "subtrack", shape, dtype, 3, finder=Grassmann(rate=2e-2), refresh_every=4, scale=0.6, **MOMENTS
    )
    turns = []

    def turn(p, s, g):
        new = tracked(s, g, 2e-2)
        turns.append(torch.linalg.svdvals(new.mH @ s))
        return new

    references = recovering(params, optimizer, 3, turn, alpha=0.6)

    def check(p, reference, g, t):
        close(basis_of(optimizer, p), reference.s, 1e-9)
        close(optimizer.state[p]["moment.second"], reference.v.mT if reference.flipped else reference.v, 1e-9)
        if t == 0:
            start = Side(shape).leading(g, 3)
            close(start @ start.mH, reference.s @ reference.s.mH, 1e-9)

    follow(params, optimizer, references, check)
    cosines = torch.stack(turns)
    close(cosines[:, :2], torch.ones(len(turns), 2, dtype=REAL), 1e-9)
    assert 0.2 < float(cosines[:, 2].acos().mean()) < math.pi / 2
    assert float(cosines[:, 2].min()) > 0.1  # else the limit at pi/2 may have been at work, which is no paper's


@FIELDS
@MATRICES
def test_grasswalk(shape, dtype):
    finder = RandomWalk(rate=0.4, seed=3)
    params, optimizer = built("grasswalk", shape, dtype, 3, finder=finder, refresh_every=4, scale=0.6, **MOMENTS)
    mode, d = int(shape[0] > shape[1]), min(shape)
    count = dict.fromkeys(params, 0)

    def turn(p, s, g):
        count[p] += 1  # the first frame has taken draw 0
        x = gaussian((d, 3), s, 3, count[p], mode) * d**-0.5
        return walked(s, x.conj() if mode else x, 0.4)

    references = recovering(params, optimizer, 3, turn, alpha=0.6)
    follow(params, optimizer, references, lambda p, reference, g, t: close(basis_of(optimizer, p), reference.s, 1e-9))
    assert min(count.values()) >= 5


@FIELDS
def test_grassjump(dtype):
    params, optimizer = built("grassjump", (6, 10), dtype, 3, refresh_every=4, scale=0.6, **MOMENTS)
    references = recovering(params, optimizer, 3, lambda p, s, g: basis_of(optimizer, p), alpha=0.6)
    seen = []

    def check(p, reference, g, t):
        if reference.refresh_at(t):
            seen.append(reference.s @ reference.s.mH)

    follow(params, optimizer, references, check)
    assert min(float((a - b).norm()) for i, a in enumerate(seen) for b in seen[:i]) > 0.1


def test_the_authors_step_size_of_subtrack():
    """10 in their scripts for 60M to 350M parameters, every 200 steps at GaLore's scale."""
    group = built("subtrack", (6, 10), REAL, 2)[1].param_groups[0]
    assert (group["finder"], group["refresh_every"], group["scale"]) == (Grassmann(rate=10.0), 200, 0.25)


@FIELDS
def test_the_greedy_angle_captures_most(dtype):
    """Of all turns in the plane that the tangent names; none captures more."""
    x, s = randn((8, 12), dtype, 1), torch.linalg.qr(randn((8, 3), dtype, 2)).Q
    found = Grassmann().find(Operand(x), ModeFrame((s, None)), True, {}).factors[0]
    energies = []
    for theta in torch.linspace(0, math.pi / 2, 400, dtype=REAL):
        sigma = torch.linalg.svdvals((x - s @ (s.mH @ x)) @ (s.mH @ x).mH)[0]
        energies.append(float((tracked(s, x, theta / (2 * sigma)).mH @ x).norm()))
    assert float((s.mH @ x).norm()) < max(energies) <= float((found.mH @ x).norm()) * (1 + 1e-12)
    assert float((found.mH @ x).norm()) < max(energies) * (1 + 1e-4)


def test_a_huge_gradient_turns_the_frame_by_a_right_angle_and_a_tiny_one_by_none():
    x, s = randn((8, 12), torch.float32, 1), torch.linalg.qr(randn((8, 3), torch.float32, 2)).Q
    for size, cosine in ((1e30, 0.0), (1e-30, 1.0)):
        frame = Grassmann(rate=10.0).find(Operand(x * size), ModeFrame((s, None)), True, {})
        assert frame.defect() < 1e-5
        assert float(torch.linalg.svdvals(frame.factors[0].mT @ s)[-1]) == pytest.approx(cosine, abs=1e-5)


@FIELDS
@pytest.mark.parametrize("ranks", [(3, None), (6, None), (2, 4)], ids=str)
def test_a_walk_steps_by_the_angles_of_its_tangent(ranks, dtype):
    """Also where fewer directions are left than the frame has, and of both sides."""
    frame = random_frame((8, 12), ranks, dtype, 4)
    memory = {"draws": torch.tensor(5)}
    found = RandomWalk(rate=0.2, seed=1).find(Operand(randn((8, 12), dtype)), frame, True, memory)
    assert int(memory["draws"]) == 6
    for mode, (u, v) in enumerate(zip(frame.factors, found.factors, strict=True)):
        if u is not None:
            d, r = u.shape
            x = gaussian((d, r), u, 1, 5, mode) * d**-0.5
            sigma = torch.linalg.svdvals(x - u @ (u.mH @ x))[: min(r, d - r)]
            sines = torch.linalg.svdvals(v - u @ (u.mH @ v))[: min(r, d - r)]
            close(sines, (0.2 * sigma).sin(), 1e-9)


# --------------------------------------------------------------------------------------------------------- LoRA-Pre


def waves(k, n, dtype):
    """The lowest cosines, k x n."""
    angles = torch.outer(torch.arange(k, dtype=REAL), 2 * torch.arange(n, dtype=REAL) + 1) * (math.pi / (2 * n))
    rows = torch.cos(angles)
    return (rows / torch.linalg.norm(rows, dim=1, keepdim=True)).to(dtype)


@FIELDS
@MATRICES
@pytest.mark.parametrize("newest", [True, False])
def test_lora_pre(shape, newest, dtype):
    rule = LowRankAdam(3, newest=newest, limit=None)
    params, optimizer = built("lora-pre", shape, dtype, rule=rule, **(MOMENTS | {"eps": 0.1}))
    references = [
        LoraPreAdam(
            p.detach(), 0.03, waves(3, shape[1], dtype), betas=(0.8, 0.95), eps=0.1, weight_decay=0.1, newest=newest
        )
        for p in params
    ]
    follow(params, optimizer, references, tolerance=1e-7)


@FIELDS
@MATRICES
@pytest.mark.parametrize("newest", [True, False])
def test_lora_pre_of_muon(shape, newest, dtype):
    rule = LowRankMuon(3, inner=Muon(decay=0.8, nesterov=newest, method="polar", scale=0.7))
    params, optimizer = built("lora-pre-muon", shape, dtype, rule=rule)
    references = [
        LoraPreMuon(
            p.detach(), 0.03, waves(3, shape[1], dtype), beta=0.8, scale=0.7, weight_decay=0.1, newest=newest
        )
        for p in params
    ]  # fmt: skip
    follow(params, optimizer, references, tolerance=1e-7)
