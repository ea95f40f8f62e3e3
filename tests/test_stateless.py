"""Methods with little or no state follow float64 references written from their papers, and stay in bounds."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import comoving
from comoving.clock import Clock
from comoving.codecs import Int8
from comoving.methods import stateless
from comoving.rules import SWAN, Adafactor, AdamS, Normalized
from comoving.rules.normalized import normalized
from comoving.rules.swan import standardized
from contract.support import COMPLEX, REAL, Bare, Holder, close, lone, randn, step
from references import adafactor, adams
from references.normalized import Stateless, along, balanced, sinkhorn, whitened
from test_extremes import STREAMS, check

STEPS, LR, DECAY = 24, 0.03, 0.1
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 3, 5)], ids=str)


def gradients(shape, dtype):
    """A drifting signal in noise, with rows of very different size and one of zeros now and then; the seventh is 0."""
    low, high = randn(shape, dtype), randn(shape, dtype, 1)
    for t in range(STEPS):
        g = low * (1 - t / STEPS) + high * (t / STEPS) + 0.5 * randn(shape, dtype, 100 + t)
        g[0] *= 1e-3
        g[t % 3] *= t % 5 != 1
        yield 0 * g if t == 7 else g


def follow(recipe, start, reference, tolerance=1e-9, **options):
    """Step both side by side, with one more optimizer resumed from a saved state in the middle."""
    given = {"lr": LR, "weight_decay": DECAY} | options
    model = Holder(start)
    optimizer, (p,) = comoving.build(recipe, model, **given), model.parameters()
    for t, g in enumerate(gradients(tuple(start.shape), start.dtype)):
        if t == STEPS // 2:
            saved, other = copy.deepcopy(optimizer.state_dict()), Holder(p.detach())
            optimizer, (p,) = comoving.build(recipe, other, **given), other.parameters()
            optimizer.load_state_dict(saved)
        step(optimizer, p, g)
        close(p.detach(), reference.step(g), tolerance)
    return optimizer, p


def keeps_nothing(optimizer, p):
    assert optimizer.state[p].keys() == {"tick", "step"}
    assert comoving.state_bytes(optimizer, projected=True) == 0
    assert comoving.state_bytes(optimizer) == comoving.explain(optimizer).state_bytes == 4


# --------------------------------------------------------------------------------------------------- against papers


@FIELDS
@SHAPES
def test_sinkgd(shape, dtype):
    start = randn(shape, dtype, 9)
    reference = Stateless(start, LR, lambda x: 0.05 * sinkhorn(x, 5), weight_decay=DECAY)
    keeps_nothing(*follow("sinkgd", start, reference))


@FIELDS
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkgd_of_other_lengths_with_momentum(iterations, dtype):
    start, rule = randn((5, 8), dtype, 9), Normalized(decay=0.8, passes=2 * iterations, scale=0.7)
    update = lambda x: 0.7 * sinkhorn(x, iterations)  # noqa: E731
    follow("sinkgd", start, Stateless(start, LR, update, momentum=0.8, weight_decay=DECAY), rule=rule)


@FIELDS
@SHAPES
def test_swan(shape, dtype):
    """Of a complex tensor there is one matrix for every index of the other modes."""
    start = randn(shape, dtype, 9)
    update = lambda x: 0.05 * whitened(x, 10, 0.8)  # noqa: E731
    if dtype is COMPLEX and len(shape) > 2:
        cuts = [Stateless(start[..., k], LR, update, weight_decay=DECAY) for k in range(shape[-1])]
        reference = Together(cuts)
    else:
        reference = Stateless(start, LR, update, weight_decay=DECAY)
    keeps_nothing(*follow("swan", start, reference, 1e-7))


class Together:
    def __init__(self, parts):
        self.parts = parts

    def step(self, g):
        return torch.stack([part.step(g[..., k]) for k, part in enumerate(self.parts)], -1)


@FIELDS
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=str)
def test_swan_with_half_as_its_beta_is_an_isometry(shape, dtype):
    """Singular values of 1 before the rescaling, so that all of them are equal, but for what centring took."""
    d = Bare(SWAN(steps=40, beta=0.5), shape, dtype).take(randn(shape, dtype))
    values = torch.linalg.svdvals(d)
    count = min(shape[0], shape[1] - 1)
    close(values[:count], (36 / count) ** 0.5 * torch.ones(count, dtype=REAL), 1e-9)
    close(values[count:], torch.zeros(len(values) - count, dtype=REAL), 1e-4)  # rounding, times 1.5^40
    close(d.mean(1), torch.zeros(shape[0], dtype=dtype), 1e-4)


@FIELDS
@SHAPES
def test_scale(shape, dtype):
    start = randn(shape, dtype, 9)
    keeps_nothing(*follow("scale", start, Stateless(start, LR, partial(along, dim=1), weight_decay=DECAY)))


@FIELDS
@pytest.mark.parametrize(("role", "dim", "momentum"), [(stateless.HEAD, 1, 0.9), (stateless.TABLE, 0, 0.0)])
def test_scale_at_the_head_and_the_embedding(role, dim, momentum, dtype):
    start = randn((7, 5), dtype, 9)
    reference = Stateless(start, LR, partial(along, dim=dim), momentum=momentum, weight_decay=DECAY)
    follow("scale", start, reference, **role)


@FIELDS
def test_the_tables_of_deepseek(dtype):
    """Rows of little gradient are left out, once their momentum has decayed; with no weight decay they stand."""
    start = randn((7, 5), dtype, 9)
    update = lambda x: 0.18 * balanced(x, 11, 1e-3)  # noqa: E731
    reference = Stateless(start, LR, update, momentum=0.95, nesterov=True)
    optimizer, p = follow("scale", start, reference, **stateless.BALANCED)
    assert comoving.state_bytes(optimizer) == 4 + 35 * dtype.itemsize
    before = p.detach().clone()
    g = randn((7, 5), dtype)
    g[2] = 0
    for _ in range(200):
        step(optimizer, p, g)
    after = p.detach().clone()
    assert not torch.equal(before[2], after[2])  # momentum first
    step(optimizer, p, g)
    assert torch.equal(p[2], after[2])
    assert (p[[0, 1, 3, 4, 5, 6]] != after[[0, 1, 3, 4, 5, 6]]).all()


def test_rows_at_the_threshold_are_left_out():
    """rho <= tau mean(rho): the mean is that of all rows, those without gradient among them."""
    x = torch.tensor([[1.0], [1999.0], [0.0], [0.0]], dtype=REAL).repeat(1, 2)
    kept = Bare(Normalized(passes=1, threshold=1e-3), (4, 2), REAL).take(x)
    close(kept, torch.tensor([[1.0], [1.0], [0.0], [0.0]], dtype=REAL).repeat(1, 2))
    left = Bare(Normalized(passes=1, threshold=1.001 / 500), (4, 2), REAL).take(x)
    close(left, torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=REAL).repeat(1, 2))
    even = Bare(Normalized(passes=1, threshold=1.0), (4, 2), REAL).take(torch.ones(4, 2, dtype=REAL))
    assert not even.any()


def test_eight_bits_are_one_byte_an_entry():
    p, optimizer = lone(randn((256, 64), torch.float32), rank=1.0, lr=0.01, **stateless.BALANCED_8BIT)
    for t in range(3):
        step(optimizer, p, randn((256, 64), torch.float32, t))
    assert comoving.state_bytes(optimizer) <= 1.07 * p.numel()


@FIELDS
@pytest.mark.parametrize("shape", [(5, 8), (7, 1), (4, 3, 5)], ids=str)
def test_adams(shape, dtype):
    start, own = randn(shape, dtype, 9), {"betas": (0.8, 0.7), "eps": 1e-2}
    if min(shape) > 1:
        optimizer, p = follow("adams", start, adams.AdamS(start, LR, weight_decay=DECAY, **own), **own)
        assert comoving.state_bytes(optimizer) == 4 + start.numel() * dtype.itemsize
        return
    bare, reference = Bare(AdamS(), shape, dtype, own["betas"]), adams.AdamS(0 * start, 1.0, **own)
    for g in gradients(shape, dtype):
        before = reference.p
        close(bare.take(g, own["eps"]), before - reference.step(g), 1e-9)


def test_adams_keeps_to_its_bound():
    """Where momentum and gradient are in the ratio that makes d largest: sqrt(b1^2 / b2 + (1 - b1)^2 / (1 - b2))."""
    b1, b2 = 0.9, 0.95
    m = torch.tensor([[b1 / b2, 1.0, 0.0, 1e30]])
    z = torch.tensor([[(1 - b1) / (1 - b2), 1.0, 1.0, 1e30]])
    state = {"moment.first": m}
    clock = Clock(torch.ones(()), b1, b2, 1)
    AdamS().absorb(z, state, clock)
    d = AdamS().direction(state, clock, 1e-30)
    most = (b1**2 / b2 + (1 - b1) ** 2 / (1 - b2)) ** 0.5
    close(d[0, 0], torch.tensor(most), 1e-6)
    close(d[0, [1, 3]], torch.ones(2), 1e-6)
    close(d[0, 2], torch.tensor((1 - b1) / (1 - b2) ** 0.5), 1e-6)


@FIELDS
@pytest.mark.parametrize("options", [{}, {"decay": -0.5, "d": 0.3, "eps1": 1e-3}, {"b2": 0.7, "d": None}], ids=str)
def test_adafactor_without_momentum(options, dtype):
    start = randn((4, 3, 5), dtype, 9)
    names = {"eps1": "floor", "d": "clip"}
    own = {names.get(k, k): v for k, v in options.items() if k != "b2"}
    if "b2" in options:
        own["decay"] = None
    reference = adafactor.Adafactor(start, LR, weight_decay=DECAY, **options)
    given = {"rule": Adafactor(average=None, **own), "betas": (0.9, options.get("b2", 0.999))}
    optimizer, p = follow("adafactor", start, reference, **given)
    assert optimizer.state[p].keys() == {"tick", "step", "factor.0", "factor.1", "factor.2"}
    assert comoving.state_bytes(optimizer) == 4 + 8 * (4 + 3 + 5)


def test_a_factored_table_keeps_rows_and_columns():
    p, optimizer = lone(randn((100, 16), torch.float32), rank=1.0, lr=0.01, **stateless.FACTORED)
    step(optimizer, p, randn((100, 16), torch.float32, 1))
    assert comoving.state_bytes(optimizer) == 4 + 4 * 116
    assert comoving.explain(optimizer).state_bytes == 4 + 4 * 116


# ----------------------------------------------------------------------------------------------------- what is stated


@FIELDS
def test_both_sides_come_to_unit_size(dtype):
    d = Bare(Normalized(passes=400), (4, 7), dtype).take(randn((4, 7), dtype))
    for dim in (0, 1):
        close(d.abs().square().mean(dim), torch.ones(d.shape[1 - dim], dtype=REAL), 1e-6)


@FIELDS
@pytest.mark.parametrize("first", ["rows", "columns"])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_the_last_pass_is_exact_and_zeros_stay(passes, first, dtype):
    x = randn((5, 6), dtype)
    x[1], x[:, 2] = 0, 0
    d = Bare(Normalized(passes=passes, first=first), (5, 6), dtype).take(x)
    assert not d[1].any() and not d[:, 2].any()
    dim = 1 if (first == "rows") == (passes % 2 == 1) else 0
    sizes = d.abs().square().mean(dim)
    live = torch.arange(len(sizes)) != (1 if dim else 2)
    close(sizes, live.to(REAL), 1e-12)


@FIELDS
@pytest.mark.parametrize("shape", [(6,), (1, 6), (6, 1), (), (1, 1), (1, 6, 1)], ids=str)
@pytest.mark.parametrize(
    "rule", [Normalized(scale=0.5), SWAN(scale=0.5), Normalized(threshold=0.9, scale=0.5)], ids=str
)
def test_what_is_no_matrix_is_one_row(rule, shape, dtype):
    z = randn(shape, dtype)
    close(Bare(rule, shape, dtype).take(z), 0.5 * z / z.abs().square().mean().sqrt(), 1e-12)


@FLOATS
@pytest.mark.parametrize("size", [1e-44, 1e-37, 1e-30, 1e-20, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_each_row_is_normalized_at_its_own_size(along, size, dtype):
    """Rows of every size beside each other, whose squares no float32 has."""
    x = randn((4, 6), dtype)
    x[2] *= size
    given = x if along == "rows" else x.mT
    found = normalized(given, along)
    expected = normalized(x.to(COMPLEX if dtype.is_complex else REAL), "rows")
    expected = (expected if along == "rows" else expected.mT).to(dtype)
    close(found, expected, 1e-5)


@FLOATS
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_passes_bear_rows_and_columns_of_every_size(size, dtype):
    x = randn((4, 6), dtype)
    x[:, 1] *= size
    x[2, [0, 2, 3, 4, 5]] *= size
    for rule in (Normalized(), Normalized(passes=7, first="columns")):
        wide = COMPLEX if dtype.is_complex else REAL
        exact = Bare(rule, (4, 6), wide).take(x.to(wide))
        close(Bare(rule, (4, 6), dtype).take(x), exact.to(dtype), 1e-5)


@FLOATS
def test_rows_without_variance_have_no_direction(dtype):
    """What centring leaves of them is rounding, which would be brought to unit size."""
    x = randn((4, 6), dtype)
    x[1] = x[1, 0] * 1e5
    x[3] = 0
    g = standardized(x)
    assert not g[1].any() and not g[3].any()
    close(g[[0, 2]].mean(1), torch.zeros(2, dtype=dtype), 1e-6)
    close(g[[0, 2]].abs().square().mean(1), torch.ones(2), 1e-5)
    assert not Bare(SWAN(), (4, 6), dtype).take(torch.ones(4, 6, dtype=dtype)).any()


@FLOATS
@pytest.mark.parametrize("shape", [(8, 12), (1, 10, 2), (6, 5, 4)], ids=str)
@pytest.mark.parametrize(
    "rule",
    [
        Normalized(),
        Normalized(decay=0.95, nesterov=True, passes=11, threshold=1e-3),
        Normalized(passes=1, first="columns"),
        AdamS(),
        Adafactor(average=None),
    ],
    ids=str,
)
def test_extremes(rule, shape, dtype):
    check(shape, dtype, 30, rank=1.0, rule=rule)


@FLOATS
@pytest.mark.parametrize("shape", [(8, 12), (1, 10, 2), (6, 5, 4)], ids=str)
def test_extremes_of_swan(shape, dtype, monkeypatch):
    """Rows of constants, which have no direction once they are centred, in :func:`test_rows_without_variance`."""
    monkeypatch.delitem(STREAMS, "constants")
    check(shape, dtype, 30, rank=1.0, rule=SWAN())


@pytest.mark.parametrize(
    ("rule", "field", "value", "interval"),
    [
        (Normalized, "decay", 1.0, r"\[0, 1\)"),
        (Normalized, "nesterov", None, "True, False"),
        (Normalized, "passes", 0, ">= 1"),
        (Normalized, "first", "both", "'rows', 'columns'"),
        (Normalized, "threshold", -0.1, r"\[0, inf\)"),
        (Normalized, "scale", 0.0, r"\(0, inf\)"),
        (SWAN, "steps", 0, ">= 1"),
        (SWAN, "beta", 0.87, r"\(0, 0.866025\)"),
        (SWAN, "scale", 0.0, r"\(0, inf\)"),
        (SWAN, "over", "all", "'auto', 'flat', 'each'"),
        (Adafactor, "average", "none", "'gradient', 'update', None"),
    ],
)
def test_fields_say_their_interval(rule, field, value, interval):
    with pytest.raises(ValueError, match=f"{field} must .*{interval}"):
        rule(**{field: value})


@pytest.mark.parametrize("rule", [Normalized(), SWAN(), Adafactor(average=None)], ids=str)
def test_without_momentum_frames_are_refused(rule):
    with pytest.raises(ValueError, match="is projected, and it keeps no momentum"):
        comoving.LowRankOptimizer([nn.Parameter(randn((6, 8)))], 0.1, 2, rule=rule)


@pytest.mark.parametrize("rule", [Normalized(decay=0.9), AdamS()], ids=str)
def test_momentum_follows_a_frame(rule):
    p, optimizer = lone(randn((6, 8)), rank=2, lr=0.01, rule=rule, refresh_every=2, moments=Int8())
    before = p.detach().clone()
    for t in range(6):
        step(optimizer, p, randn((6, 8), seed=t))
    assert optimizer.sites[p].projected and p.isfinite().all() and not torch.equal(p, before)
