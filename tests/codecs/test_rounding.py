"""Tables of 8 bits and stochastic rounding, against brute force written from the papers."""

import pytest
import torch

from comoving.codecs import Int4, Int8, Root
from comoving.codecs.grid import grid
from comoving.codecs.tables import dynamic, dynamic_positive
from comoving.draws import scramble
from contract.support import COMPLEX, REAL, close, randn

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""As QLoRA's appendix prints them."""


def tree(extra):
    """Every byte of the dynamic tree, read bit by bit.

    A sign, unless its bit is one more of the fraction's; zeros that count decades; a one; the fraction, which chooses
    the middle of one of the equal parts of [0.1, 1]. Without a one: 0, and 1 where the last free bit is set.
    """
    values = []
    for byte in range(256):
        bits = f"{byte:08b}"
        free, body = (bits[0], bits[1:]) if not extra else (bits[7], bits[:7])
        if "1" not in body:
            values.append(float(free))
            continue
        zeros = body.index("1")
        fraction = body[zeros + 1 :] + (free if extra else "")
        parts = 2 ** len(fraction)
        edges = [0.1 + 0.9 * i / parts for i in range(parts + 1)]
        i = int(fraction or "0", 2)
        sign = -1.0 if free == "1" and not extra else 1.0
        values.append(sign * (edges[i] + edges[i + 1]) / 2 / 10**zeros)
    return sorted(values)


def levels_of(codec):
    """The levels in units of the step, or of its square, in float64."""
    if isinstance(codec, Root):
        roots = tree(extra=True)[1:] if codec.table == "dynamic" else range(1, 2**codec.bits)
        return torch.tensor([x * x for x in roots], dtype=REAL)
    top = 127 if isinstance(codec, Int8) else 7
    tables = {"linear": range(-top, top + 1), "dynamic": tree(extra=False), "normal": NF4}
    return torch.tensor(list(tables[codec.table]), dtype=REAL)


def empty(codec, x, seed=1):
    stored = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in codec.schema(tuple(x.shape), x.dtype).items()}
    if "seed" in stored:
        stored["seed"].fill_(seed)
    return stored


def through(codec, x, seed=1):
    """What x becomes, and what is stored of it."""
    stored = empty(codec, x, seed)
    size = codec.encode(x.clone(), stored)
    close(size.double(), x.abs().double().norm(), 1e-5)
    return codec.decode(stored, tuple(x.shape), x.dtype).clone(), stored


def blocks_of(codec, x, decoded, stored):
    """Entries and what they became as (blocks, width), without padding marked, and each block's levels."""
    cut = grid(tuple(x.shape), x.dtype, codec.block)
    unit = stored["step"].double().square() if isinstance(codec, Root) else stored["step"].double()
    real = torch.arange(cut.blocks * cut.width).view(cut.blocks, cut.width) < cut.length
    table = (unit * levels_of(codec)).flatten(0, 1)
    values, own = (cut.cut(t).double().flatten(0, 1) for t in (x, decoded))
    return values, own, table, real.repeat(cut.rows, 1)


def test_the_dynamic_levels_are_the_trees():
    assert dynamic() == pytest.approx(tree(extra=False), rel=1e-12)
    assert dynamic_positive() == pytest.approx(tree(extra=True)[1:], rel=1e-12)
    assert (len(dynamic()), len(dynamic_positive())) == (256, 255)
    # As the authors' library prints the ends.
    assert dynamic()[0] == pytest.approx(-0.9929687976837158)
    assert min(x for x in dynamic() if x > 0) == pytest.approx(5.5e-7)
    assert dynamic_positive()[0] == pytest.approx(3.25e-7)


# ---------------------------------------------------------------------------------------------------------- nearest

SIGNED = [Int8(), Int8(block=8), Int8(table="dynamic"), Int8(block=8, table="dynamic"), Int4(), Int4(table="linear")]
POSITIVE = [Root(), Root(bits=4), Root(table="dynamic"), Root(block=8, table="dynamic")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)


def inputs(dtype):
    """Awkward tensors: of shapes that are filled up, of one sign, with zero blocks, outliers and denormals."""
    x = randn((5, 33), dtype, 3)
    outlier = randn((4, 300), dtype, 4)
    outlier[:, 7] *= 1e4
    zeros = randn((4, 600), dtype, 5)
    zeros[1] = 0
    flat = torch.view_as_real(zeros) if dtype.is_complex else zeros
    flat[2, 300:] = 0
    same = randn((3, 40), dtype, 6)
    same = torch.view_as_complex(torch.view_as_real(same).abs()) if dtype.is_complex else same.abs()
    wide = randn((2, 40), dtype, 7) * torch.logspace(-8, 2, 40).to(REAL).to(dtype)
    denormal = (randn((2, 9), dtype, 8) * 1e-41).to(dtype)
    return {
        "normal": x, "one": x[:1, :1], "row": x[0], "scalar": x[0, 0], "many": randn((2, 3, 4, 5), dtype, 9),
        "outlier": outlier, "zeros": zeros, "same": same, "negative": -same, "wide": wide, "denormal": denormal,
    }  # fmt: skip


@pytest.mark.parametrize("codec", SIGNED, ids=str)
@DTYPES
@pytest.mark.parametrize("name", inputs(REAL))
def test_every_entry_gets_the_nearest_level_that_spans_its_block(codec, name, dtype):
    x = inputs(dtype)[name]
    decoded, stored = through(codec, x)
    assert decoded.shape == x.shape and decoded.dtype is dtype and decoded.isfinite().all()
    values, own, table, _ = blocks_of(codec, x, decoded, stored)
    nearest = (values.unsqueeze(-1) - table.unsqueeze(-2)).abs().amin(-1)
    unit = values.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    close((values - own).abs() / unit, nearest / unit, 1e-6)
    if name != "denormal":  # the outermost levels are the block's extremes, one of them at least
        slack = 1 + 1e-6
        assert (values <= table[:, -1:] * slack).all() and (values >= table[:, :1] * slack).all()
        touched = torch.maximum(values.amax(-1) / table[:, -1], values.amin(-1) / table[:, 0])
        close(touched[values.any(-1)], torch.ones_like(touched)[values.any(-1)], 1e-6)
    error = (decoded - x).norm() / unit.max()
    assert error <= float(codec.error(stored)) / unit.max() * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("codec", POSITIVE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, REAL], ids=str)
@pytest.mark.parametrize("name", inputs(REAL))
def test_every_second_moment_gets_the_level_with_the_nearest_root(codec, name, dtype):
    x = inputs(dtype)[name].square()
    decoded, stored = through(codec, x)
    values, own, table, real = blocks_of(codec, x, decoded, stored)
    roots, got, table = values.sqrt(), own.sqrt(), table.sqrt()
    nearest = (roots.unsqueeze(-1) - table.unsqueeze(-2)).abs().amin(-1)
    unit = roots.amax(-1, keepdim=True).clamp_min(1e-15)
    close(((roots - got).abs() / unit)[real], (nearest / unit)[real], 2e-6)
    assert (decoded[x > 0] > 0).all()
    assert ((decoded - x) / unit.max() ** 2).norm() <= float(codec.error(stored)) / unit.max() ** 2 * (1 + 1e-4) + 1e-6


# ------------------------------------------------------------------------------------------------------- stochastic

DRAWN = [
    Int8(rounding="stochastic"),
    Int8(block=8, table="dynamic", rounding="stochastic"),
    Int4(rounding="stochastic"),
    Int4(table="linear", rounding="stochastic"),
    Root(rounding="stochastic"),
    Root(bits=4, rounding="stochastic"),
    Root(block=8, table="dynamic", rounding="stochastic"),
]
KINDS = [
    (codec, dtype)
    for codec in DRAWN
    for dtype in (torch.float32, torch.complex64, REAL, COMPLEX)
    if not (isinstance(codec, Root) and dtype.is_complex)
]
SEEDED = pytest.mark.parametrize("codec", DRAWN, ids=str)


def suited(codec, x):
    return (x.abs().square() if isinstance(codec, Root) else x).contiguous()


@pytest.mark.parametrize(("codec", "dtype"), KINDS, ids=str)
def test_the_mean_of_many_draws_is_the_number(codec, dtype):
    """Over seeds and rows, within four standard errors, whose variance is (above - x) (x - below)."""
    x = suited(codec, randn((1, 24), dtype, 5))
    rows, seeds = 300, 6
    many = x.expand(rows, -1).contiguous()
    drawn, stored = zip(*(through(codec, many, seed) for seed in range(seeds)), strict=True)
    values, _, table, real = blocks_of(codec, x, x, {"step": stored[0]["step"][:1]})
    values, table = values.clamp(table[:, :1], table[:, -1:]), table.unsqueeze(-2)
    index = (values.unsqueeze(-1) >= table).sum(-1).clamp(1, table.shape[-1] - 1)
    below = table.expand(*values.shape, -1).gather(-1, index.unsqueeze(-1) - 1).squeeze(-1)
    above = table.expand(*values.shape, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    cut = grid(tuple(many.shape), dtype, codec.block)
    own = torch.stack([cut.cut(y).double() for y in drawn])
    own = own.view(rows * seeds, cut.blocks, cut.width)
    unit = table.abs().amax()
    assert torch.minimum((own - below).abs(), (own - above).abs())[:, real].max() <= 1e-6 * unit
    deviation = ((above - values) * (values - below) / (rows * seeds)).clamp_min(0).sqrt()
    assert ((own.mean(0) - values).abs() <= 4 * deviation + 1e-6 * unit)[real].all()
    assert (own.std(0) > 0)[real].float().mean() > 0.7
    if codec == Int8(rounding="stochastic"):  # what this test can see: rounding to nearest misses some by far
        biased = cut.cut(through(Int8(), many)[0]).double().mean(0)
        assert ((biased - values).abs() > 4 * deviation + 1e-6 * unit)[real].any()


@SEEDED
def test_draws_follow_from_the_seed_and_advance_it(codec):
    x = suited(codec, randn((6, 40), torch.float32, 5))
    before = torch.random.get_rng_state()
    first, stored = through(codec, x, 7)
    assert stored["seed"].item() == scramble(7) and stored["seed"].dtype is torch.int64
    again, twin = through(codec, x, 7)
    other, _ = through(codec, x, 8)
    assert torch.equal(first, again) and not torch.equal(first, other)
    codec.encode(x.clone(), stored)
    assert stored["seed"].item() == scramble(scramble(7))
    assert not torch.equal(codec.decode(stored, (6, 40), x.dtype), first)
    codec.decode_onto(x, twin)
    codec.error(twin)
    assert twin["seed"].item() == scramble(7)
    assert torch.equal(torch.random.get_rng_state(), before)


@SEEDED
@pytest.mark.parametrize("name", inputs(REAL))
def test_a_drawn_entry_is_within_a_gap_and_extremes_are_kept(codec, name):
    x = suited(codec, inputs(torch.float32)[name])
    decoded, stored = through(codec, x)
    unit = x.abs().max().double()
    if name != "denormal":  # whose squares are 0
        assert (decoded - x).double().norm() / unit <= float(codec.error(stored)) / unit * (1 + 1e-4) + 1e-6
    if not isinstance(codec, Root):
        assert not decoded[x == 0].any()
        assert (decoded * x >= 0).all()
    if name != "denormal":
        extreme = x.abs() == unit
        close(decoded[extreme] / unit, x[extreme] / unit, 1e-5)


@pytest.mark.parametrize("codec", [Int8(table="dynamic"), Int8(rounding="stochastic"), Int4(rounding="stochastic")])
def test_second_moments_are_stored_in_the_same_way(codec):
    positive = codec.positive
    assert (positive.block, positive.rounding) == (codec.block, codec.rounding)
    assert positive.bits == (8 if isinstance(codec, Int8) else 4)
    assert positive.table == ("linear" if isinstance(codec, Int4) else codec.table)
    with pytest.raises(ValueError, match="'linear', got 'dynamic'"):
        Root(bits=4, table="dynamic")
