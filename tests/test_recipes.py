"""Each recipe, as it is built, follows a float64 reference written from its paper, with no hyper-parameter neutral."""

import pytest
import torch

import comoving
from comoving.codecs import Full, Int8
from comoving.finders import Power
from comoving.frames import Modes
from contract.support import COMPLEX, REAL, Holder, close, feedback_of, frame_of, randn
from references.adamw import AdamW
from references.algebra import every, hosvd, power, unfold
from references.galore import GaLore
from references.ldadam import LDAdam
from references.tensor_galore import TensorGaLore, tucker
from references.tucker_adam import TuckerAdam

HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
STEPS = 31
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
MATRICES = pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)], ids=["wide", "tall", "square"])
TENSORS = pytest.mark.parametrize(
    ("shape", "ranks"),
    [((6, 10), (2, None)), ((10, 6), (3, 3)), ((6, 4, 5), (2, None, 3)), ((4, 3, 5, 3), (2, 2, 2, None))],
    ids=["one side", "both sides", "3-D", "4-D"],
)


def build(recipe, shape, dtype, rank, **options):
    """Two parameters of one shape, which are stepped together where all parts allow it, and the optimizer of both."""
    model = Holder(randn(shape, dtype, 1), randn(shape, dtype, 2))
    optimizer = comoving.build(recipe, model, rank=rank, **(HYPER | options))
    params = list(model.parameters())
    assert all(optimizer.sites[p].projected == (recipe != "adamw") for p in params)
    return params, optimizer


def gradients(shape, dtype, seed):
    """A drifting signal in noise: frames turn from refresh to refresh, and there is momentum to lose."""
    low, high = randn(shape, dtype, seed), randn(shape, dtype, seed + 1)
    return [low * (1 - t / STEPS) + high * (t / STEPS) + 0.5 * randn(shape, dtype, 50 * seed + t) for t in range(STEPS)]


def run(params, optimizer, references, check=lambda p, reference, g, t: None, tolerance=1e-7):
    """Step both sides side by side; the optimizer first, so that references can be told its frames."""
    series = [gradients(tuple(p.shape), p.dtype, 10 + i) for i, p in enumerate(params)]
    for t in range(STEPS):
        for p, own in zip(params, series, strict=True):
            p.grad = own[t].clone()
        optimizer.step()
        for p, reference, own in zip(params, references, series, strict=True):
            expected = reference.step(own[t])
            close(p.detach(), expected, tolerance)
            check(p, reference, own[t], t)


def same_span(a, b, tolerance=1e-6):
    close(a @ a.mH, b @ b.mH, tolerance)


@FIELDS
@pytest.mark.parametrize("shape", [(6, 10), (5,), (4, 3, 5)])
def test_adamw(shape, dtype):
    params, optimizer = build("adamw", shape, dtype, rank=0.25)
    run(params, optimizer, [AdamW(p.detach(), **HYPER) for p in params], tolerance=1e-12)
    assert not any(optimizer.state[p]["moment.second"].is_complex() for p in params) or dtype is REAL


@FIELDS
@MATRICES
def test_galore(shape, dtype):
    params, optimizer = build("galore", shape, dtype, rank=2, refresh_every=7, scale=0.3)
    left = shape[0] <= shape[1]
    seen = {}

    def ours(p):
        factors = frame_of(optimizer, p).factors
        return factors[0] if left else factors[1].conj()  # G Q = G x_2 U^H needs Q = conj(U)

    def reference(p):
        phase = optimizer.sites[p].phase
        return GaLore(p.detach(), rank=2, refresh_at=every(7, phase), scale=0.3, find=lambda g: ours(p), **HYPER)

    def check(p, reference, g, t):
        if reference.refresh_at(t):
            seen[p] = ours(p)
            same_span(seen[p], reference.exact(g))
        assert torch.equal(seen[p], ours(p))  # the frame stands between refreshes

    run(params, optimizer, [reference(p) for p in params], check)


@FIELDS
@MATRICES
@pytest.mark.parametrize("period", [1, 3])
def test_ldadam(shape, period, dtype):
    params, optimizer = build("ldadam", shape, dtype, rank=2, refresh_every=period, scale=1.0)
    references = [
        LDAdam(p.detach(), rank=2, refresh_at=every(period, optimizer.sites[p].phase), rho=0.908, **HYPER)
        for p in params
    ]

    def check(p, reference, g, t):
        state = optimizer.state[p]
        close(feedback_of(optimizer, p), reference.e, 1e-6)
        close(state["moment.second"], reference.v, 1e-6)

    run(params, optimizer, references, check)


@FIELDS
@TENSORS
def test_tensor_galore(shape, ranks, dtype):
    params, optimizer = build("tensor-galore", shape, dtype, rank=ranks, refresh_every=7, scale=0.7)
    find = tucker(ranks, n_iter=1)

    def reference(p):
        refresh = every(7, optimizer.sites[p].phase)
        ours = lambda g, old: list(frame_of(optimizer, p).factors)  # noqa: E731
        return TensorGaLore(p.detach(), ranks=ranks, refresh_at=refresh, scale=0.7, find=ours, **HYPER)

    def check(p, reference, g, t):
        if reference.refresh_at(t):
            for u, expected in zip(frame_of(optimizer, p).factors, find(g, None), strict=True):
                assert (u is None) == (expected is None)
                if u is not None:
                    same_span(u, expected)

    run(params, optimizer, [reference(p) for p in params], check)


def follow_first_frame(optimizer, p, ranks):
    """The power iteration of the reference, started from the first frame that the optimizer found."""
    own = power(ranks)
    return lambda operand, old: list(frame_of(optimizer, p).factors) if old is None else own(operand, old)


def tucker_references(params, optimizer, ranks, **options):
    return [
        TuckerAdam(
            p.detach(),
            find=follow_first_frame(optimizer, p, ranks),
            refresh_at=every(4, optimizer.sites[p].phase),
            rho=0.9,
            raw_floor=True,
            **HYPER,
            **options,
        )
        for p in params
    ]


@FIELDS
@TENSORS
@pytest.mark.parametrize(
    ("recipe", "transport"), [("tucker-adam", "rotate"), ("comoving-adamw", "rotate"), ("comoving-adamw", "carry")]
)
@pytest.mark.parametrize("scale", ["match", "0.2-match", 0.4])
def test_update_aware(recipe, transport, shape, ranks, dtype, scale):
    given = {"transport": transport, "finder": Power(inertia=0.9)}  # the references iterate in short modes too
    given |= {"codec": Full(), "moments": Full()}
    params, optimizer = build(recipe, shape, dtype, rank=ranks, scale=scale, refresh_every=4, **given)
    references = tucker_references(params, optimizer, ranks, transport=transport, scale=scale)

    def check(p, reference, g, t):
        close(feedback_of(optimizer, p), reference.e, 1e-6)
        if transport == "carry":
            mass = optimizer.state[p]["moment.second.mass"]
            assert mass.shape == tuple(1 if r is None else r for r in ranks)
            close(mass.expand(reference.core), reference.kappa, 1e-6)

    run(params, optimizer, references, check)


@FIELDS
@TENSORS
def test_first_frame_is_three_power_iterations_from_a_seeded_start(shape, ranks, dtype):
    params, optimizer = build("comoving-adamw", shape, dtype, rank=ranks, seed=5, finder=comoving.finders.Power(cold=3))
    for p in params:
        p.grad = randn(shape, dtype, 3)
    optimizer.step()
    for i, p in enumerate(params):
        start = Modes().start(p.grad, ranks, None, 5 + i).factors
        for n, (found, u) in enumerate(zip(frame_of(optimizer, p).factors, start, strict=True)):
            if u is not None:
                o = unfold(p.grad, n)
                same_span(found, torch.linalg.qr(torch.linalg.matrix_power(o @ o.mH, 3) @ u).Q)


@FIELDS
@TENSORS
def test_comoving_in_eight_bits_stays_close(shape, ranks, dtype):
    """Eight bits round each entry of the feedback by 0.4% of the largest at most; the way differs by under 5%."""
    finder = Power(inertia=0.9)  # the references iterate in short modes too
    params, optimizer = build("comoving-adamw", shape, dtype, rank=ranks, refresh_every=4, scale="match", finder=finder)
    starts = [p.detach().clone() for p in params]
    references = tucker_references(params, optimizer, ranks, transport="rotate", scale="match")
    run(params, optimizer, references, tolerance=0.1)
    for p, start, reference in zip(params, starts, references, strict=True):
        gap, way = (p.detach() - reference.p).norm(), (reference.p - start).norm()
        assert 0 < gap < 0.08 * way
    assert optimizer.state[params[0]]["feedback.gradients.codes"].dtype is torch.int8


@FIELDS
def test_feedback_suffix(dtype):
    """galore+ef is GaLore's frame and scale with generalized error feedback and kept moments."""
    shape, ranks = (6, 10), (2, None)
    params, optimizer = build("galore+ef", shape, dtype, rank=2, refresh_every=5, scale=0.3)
    references = [
        TuckerAdam(
            p.detach(),
            find=lambda g, old, p=p: list(frame_of(optimizer, p).factors),
            transport="keep",
            refresh_at=every(5, optimizer.sites[p].phase),
            scale=0.3,
            **HYPER,
        )
        for p in params
    ]

    def check(p, reference, g, t):
        before[p], previous = reference.e, before.get(p, torch.zeros_like(g))
        if reference.refresh_at(t):
            same_span(frame_of(optimizer, p).factors[0], hosvd(ranks)(g + previous, None)[0])
        close(feedback_of(optimizer, p), reference.e, 1e-6)

    before = {}
    run(params, optimizer, references, check)


def test_defaults_are_the_papers():
    """What the recipes set by themselves, read off the built optimizer."""
    model = Holder(randn((16, 24)))
    group = {name: comoving.build(name, model, rank=2).param_groups[0] for name in comoving.recipes()}
    assert (group["galore"]["refresh_every"], group["galore"]["scale"]) == (200, 0.25)
    assert (group["ldadam"]["refresh_every"], group["ldadam"]["scale"]) == (1, 1.0)
    assert group["ldadam"]["betas"] == (0.908, 0.99)
    assert group["ldadam"]["finder"].inertia == 0.908
    assert group["tensor-galore"]["finder"].sweeps > 0
    assert group["galore"]["finder"].inertia == group["tensor-galore"]["finder"].inertia == 0.0
    assert [group[name]["scale"] for name in ("foam", "gwt")] == [0.25, 0.25]
    assert (group["snsm"]["refresh_every"], group["snsm"]["residual"].decay) == (200, None)
    assert group["adamw"]["rank"] == 1.0
    default = comoving.AdamW(model.parameters(), rank=2).param_groups[0]
    assert {k: v for k, v in group["comoving-adamw"].items() if k in comoving.recipes()["comoving-adamw"].options} == {
        k: default[k] for k in comoving.recipes()["comoving-adamw"].options
    }


@pytest.mark.parametrize("recipe", ["adamw", "muon", "soap"])
@pytest.mark.parametrize(
    "options",
    [
        {"codec": Int8()},
        {"finder": "exact"},
        {"transport": "carry"},
        {"residual": "feedback"},
        {"budget": 1},
        {"scale": "match"},
    ],
)
def test_what_full_rank_would_ignore_is_refused(recipe, options):
    with pytest.raises(ValueError, match=f"{recipe} has full rank: {next(iter(options))} would have nothing to act on"):
        comoving.build(recipe, torch.nn.Linear(16, 24), **options)


def test_feedback_of_full_rank_is_refused():
    with pytest.raises(ValueError, match=r"muon\+ef has full rank: \+ef would have nothing"):
        comoving.build("muon+ef", torch.nn.Linear(16, 24))
