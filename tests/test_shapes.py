"""Every kind of parameter is optimized: right ranks, orthonormal frames, finite numbers, a loss that falls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving.codecs import BFloat16, Full, Int8
from comoving.finders import Exact, Power
from comoving.residual import Discard, Feedback
from comoving.transport import Carry, Keep, Reset, Rotate
from contract.support import COMPLEX, REAL, RULES, close, frame_of, known_rank, lone, numel, randn, step

HALF = {torch.bfloat16: 0.02, torch.float16: 0.01}


def wide(dtype):
    """The dtype in which targets and distances are formed."""
    return COMPLEX if dtype.is_complex else REAL


def descend(p, optimizer, target, steps, rate=0.05):
    """Minimize |p - target|^2 / 2 with a decaying rate; (distance before, distance after)."""
    first = float((p.detach().to(target.dtype) - target).norm())
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - t / steps) + 1e-3
        p.grad = (p.detach().to(target.dtype) - target).to(p.dtype)
        optimizer.step()
        assert p.isfinite().all()
    return first, float((p.detach().to(target.dtype) - target).norm())


def check_frame(p, optimizer):
    """The asked ranks, and columns orthonormal to the frame's own precision."""
    site = optimizer.sites[p]
    frame = frame_of(optimizer, p, len(site.view.shape))
    assert frame.ranks == site.ranks
    for d, u in zip(site.view.shape, frame.factors, strict=True):
        if u is not None:
            assert u.shape[0] == d
            gap = (u.mH @ u).to(COMPLEX) - torch.eye(u.shape[1])
            assert gap.abs().max() <= 100 * torch.finfo(u.dtype).eps
    for name, value in optimizer.state[p].items():
        if torch.is_tensor(value):
            assert value.float().isfinite().all() if not value.is_complex() else value.isfinite().all(), name


CASES = {
    "tall": ((24, 6), torch.float32, {"rank": 2}, (None, 2)),
    "wide": ((6, 24), torch.float32, {"rank": 2}, (2, None)),
    "square": ((12, 12), torch.float32, {"rank": 3}, (3, None)),
    "both sides": ((12, 16), torch.float32, {"rank": 4, "side": "both"}, (4, 4)),
    "left of tall": ((24, 6), torch.float32, {"rank": 2, "side": "left"}, (2, None)),
    "right of wide": ((6, 24), torch.float32, {"rank": 2, "side": "right"}, (None, 2)),
    "a share": ((16, 64), torch.float32, {"rank": 0.25}, (4, None)),
    "rank above the size": ((6, 24), torch.float32, {"rank": 7}, (None, None)),
    "bias": ((24,), torch.float32, {"rank": 2}, (None,)),
    "one number": ((), torch.float32, {"rank": 2}, ()),
    "empty modes": ((1, 6, 1, 24, 1), torch.float32, {"rank": 2}, (None, 2, None, None, None)),
    "a row": ((1, 24), torch.float32, {"rank": 2}, (None, None)),
    "float64": ((8, 12), REAL, {"rank": 2}, (2, None)),
    "bfloat16": ((8, 24), torch.bfloat16, {"rank": 2}, (2, None)),
    "float16": ((8, 24), torch.float16, {"rank": 2}, (2, None)),
    "complex64": ((24, 8), torch.complex64, {"rank": 2}, (None, 2)),
    "complex128, both": ((12, 9), COMPLEX, {"rank": (4, 3)}, (4, 3)),
    "conv 2-D": ((16, 12, 3, 3), torch.float32, {"rank": 4}, (4, 4, None, None)),
    "conv 3-D": ((16, 12, 3, 3, 3), torch.float32, {"rank": 4}, (4, 4, None, None, None)),
    "conv as a matrix": ((16, 12, 3, 3), torch.float32, {"rank": 4, "view": "matrix"}, (4, None)),
    "conv 3-D in bf16": ((16, 8, 3, 3, 3), torch.bfloat16, {"rank": 3}, (3, 3, None, None, None)),
    "experts": ((4, 12, 10), torch.float32, {"rank": (None, 3, 3)}, (None, 3, 3)),
    "experts in bf16": ((4, 12, 10), torch.bfloat16, {"rank": (None, 3, 3)}, (None, 3, 3)),
    "FNO": ((12, 10, 8, 5), torch.complex64, {"rank": 0.1}, None),
    "FNO as pairs": ((12, 10, 8, 5, 2), torch.float32, {"rank": 0.1, "view": "pairs"}, None),
    "FNO as pairs in bf16": ((12, 10, 8, 5, 2), torch.bfloat16, {"rank": 0.1, "view": "pairs"}, None),
    "5-D": ((9, 8, 3, 8, 2), torch.float32, {"rank": (3, 4, 2, 3, None)}, (3, 4, 2, 3, None)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_parameter(case):
    shape, dtype, options, ranks = CASES[case]
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = comoving.AdamW([p], weight_decay=0.0, scale="match", **options)
    site = optimizer.sites[p]
    if ranks is not None:
        assert site.ranks == ranks
    else:  # a float rank: a tenth of the entries
        core = numel(d if r is None else r for d, r in zip(site.view.shape, site.ranks, strict=True))
        assert core / numel(site.view.shape) == pytest.approx(0.1, rel=0.25)
        assert len(site.ranks) == 4
    target = known_rank(site.view.shape, tuple(r and max(1, r // 2) for r in site.ranks), wide(site.view.dtype), 1)
    target = site.view.restore(target * (numel(shape) ** 0.5 / target.norm()))
    before, after = descend(p, optimizer, target, 100, rate=0.1)
    assert after < 0.45 * before
    check_frame(p, optimizer)
    slots = [x.dtype for n, x in optimizer.state[p].items() if torch.is_tensor(x) and n.startswith(("moment", "frame"))]
    if site.projected or dtype not in HALF:
        assert not set(slots) & set(HALF)


PARTS = {
    "transport": st.sampled_from([Keep(), Reset(), Rotate(), Carry()]),
    "finder": st.sampled_from([Exact(), Exact(method="svd", inertia=0.5), Power(), Power(start="exact", inertia=0.0)]),
    "residual": st.sampled_from([Discard(), Feedback()]),
    "codec": st.sampled_from([Full(), BFloat16(), Int8(block=16)]),
    "refresh_every": st.integers(1, 5),
    "scale": st.sampled_from(["match", "0.2-match", 0.7]),
}


@given(st.data())
def test_any_shape_with_any_parts(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5), label="shape"))
    ranks = tuple(data.draw(st.none() | st.integers(1, d), label="rank") for d in shape)
    dtype = data.draw(st.sampled_from([torch.float32, REAL, torch.bfloat16, torch.float16, torch.complex64, COMPLEX]))
    options = {name: data.draw(choice, label=name) for name, choice in PARTS.items()}
    p, optimizer = lone(torch.zeros(shape, dtype=dtype), rank=ranks, weight_decay=0.0, **options)
    projected = sum(d > 1 for d in shape) >= 2
    assert optimizer.sites[p].ranks == tuple(
        r if projected and r is not None and r < d else None for r, d in zip(ranks, shape, strict=True)
    )
    target = randn(shape, wide(dtype), 1)
    before, after = descend(p, optimizer, target, 12, rate=0.02)
    assert after < before
    check_frame(p, optimizer)


@pytest.mark.parametrize(
    "recipe", [{}, {"transport": Rotate(), "codec": Full(), "refresh_every": 1}], ids=["int8", "full"]
)
@pytest.mark.parametrize("rank", [0.2, (3, 3, None), 1.0], ids=str)
def test_pairs_are_the_complex_parameter(recipe, rank):
    shape = (9, 8, 5)
    options = {"rank": rank, "lr": 0.02, "weight_decay": 0.1, **recipe}
    a = nn.Parameter(randn(shape, torch.complex64))
    b = nn.Parameter(torch.view_as_real(a.detach().clone()))
    optimizers = comoving.AdamW([a], **options), comoving.AdamW([b], view="pairs", **options)
    for t in range(12):
        a.grad = randn(shape, torch.complex64, 50 + t)
        b.grad = torch.view_as_real(a.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(torch.view_as_real(a.detach()), b.detach())
    assert comoving.state_bytes(optimizers[0]) == comoving.state_bytes(optimizers[1])


LAYOUTS = {
    "channels last": ((16, 12, 3, 3), lambda x: x.to(memory_format=torch.channels_last)),
    "channels last 3-D": ((16, 12, 3, 3, 2), lambda x: x.to(memory_format=torch.channels_last_3d)),
    "transposed": ((8, 24), lambda x: x.mT.contiguous().mT),
    "every other column": ((8, 24), lambda x: torch.stack([x, x], -1)[..., 0]),
}


@pytest.mark.parametrize("view", ["tensor", "matrix"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient_too", [False, True])
def test_layout_in_memory_changes_nothing(layout, view, gradient_too, dtype):
    shape, arrange = LAYOUTS[layout]
    start = randn(shape, wide(dtype)).to(dtype)
    a, b = nn.Parameter(start.clone()), nn.Parameter(arrange(start.clone()))
    assert b.stride() != a.stride()
    given = {"lr": 0.02, "rank": 3, "view": view, "weight_decay": 0.1, "moments": comoving.codecs.Full()}
    optimizers = [comoving.AdamW([p], **given) for p in (a, b)]
    strides, address = b.stride(), b.data_ptr()
    for t in range(9):
        a.grad = randn(shape, wide(dtype), 30 + t).to(dtype)
        b.grad = arrange(a.grad.clone()) if gradient_too else a.grad.clone().as_strided_(shape, a.stride())
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[1].sites[b].projected
    assert (b.stride(), b.data_ptr()) == (strides, address)
    close(b.detach().to(wide(dtype)), a.detach().to(wide(dtype)), 1e-4 if dtype not in HALF else 0.02)
    assert (a.detach() - start).norm() > 0.1


def test_gradient_in_another_layout_than_the_parameter():
    start = randn((16, 12, 3, 3), torch.float32)
    results = []
    for arrange in (lambda x: x, lambda x: x.to(memory_format=torch.channels_last)):
        p = nn.Parameter(start.clone())
        optimizer = comoving.AdamW([p], lr=0.02, rank=3)
        for t in range(6):
            p.grad = arrange(randn(start.shape, torch.float32, t))
            optimizer.step()
        results.append(p.detach())
    close(*results, 1e-4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_rounds_the_parameter_alone(dtype):
    """The state is that of a float32 run on the same gradients: only the parameter is rounded, once a step."""
    start = randn((8, 24), torch.float32).to(dtype)
    a, low = lone(start, rank=2, lr=0.02, residual=Feedback(), refresh_every=3)
    b, full = lone(start.float(), rank=2, lr=0.02, residual=Feedback(), refresh_every=3)
    for t in range(9):
        g = randn((8, 24), torch.float32, t).to(dtype)
        before = a.detach().float()
        step(low, a, g)
        b.data.copy_(before)
        step(full, b, g.float())
        assert torch.equal(a.detach(), b.detach().to(dtype))
    for name, value in full.state[b].items():
        assert torch.equal(low.state[a][name], value) if torch.is_tensor(value) else low.state[a][name] == value, name


@pytest.mark.parametrize("shape", [(6, 24), (24, 6), (12, 10, 8)], ids=str)
def test_a_batch_of_experts_of_rank_one_blocks_stays_finite(shape):
    """An expert without gradient gets no update but weight decay, though it shares its frame with the others."""
    stack = (3, *shape)
    ranks = (None, *([2] * len(shape)))
    p, optimizer = lone(torch.ones(stack), rank=ranks, lr=0.1, weight_decay=0.5)
    for t in range(5):
        g = randn(stack, torch.float32, t)
        g[1] = 0
        step(optimizer, p, g)
    close(p.detach()[1], torch.full(shape, 0.95**5), 1e-6)
    assert (p.detach()[0] - 0.95**5).abs().max() > 0.05


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (4, 0), (4, 0, 5), (0, 4, 5)], ids=str)
@pytest.mark.parametrize("options", [{"rank": 1.0}, {"rank": 2}], ids=str)
def test_what_has_no_entries_is_left_to_torch(rule, shape, options):
    p = nn.Parameter(torch.zeros(shape))
    transport = Rotate() if rule.corrected else Reset()
    optimizer = LowRankOptimizer([p], 1e-2, rule=rule, transport=transport, **options)
    for _ in range(2):
        p.grad = torch.zeros(shape)
        optimizer.step()
    assert optimizer.sites[p].plain
