"""Switched off, the engine is torch's AdamW; on a gradient that the frame can hold, nothing is lost."""

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving.finders import Exact, Power
from comoving.residual import Feedback
from comoving.transport import Carry, Keep, Rotate
from contract.support import (
    COMPLEX,
    FINDERS,
    REAL,
    Holder,
    close,
    feedback_of,
    frame_of,
    known_rank,
    lone,
    randn,
    search,
    step,
)

HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}
SHAPES = [(6, 9), (9, 6), (7,), (4, 3, 5), ()]
KERNELS = [
    {},
    {"foreach": False},
    {"foreach": True},
    {"fused": True},
    {"amsgrad": True},
    {"maximize": True},
    {"amsgrad": True, "maximize": True, "foreach": True},
    {"amsgrad": True, "fused": True},
]


def both(ours, theirs, shapes, dtype, steps=12):
    """Step the same parameters with both optimizers, with a rate that changes on the way; (ours, theirs) at the end."""
    pairs = [
        (nn.Parameter(x.clone()), nn.Parameter(x.clone())) for x in (randn(s, dtype, i) for i, s in enumerate(shapes))
    ]
    optimizers = ours([a for a, _ in pairs]), theirs([b for _, b in pairs])
    for t in range(steps):
        for i, (a, b) in enumerate(pairs):
            a.grad = randn(a.shape, dtype, 100 * t + i)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = HYPER["lr"] / (1 + t)
            optimizer.step()
    return [(a.detach(), b.detach()) for a, b in pairs], optimizers


@pytest.mark.parametrize("options", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, REAL, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LowRankOptimizer, comoving.AdamW])
def test_rank_one_is_torchs_adamw_bit_for_bit(kind, options, dtype):
    pairs, (ours, _) = both(
        lambda p: kind(p, rank=1.0, **HYPER, **options),
        lambda p: torch.optim.AdamW(p, **HYPER, **options),
        SHAPES,
        dtype,
    )
    for a, b in pairs:
        assert torch.equal(a, b)
    start = randn(SHAPES[0], dtype, 0)
    assert not torch.equal(pairs[0][0], start)
    assert ("moment.second.max" in ours.state[ours.param_groups[0]["params"][0]]) == options.get("amsgrad", False)


@pytest.mark.parametrize("option", ["foreach", "fused"])
def test_the_kernel_is_handed_over(option, monkeypatch):
    """Equal bits prove little where kernels agree: see that torch's function is told."""
    import comoving.drivers.dense as module  # noqa: PLC0415

    holders = [m for m in vars(module).values() if callable(m) and getattr(m, "__name__", "") == "adam"]
    assert holders, "torch's function is called from elsewhere: this test must follow it"
    said = {}
    name = next(n for n, m in vars(module).items() if m is holders[0])
    monkeypatch.setattr(module, name, lambda *args, **kw: said.update(kw))
    p, optimizer = lone(randn((5,)), **{option: True})
    step(optimizer, p, randn((5,)))
    assert said[option] is True


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((6, 9), (6, 9)), ((6, 9), 6), ((6, 9), (None, None)), ((4, 3, 5), (4, 3, 5)), ((10, 9, 8), 10), ((3, 3, 3), 2)],
    ids=str,
)
def test_ranks_that_cover_every_mode_are_torchs_adamw(shape, rank):
    """A tuple of full ranks, an int no smaller than the mode, modes too short to compress."""
    pairs, (ours, _) = both(
        lambda p: LowRankOptimizer(p, rank=rank, side="both" if shape == (6, 9) and rank == 9 else "auto", **HYPER),
        lambda p: torch.optim.AdamW(p, **HYPER),
        [shape],
        torch.float32,
    )
    assert torch.equal(*pairs[0])
    assert not any(site.projected for site in ours.sites.values())


@pytest.mark.parametrize("dtype", [torch.complex64, COMPLEX])
def test_a_dense_complex_parameter_with_real_entries_is_the_real_one(dtype):
    a, complex_optimizer = lone(randn((5, 6)).to(dtype), rank=1.0, **HYPER)
    b, real_optimizer = lone(randn((5, 6)).to(dtype.to_real()), rank=1.0, **HYPER)
    for t in range(10):
        g = randn((5, 6), seed=t)
        step(complex_optimizer, a, g.to(dtype))
        step(real_optimizer, b, g.to(dtype.to_real()))
    close(a.detach().real.double(), b.detach().double(), 1e-6)
    assert not a.detach().imag.any()


@pytest.mark.parametrize("recipe", ["galore", "ldadam", "tensor-galore", "tucker-adam", "comoving-adamw"])
@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_maximize_is_the_negated_gradient(recipe, shape, dtype):
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        model = Holder(randn(shape, dtype))
        optimizer = comoving.build(recipe, model, 0.02, rank=2, maximize=maximize, refresh_every=2)
        for t in range(6):
            step(optimizer, model.w0, sign * randn(shape, dtype, t))
        results.append(model.w0.detach())
    close(*results, 1e-12)


KNOWN = [
    ((8, 12), (3, None)),
    ((12, 8), (None, 3)),
    ((9, 9), (3, 3)),
    ((6, 5, 7), (2, None, 3)),
    ((4, 5, 3, 6), (2, 2, 2, 2)),
]


@pytest.mark.parametrize("dtype", [REAL, COMPLEX, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize(("shape", "ranks"), KNOWN, ids=str)
@pytest.mark.parametrize("finder", FINDERS, ids=str)
@pytest.mark.parametrize("spare", [0, 1])
def test_a_tensor_of_known_rank_is_recovered(finder, shape, ranks, spare, dtype):
    """F F^H g = g after one search, cold, when the frame has the multilinear rank of g or more."""
    g = known_rank(shape, ranks, dtype)
    wanted = tuple(None if r is None else r + spare for r in ranks)
    _, frame = search(finder, g, wanted, False)
    gap = (frame.lift(frame.project(g)) - g).norm() / g.norm()
    gram_limit = getattr(finder, "method", "svd") == "gram" or getattr(finder, "start", "") == "exact"
    assert frame.ranks == wanted
    assert gap <= (5e-3 if gram_limit or spare else 1e-3 if dtype in (torch.float32, torch.complex64) else 1e-7)
    truth = g + 0.5 * g.norm() / g.numel() ** 0.5 * randn(shape, dtype, 5)
    assert (frame.lift(frame.project(truth)) - truth).norm() > 0.1 * gap  # a frame, not the identity


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize(("shape", "ranks"), KNOWN, ids=str)
@pytest.mark.parametrize("transport", [Keep(), Rotate(), Carry()], ids=lambda t: type(t).__name__)
def test_with_a_large_eps_a_gradient_of_known_rank_moves_the_parameter_along_itself(shape, ranks, transport, dtype):
    """Adam with eps far above |g| is momentum descent, which sees no frame: the way is -lr m-hat / eps, exactly."""
    start, eps, b1 = randn(shape, dtype), 1e9, 0.8
    p, optimizer = lone(
        start, rank=ranks, transport=transport, finder=Exact(method="svd"), residual=Feedback(), scale=1.0,
        lr=eps, betas=(b1, 0.95), eps=eps, weight_decay=0.0, refresh_every=3,
    )  # fmt: skip
    g, m, expected = known_rank(shape, ranks, dtype), torch.zeros(shape, dtype=dtype), start
    for t in range(8):
        if isinstance(transport, Keep) and t == 3:
            break  # from there on its coordinates are others'
        step(optimizer, p, g * (1 + t))
        m = b1 * m + (1 - b1) * g * (1 + t)
        expected = expected - m / (1 - b1 ** (t + 1))
        close(p.detach(), expected, 1e-6)
        assert feedback_of(optimizer, p).norm() < 1e-6 * g.norm()


def test_the_matrix_is_lost_where_the_conjugation_is_forgotten():
    """galore-torch's fault: 51% of an exactly rank-4 complex gradient; ours is none."""
    g = known_rank((16, 24), (4, None), COMPLEX)
    p, optimizer = lone(torch.zeros_like(g), rank=4, finder=Exact())
    step(optimizer, p, g)
    u = frame_of(optimizer, p).factors[0]
    assert (u @ (u.mH @ g) - g).norm() < 1e-6 * g.norm()
    assert (u @ (u.mT @ g) - g).norm() > 0.2 * g.norm()


def test_the_frame_follows_the_gradient():
    """TensorGRaD's fault: the subspace of the first gradient is kept for ever."""
    shape, ranks = (6, 5, 7), (2, None, 3)
    for finder in (Exact(), Exact(sweeps=1), Power(inertia=0.0)):
        p, optimizer = lone(torch.zeros(shape, dtype=REAL), rank=ranks, finder=finder, refresh_every=2)
        for t in range(6):
            g = known_rank(shape, ranks, seed=t // 2)
            step(optimizer, p, g)
            frame = frame_of(optimizer, p)
            assert (frame.lift(frame.project(g)) - g).norm() < 1e-6 * g.norm()
