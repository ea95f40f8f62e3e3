"""A batch of tensors is stored as each of them alone, whatever its mates are."""

import pytest
import torch

from comoving.codecs import BFloat16, Full, Int4, Int8, RankOne, Root, TopDirections, store
from comoving.frames import ModeFrame, Modes
from comoving.frames import stored as stored_frame
from contract.support import APART, COARSE, CODECS, COMPLEX, DRAWN, POSITIVE, REAL, randn, random_frame

F32, C64 = torch.float32, torch.complex64
ROOTS = [
    *POSITIVE,
    Root(table="dynamic"),
    Root(rounding="stochastic"),
    Root(block=8, bits=4, rounding="stochastic"),
    Root(block=8, table="dynamic", rounding="stochastic"),
]
ALL = [*CODECS, Int8(block=8, table="dynamic"), *DRAWN, *COARSE, *APART, *ROOTS]
SHAPES = [(), (37,), (5, 301), (6, 8), (3, 5, 7), (4, 1, 3, 9)]
KINDS = ["normal", "zero", "huge", "denormal"]


def batch(shape, dtype, positive, seed=0):
    """Members of the kinds above, along dimension 0; their normal entries are of several sizes."""
    x = randn((len(KINDS), *shape), dtype, seed) * torch.exp(3 * randn((len(KINDS), *shape), dtype.to_real(), seed + 1))
    x[1] = 0
    x[2] *= 1e30
    x[3] *= 1e-310 if dtype.to_real() is REAL else 1e-41
    return x.abs() if positive else x


def empty(codec, shape, dtype, members=None):
    """Parts of one tensor, or of so many; seeds of their own."""
    lead = () if members is None else (members,)
    stored = {n: torch.zeros((*lead, *p.shape), dtype=p.dtype) for n, p in codec.schema(shape, dtype).items()}
    if "seed" in stored:
        stored["seed"] += 17 if members is None else torch.arange(17, 17 + members)
    return stored


def alone(codec, shape, dtype, i):
    stored = empty(codec, shape, dtype)
    if "seed" in stored:
        stored["seed"] += i
    return stored


def near(a, b, dtype):
    """Figures of the same bits but for the order of sums; infinite ones too."""
    tolerance = 1e-5 if dtype.to_real() is F32 else 1e-12
    torch.testing.assert_close(a, b, rtol=tolerance, atol=0.0)


def same(a, b, codec, dtype):
    """Bit by bit; sums of absolute values to rounding, and what products are rounded to with few steps more or less."""
    if isinstance(codec, TopDirections):
        assert a.dtype == b.dtype
        if a.is_floating_point() | a.is_complex():
            assert torch.linalg.vector_norm(a - b) <= 0.05 * torch.linalg.vector_norm(b)
        else:
            assert (a != b).sum() <= 0.02 * a.numel() + 1
    elif isinstance(codec, RankOne) and a.is_floating_point() | a.is_complex():
        near(a, b, dtype)
    else:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_every_codec_takes_batches():
    assert all(codec.batched for codec in ALL)
    assert {type(codec) for codec in ALL} == {BFloat16, Full, Int4, Int8, RankOne, Root, TopDirections}


@pytest.mark.parametrize("codec", ALL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, REAL, C64, COMPLEX], ids=str)
def test_a_batch_is_stored_as_its_members(codec, shape, dtype):
    positive = codec.positive == codec and not isinstance(codec, BFloat16 | Full)
    dtype = dtype.to_real() if positive else dtype
    many = empty(codec, shape, dtype, len(KINDS))
    single = [alone(codec, shape, dtype, i) for i in range(len(KINDS))]
    for turn in range(2):  # a second encoding goes on from the first one's seeds
        x = batch(shape, dtype, positive, turn)
        given = x.clone()
        sizes = codec.encode(x.clone(), many, 1)
        errors, values = codec.error(many, 1), codec.decode(many, shape, dtype)
        onto, halved = codec.decode_onto(given, many), codec.scaled(many, 0.5)
        assert sizes.shape == errors.shape == (len(KINDS),)
        assert values.shape == onto.shape == x.shape
        assert torch.equal(given, x)
        for i, own in enumerate(single):
            near(sizes[i], codec.encode(x[i].clone(), own), dtype)
            assert own.keys() == many.keys()
            for name, part in own.items():
                same(many[name][i], part, codec, dtype)
                same(halved[name][i], codec.scaled(own, 0.5)[name], codec, dtype)
            near(errors[i], codec.error(own), F32)
            same(values[i], codec.decode(own, shape, dtype), codec, dtype)
            (
                same(onto[i], codec.decode_onto(x[i], own), codec, dtype)
                if codec in APART
                else near(onto[i], codec.decode_onto(x[i], own), dtype)
            )
        assert not values[1].any() or isinstance(codec, Root)


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_a_batch_is_stored_beside_what_is_there(codec):
    shape, dtype = (5, 37), F32
    x = batch(shape, dtype, positive=True)
    there = empty(codec, shape, dtype, len(KINDS))
    before = {name: part.clone() for name, part in there.items()}
    sizes, many = store(codec, x.clone(), there, 1)
    assert all(torch.equal(there[name], part) for name, part in before.items())
    for i in range(len(KINDS)):
        size, own = store(codec, x[i].clone(), alone(codec, shape, dtype, i))
        near(sizes[i], size, dtype)
        for name, part in own.items():
            same(many[name][i], part, codec, dtype)


@pytest.mark.parametrize("codec", [Int8(), Int8(table="dynamic"), Int8(rounding="stochastic")], ids=str)
@pytest.mark.parametrize("shape", [(100, 700), (300, 700), (560, 500)], ids=str)
def test_members_beyond_a_cache_are_stored_as_alone(codec, shape):
    """Several of the first at a time, one of the second; the third is cut itself."""
    x = randn((4, *shape), F32)
    many = empty(codec, shape, F32, 4)
    sizes, onto = codec.encode(x.clone(), many, 1), codec.decode_onto(x, many)
    for i in range(4):
        own = alone(codec, shape, F32, i)
        near(sizes[i], codec.encode(x[i].clone(), own), F32)
        assert all(torch.equal(many[name][i], part) for name, part in own.items())
        near(onto[i], codec.decode_onto(x[i], own), F32)


# --------------------------------------------------------------------------------------------------- coded frames

BASES = [BFloat16(), Int8(), Int4(block=256, table="linear"), Int8(table="dynamic", rounding="stochastic")]


def equal_bases(many, single):
    """The same to rounding: products of a batch may sum in another order."""
    for i, frame in enumerate(single):
        for u, v in zip(many.factors, frame.factors, strict=True):
            assert (u is None) == (v is None)
            if u is not None:
                torch.testing.assert_close(u[i], v, rtol=0, atol=64 * torch.finfo(u.dtype).eps)


def equal_states(many, single):
    for i, state in enumerate(single):
        assert many.keys() == state.keys()
        for name, x in state.items():
            assert torch.equal(many[name] if name.endswith(".rank") else many[name][i], x), name


def confusing(d, rank, dtype):
    """Orthonormal columns of which the first two are equal in few bits."""
    u = torch.full((d, 2), 1.0, dtype=dtype)
    u[0] = (d - 1) ** 0.5
    u[1:, 1] = -1.0
    return torch.linalg.qr(torch.cat([u, randn((d, rank - 2), dtype)], dim=1)).Q


@pytest.mark.parametrize("codec", BASES, ids=str)
@pytest.mark.parametrize("dtype", [F32, C64, REAL], ids=str)
def test_coded_frames_of_a_batch_are_those_of_its_members(codec, dtype):
    """Of three members the second keeps its first factor, and the third one's directions fall together in few bits."""
    shape, ranks, keys = (256, 7, 30), (3, None, 4), [(5, 0), (5, 1), (5, 2)]
    group = {"frame": Modes(), "bases": codec}
    frames = [random_frame(shape, ranks, dtype, seed) for seed in (1, 2, 3)]
    frames[2] = ModeFrame((confusing(256, 3, dtype), *frames[2].factors[1:]))
    many, single = {}, [{} for _ in frames]
    used = stored_frame.put(group, many, ModeFrame.stack(frames), None, shape, (), keys)
    members = zip(single, frames, keys, strict=True)
    alone = [stored_frame.put(group, state, f, None, shape, key) for state, f, key in members]
    equal_states(many, single)
    equal_bases(used, alone)
    loaded = stored_frame.load(group, many, shape, dtype)
    equal_bases(loaded, alone)
    assert stored_frame.ranks(many, shape) == ranks
    new = [random_frame(shape, ranks, dtype, seed) for seed in (4, 5, 6)]
    before = ModeFrame.stack(alone)
    new[1] = ModeFrame((alone[1].factors[0], *new[1].factors[1:]))
    kept = {name: x[1].clone() for name, x in many.items() if name.startswith("frame.0.") and x.ndim}
    used = stored_frame.put(group, many, ModeFrame.stack(new), before, shape, (), keys)
    members = zip(single, new, alone, keys, strict=True)
    alone = [stored_frame.put(group, state, f, old, shape, key) for state, f, old, key in members]
    equal_states(many, single)
    equal_bases(used, alone)
    assert kept
    assert all(torch.equal(many[name][1], x) for name, x in kept.items())
    assert torch.equal(used.factors[0][1], before.factors[0][1])
