"""FOAM, GWT and SNSM as they are built, beside references from their papers; pooled frames, and what is refused."""

import pytest
import torch

import comoving
from comoving.cadence import Every
from comoving.codecs import Full, Int8
from comoving.finders import Standing, TrainSVD
from comoving.frames import Pooled, PooledFrame, Trains
from comoving.residual import Details, Folded, SubsetNorm
from comoving.rules import Lion
from comoving.transport import Carry, Rotate
from contract.support import COMPLEX, REAL, close, explicit, frame_of, lone, randn, step
from references.algebra import every
from references.foam import Foam
from references.gwt import Gwt, haar, inverse
from references.snsm import Snsm
from test_recipes import HYPER, build, run, same_span

FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
HUGE, TINY = 1e30, 1e-30

# ------------------------------------------------------------------------------------------------------------- frames


@FIELDS
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((6, 8), (None, 2)), ((6, 10), (None, 3)), ((8, 9), (2, 3)), ((3, 7, 5), (None, 3, 5))],
    ids=str,
)
@pytest.mark.parametrize("rows", [0, 1])
def test_a_pooled_frame_is_its_explicit_factors(rows, shape, ranks, dtype):
    ranks = tuple(None if r == d else r for r, d in zip(ranks, shape, strict=True))
    x = randn((*[4] * rows, *shape), dtype, 1)
    frame = Pooled().start(x, ranks, None, 0)
    assert frame == Pooled().load(frame.tensors(), shape, x)
    for u, d, r in zip(frame.factors, shape, ranks, strict=True):
        if r is not None:
            assert tuple(u.shape) == (d, r)
            close(u.mT @ u, torch.eye(r, dtype=dtype), 1e-14)
            lengths = (u != 0).sum(0)
            assert lengths.max() - lengths.min() <= (d % r != 0)
            assert (u.abs().argmax(1).diff() >= 0).all()
    full = explicit(frame, shape, dtype)
    z = x.reshape(*[4] * rows, -1) @ full
    core = Pooled().core_shape(shape, ranks)
    close(frame.project(x), z.reshape(*[4] * rows, *core), 1e-13)
    lifted = (z @ full.mT).reshape(x.shape)
    close(frame.lift(frame.project(x)), lifted, 1e-13)
    strided = torch.stack([x, x], -1)[..., 0]
    assert frame.add_lift(strided, frame.project(x), -0.7, 0.4).data_ptr() == strided.data_ptr()
    close(strided, 0.4 * x - 0.7 * lifted, 1e-13)
    v = frame.project(x).abs() ** 2
    close(frame.lift_squares(v), (v.flatten(-len(shape)) @ (full.abs() ** 2).mT).reshape(x.shape), 1e-13)
    other = Pooled().start(x, tuple(r and 1 for r in ranks), None, 0)
    for a, b in ((frame, other), (other, frame)):
        close(a.overlap(b).move(b.project(x)), a.project(b.lift(b.project(x))), 1e-13)
    assert frame.overlap(frame).matrices == (None,) * len(shape)


@pytest.mark.parametrize(
    ("shape", "rank", "side", "ranks"),
    [
        ((6, 16), 0.25, "auto", (None, 4)),
        ((16, 6), 0.5, "auto", (None, 3)),
        ((16, 6), 1 / 4, "left", (4, None)),
        ((6, 10), 1 / 8, "auto", (None, 2)),
        ((6, 9), 1 / 3, "auto", (None, 3)),
        ((6, 4), 1e-3, "auto", (None, 1)),
        ((6, 16), 3, "auto", (None, 3)),
        ((8, 8), 0.25, "both", (4, 4)),
        ((8, 16, 9, 3), 0.25, "auto", (None, None, 3, None)),
        ((6, 16), (2, None), "auto", (2, None)),
        ((6, 16), 1.0, "auto", (None, None)),
        ((4, 4, 4), 0.5, "auto", (None, None, None)),
        ((6, 8), 0.99, "auto", (None, None)),
    ],
)
def test_a_share_is_that_of_the_last_mode(shape, rank, side, ranks):
    assert Pooled().ranks(shape, rank, side) == ranks


# -------------------------------------------------------------------------------------------------------------- recipes


@FIELDS
@pytest.mark.parametrize(
    ("shape", "rank", "blocks"),
    [((6, 16), 1 / 4, 4), ((10, 6), 2, 2), ((5, 10), 1 / 4, 3), ((3, 4, 8), 1 / 8, 1)],
    ids=str,
)
def test_foam(shape, rank, blocks, dtype):
    """Also where runs are of different lengths."""
    params, optimizer = build("foam", shape, dtype, rank=rank, refresh_every=7, scale=0.7)
    run(params, optimizer, [Foam(p.detach(), blocks=blocks, scale=0.7, **HYPER) for p in params], tolerance=1e-11)
    p = params[0]
    assert optimizer.state[p]["moment.second"].shape == (*shape[:-1], blocks)
    assert not any(name.startswith("held") for name in optimizer.state[p])


@FIELDS
@pytest.mark.parametrize(("shape", "levels"), [((6, 16), 2), ((10, 8), 3), ((5, 6), 1)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"growth": None, "limit": None}, {"growth": 1.1, "limit": 2.0}, {"limit": None}], ids=str
)
def test_gwt(options, shape, levels, dtype):
    """Without a transform: beside a Haar transform of several levels, its details divided one by one."""
    given = {"growth": 1.01, "limit": 10.0} | options
    params, optimizer = build(
        "gwt", shape, dtype, rank=2.0**-levels, refresh_every=7, scale=0.7, residual=Details(**options)
    )
    references = [Gwt(p.detach(), levels=levels, scale=0.7, **given, **HYPER) for p in params]
    unlimited = [Gwt(p.detach(), levels=levels, scale=0.7, growth=None, **HYPER) for p in params]

    def check(p, reference, g, t):
        other = unlimited[next(i for i, q in enumerate(params) if q is p)]
        other.step(g)
        if given["growth"] is not None:
            close(optimizer.state[p]["scaled.norm"], torch.tensor(reference.last, dtype=REAL))

    run(params, optimizer, references, check, tolerance=1e-10)
    gap = max(float((a.p - b.p).abs().max()) for a, b in zip(references, unlimited, strict=True))
    assert (gap > 1e-3) is (given["growth"] is not None)


def test_the_haar_transform_of_the_reference_is_orthogonal_and_inverted():
    x = randn((3, 8))
    a, details = haar(x, 2)
    close(inverse(a, details), x, 1e-13)
    close(sum((y**2).sum() for y in (a, *details)), (x**2).sum(), 1e-12)
    close(a, x.unflatten(-1, (2, 4)).sum(-1) / 2, 1e-13)


@FIELDS
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("options", [{}, {"decay": 0.9}, {"limit": 0.05}, {"limit": None}], ids=str)
def test_snsm(options, shape, dtype):
    residual = SubsetNorm(**options)
    params, optimizer = build("snsm", shape, dtype, rank=2, refresh_every=7, scale=0.7, residual=residual)
    left, seen = shape[0] <= shape[1], {}

    def ours(p):
        factors = frame_of(optimizer, p).factors
        return factors[0] if left else factors[1].conj()

    references = [
        Snsm(
            p.detach(),
            rank=2,
            refresh_at=every(7, optimizer.sites[p].phase),
            scale=0.7,
            find=lambda g, p=p: ours(p),
            **({"limit": 10.0} | options),
            **HYPER,
        )
        for p in params
    ]

    def check(p, reference, g, t):
        if reference.refresh_at(t):
            seen[p] = ours(p)
            same_span(seen[p], reference.side.leading(g, 2))
        assert torch.equal(seen[p], ours(p))

    run(params, optimizer, references, check, tolerance=1e-9)
    assert optimizer.state[params[0]]["subset.norm"].shape == (max(shape),)


def test_they_are_as_small_as_they_say():
    """Bytes of a 64 x 256 matrix: 8 / 2^l an entry; k rows of momentum, a basis and one number a slice."""
    numbers = {"foam": 2 * 64 * 32, "gwt": 2 * 64 * 32 + 1, "snsm": 8 * 256 + 8 * 64 + 256}
    for name, expected in numbers.items():
        p = torch.nn.Parameter(torch.zeros(64, 256))
        optimizer = comoving.build(name, [p], rank=8 if name == "snsm" else 1 / 8)
        step(optimizer, p, randn((64, 256), torch.float32))
        stored = sum(x.numel() for x in optimizer.state[p].values() if torch.is_tensor(x) and x.ndim and x.numel() != 6)
        assert stored + (name == "gwt") == expected


@pytest.mark.parametrize("name", ["foam", "gwt", "snsm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("eps", [1e-15, 1e-8])
def test_any_finite_gradient_moves_weights_by_no_more_than_a_bound(name, dtype, eps):
    """Zeros, entries of every size in one tensor, runs of sum zero, rows that wake up: bounded by the rate."""
    bound = {"foam": 2 * 0.25, "gwt": 0.25 * 20, "snsm": 5 * 10.5}[name]
    p, shape = torch.nn.Parameter(torch.zeros(8, 16, dtype=dtype)), (8, 16)
    optimizer = comoving.build(name, [p], lr=1.0, rank=1 / 4, eps=eps, refresh_every=3)
    sizes = torch.tensor([0.0, TINY, 1e-15, 1.0, 1e15, HUGE, 1.0, 0.0]).unsqueeze(-1)
    alternating = torch.ones(shape).cumsum(1).remainder(2) * 2 - 1
    series = [
        torch.zeros(shape),
        randn(shape, torch.float32, 1) * sizes,
        alternating * sizes,
        alternating + 1e-7 * randn(shape, torch.float32, 2),
        randn(shape, torch.float32, 3) * sizes.flip(0),
        torch.zeros(shape),
        torch.full(shape, TINY),
        torch.full(shape, HUGE),
    ]
    for g in series:
        before = p.detach().clone()
        step(optimizer, p, g.to(dtype))
        assert p.detach().isfinite().all()
        assert (p.detach() - before).abs().max() <= bound
    assert all(not x.isnan().any() for x in optimizer.state[p].values() if torch.is_tensor(x))


@pytest.mark.parametrize("name", ["foam", "gwt"])
def test_moments_in_eight_bits_are_read_before_they_are_rounded(name):
    """After a step the codes are within their own error of the reference; the first update has none."""
    start, g = randn((6, 64), torch.float32, 1), randn((6, 64), torch.float32, 2)
    moved = []
    for moments in (Full(), Int8()):
        p, optimizer = lone(start, **(comoving.recipes()[name].options | {"moments": moments, "rank": 0.25, "lr": 0.1}))
        step(optimizer, p, g)
        moved.append(p.detach().clone())
    assert torch.equal(*moved)


@FIELDS
def test_foam_and_gwt_in_a_frame_that_turns(dtype):
    """|F|^2 v in any mode-wise frame: with the carried mass of v too, updates are bounded."""
    for residual in (Folded(), Details(limit=3.0)):
        for transport in (Rotate(), Carry()):
            p, optimizer = lone(
                randn((8, 12), dtype),
                rank=2,
                side="both",
                lr=1.0,
                residual=residual,
                transport=transport,
                refresh_every=2,
            )
            for t in range(7):
                before = p.detach().clone()
                step(optimizer, p, randn((8, 12), dtype, t))
                assert 0.0 < (p.detach() - before).abs().max() < 50.0


def test_a_whole_frame_of_foam_is_adam():
    """Runs of one entry leave no rest."""
    start, gradients = randn((4, 6)), [randn((4, 6), REAL, t + 1) for t in range(6)]
    reference = Foam(start, blocks=6, scale=1.0, **HYPER)
    adam = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([adam], **HYPER)
    for g in gradients:
        step(optimizer, adam, g)
        close(reference.step(g), adam.detach(), 1e-12)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_has_no_second_moment_to_read_is_refused():
    p = torch.nn.Parameter(torch.zeros(8, 16))
    with pytest.raises(ValueError, match=r"residual Folded\(\) is refused: it divides by the second moment of Adam"):
        comoving.build("foam", [p], rule=Lion())
    trains = {"frame": Trains(), "finder": TrainSVD(), "residual": Details()}
    with pytest.raises(ValueError, match=r"residual Details.* frame Trains.* has no factors"):
        comoving.LowRankOptimizer([p], **trains)
    with pytest.raises(TypeError, match="cannot fill"):
        comoving.LowRankOptimizer([p], finder=Standing())
    with pytest.raises(ValueError, match="bases=.* is refused: frame Pooled"):
        comoving.build("foam", [p], bases=Int8())
    with pytest.raises(TypeError, match="fills a PooledFrame"):
        Standing().find(None, object(), True, {})


def test_a_step_size_of_its_own_leaves_what_is_not_projected_to_adamw():
    p = torch.nn.Parameter(torch.zeros(8, 16))
    optimizer = comoving.build("snsm", [p], rank=1.0)
    assert not optimizer.sites[p].projected
    assert not optimizer.sites[p].whole
    assert isinstance(Pooled().start(p, (None, 4), None, 0), PooledFrame)
    assert optimizer.param_groups[0]["cadence"] == Every()
