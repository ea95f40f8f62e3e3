"""Codecs of few bits against brute force, and what codecs of second moments promise beside."""

import itertools

import pytest
import torch

from comoving.codecs import Full, Int4, RankOne, Root, nibbles
from comoving.codecs.grid import grid
from comoving.codecs.tables import normal
from contract.support import COARSE, COMPLEX, POSITIVE, REAL, close, randn
from references.smmf import nnmf, sign, square_shape

UNSIGNED = [*POSITIVE, RankOne(signed=False)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, REAL], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(1,), (9,), (3, 1), (5, 33), (2, 3, 4, 5), (4, 130)], ids=str)


def through(codec, x):
    """What x becomes, and what is stored of it."""
    stored = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in codec.schema(tuple(x.shape), x.dtype).items()}
    size = codec.encode(x.clone(), stored)
    close(size.double(), x.abs().double().norm(), 1e-5)
    return codec.decode(stored, tuple(x.shape), x.dtype), stored


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_two_codes_share_a_byte(count):
    codes = torch.randint(16, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    packed = nibbles.pack(codes)
    assert packed.shape == (3, nibbles.width(count)) == (3, -(-count // 2))
    assert torch.equal(nibbles.unpack(packed, count), codes)


def test_the_normal_levels():
    """Those of QLoRA's NF4, whose appendix prints them: 16, from -1 to 1, 0 among them."""
    printed = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert normal() == pytest.approx(printed, abs=1e-6)


@pytest.mark.parametrize("codec", [Int4(), Int4(block=8), Int4(table="linear"), Int4(block=8, table="linear")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, REAL, torch.complex64, COMPLEX], ids=str)
@SHAPES
def test_every_entry_gets_the_nearest_level(codec, shape, dtype):
    x = randn(shape, dtype, 3)
    decoded, stored = through(codec, x)
    cut = grid(shape, dtype, codec.block)
    levels = range(-7, 8) if codec.table == "linear" else normal()
    table = stored["step"].double() * torch.tensor(list(levels), dtype=REAL)
    values, own = cut.cut(x).double(), cut.cut(decoded).double()
    nearest = (values.unsqueeze(-1) - table.unsqueeze(-2)).abs().amin(-1)
    close((values - own).abs(), nearest, 1e-6)
    close(stored["step"][..., 0].double() * max(levels), values.abs().amax(-1), 1e-6)
    bytes_ = sum(p.numel() * p.element_size() for p in stored.values())
    assert bytes_ == cut.rows * cut.blocks * (-(-cut.width // 2) + 4)


@pytest.mark.parametrize("codec", POSITIVE, ids=str)
@DTYPES
@SHAPES
def test_every_root_gets_the_nearest_code(codec, shape, dtype):
    x = randn(shape, dtype, 3).square()
    decoded, stored = through(codec, x)
    cut, top = grid(shape, dtype, codec.block), 2**codec.bits - 1
    table = stored["step"].double() * torch.arange(1, top + 1, dtype=REAL)
    roots, own = cut.cut(x).double().sqrt(), cut.cut(decoded).double().sqrt()
    nearest = (roots.unsqueeze(-1) - table.unsqueeze(-2)).abs().amin(-1)
    real = torch.arange(cut.blocks * cut.width).view(cut.blocks, cut.width) < cut.length
    close(((roots - own).abs() * real).flatten(), (nearest * real).flatten(), 1e-6)


@pytest.mark.parametrize("codec", UNSIGNED, ids=str)
@DTYPES
@SHAPES
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e15])
def test_second_moments_stay_positive(codec, shape, dtype, size):
    """Positive where they were, whatever else is in the block; what is lost is bounded; a second time nothing is."""
    x = randn(shape, dtype, 3).square()
    x = x * torch.logspace(-6, 6, x.numel(), dtype=dtype).view(shape).flip(0) / 1e6  # outliers
    x = (x * size).to(dtype)
    decoded, stored = through(codec, x)
    assert decoded.dtype is dtype and decoded.isfinite().all() and (decoded >= 0).all()
    assert (decoded[x > 0] > 0).all()
    if size >= 1e-12:
        unit = x.norm()
        assert ((decoded - x) / unit).norm() <= float(codec.error(stored) / unit) * (1 + 1e-4) + 1e-6
        again, _ = through(codec, decoded)
        close(again / unit, decoded / unit, 1e-5)


@pytest.mark.parametrize("codec", POSITIVE, ids=str)
@DTYPES
def test_larger_moments_never_come_out_smaller(codec, dtype):
    x = randn((4, 24), dtype, 3).square().sort(dim=-1).values
    decoded, _ = through(Root(block=24, bits=codec.bits), x)
    assert (decoded.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("codec", POSITIVE, ids=str)
@DTYPES
def test_zero_blocks_stay_zero_beside_others(codec, dtype):
    x = randn((4, 600), dtype, 3).square()
    x[1] = 0.0
    decoded, _ = through(codec, x)
    assert not decoded[1].any()
    zeros, stored = through(codec, torch.zeros(4, 600, dtype=dtype))
    assert not zeros.any() and not codec.error(stored)


@pytest.mark.parametrize("codec", POSITIVE, ids=str)
def test_denormal_moments_stay_positive_and_small(codec):
    x = torch.tensor([[1e-45, 1e-42, 1e-40, 0.0, 1e-39, 3e-39, 1e-44, 1e-43]])
    decoded, _ = through(codec, x)
    assert (decoded[x > 0] > 0).all() and decoded.max() < 1e-37
    lone, _ = through(codec, torch.tensor([[1e-45, *[1.0] * 7]]))
    assert 0 < lone[0, 0] <= (1 / (2**codec.bits - 1)) ** 2 * 1.01


@pytest.mark.parametrize("codec", POSITIVE, ids=str)
def test_directions_are_never_larger_for_the_rounding(codec):
    """m / sqrt(v) with v far below its block's largest: the codec takes v up, not down to 0."""
    m = torch.full((1, 64), 1e-4)
    v = m.square()
    v[0, 0] = 1.0
    decoded, _ = through(codec, v)
    assert (m / decoded.sqrt()).max() < 1.2


# --------------------------------------------------------------------------------------------------------- rank one


@pytest.mark.parametrize("codec", COARSE, ids=str)
@DTYPES
@SHAPES
def test_rank_one_is_the_papers(codec, shape, dtype):
    x = randn(shape, dtype, 3) if codec.signed else randn(shape, dtype, 3).square()
    x.view(-1)[0] = 0.0
    decoded, stored = through(codec, x)
    a, b = square_shape(x.numel())
    assert stored["rows"].shape == (a,) and stored["columns"].shape == (b,)
    r, c = nnmf(x.abs().reshape(a, b))
    signs = sign(x.reshape(a, b)) if codec.signed else 1.0
    close(decoded.reshape(a, b), signs * torch.outer(r, c), 1e-5 if dtype is torch.float32 else 1e-12)
    close(decoded.abs().reshape(a, b).sum(0), x.abs().reshape(a, b).sum(0), 1e-5)
    assert (decoded - x).norm() <= codec.error(stored) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.complex64, COMPLEX], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4)], ids=str)
def test_rank_one_of_complex_numbers_is_that_of_their_pairs(shape, dtype):
    x = randn(shape, dtype, 3)
    decoded, stored = through(RankOne(), x)
    pairs, own = through(RankOne(), torch.view_as_real(x))
    assert torch.equal(torch.view_as_real(decoded), pairs)
    assert all(torch.equal(stored[n], own[n]) for n in own)


@pytest.mark.parametrize("codec", COARSE, ids=str)
@DTYPES
@pytest.mark.parametrize("size", [0.0, 1e-15, 1.0, 1e15])
def test_rank_one_of_a_rank_one_matrix_is_exact(codec, dtype, size):
    x = torch.outer(randn((6,), dtype, 1).abs(), randn((6,), dtype, 2).abs()) * size
    if codec.signed:
        x = x * randn((6, 6), dtype, 3).sign()
    decoded, stored = through(codec, x)
    close(decoded / (size or 1), x / (size or 1), 1e-5)
    y = randn((6, 6), dtype, 4)
    close(codec.decode_onto(y, stored), y + decoded)


def test_every_codec_has_one_of_second_moments_in_as_many_bits():
    assert Int4(block=32).positive == Root(32, bits=4)
    assert RankOne().positive == RankOne(signed=False)
    assert Full().positive == Full()
    for codec, shape in itertools.product((Int4(), RankOne()), [(8, 64), (5, 33)]):
        own, positive = (c.schema(shape, torch.float32) for c in (codec, codec.positive))
        assert positive.keys() <= own.keys()
        assert all(own[n].shape == p.shape for n, p in positive.items())
