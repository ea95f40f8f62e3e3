"""Error feedback: nothing is lost but what the codec rounds away, and the codec says how much that is at most."""

from math import ceil, prod

import pytest
import torch

from comoving import LowRankOptimizer
from comoving.codecs import BFloat16, Full, Int4, Int8
from comoving.finders import Exact, Power
from comoving.residual import Cores, Feedback, Passage
from contract.support import (
    CODECS,
    COMPLEX,
    DRAWN,
    REAL,
    TRANSPORTS,
    Holder,
    close,
    feedback_error,
    feedback_of,
    frame_of,
    lone,
    randn,
    random_frame,
    step,
)

FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
FLOOR = 1e-19  # float32 norms vanish below this, since they square
LOSSY = [codec for codec in CODECS if codec != Full()]
SHAPES = pytest.mark.parametrize(
    ("shape", "ranks"), [((6, 9), (2, None)), ((9, 6), (3, 2)), ((5, 4, 6), (2, None, 3))], ids=["side", "both", "3-D"]
)


class Sums:
    """Both sides of  sum F m + b1/(1-b1) F m + e = sum g,  read from the optimizer's state after each step."""

    def __init__(self, start, **options):
        self.b1 = options["betas"][0]
        self.p, self.optimizer = lone(start, eps=1e-3, **({"residual": Feedback()} | options))
        self.gradients = self.lifted = torch.zeros_like(start)
        self.frames, self.codec_error = [], 0.0

    def step(self, g):
        step(self.optimizer, self.p, g)
        frame = frame_of(self.optimizer, self.p)
        self.frames.append(frame)
        self.last = frame.lift(self.optimizer.state[self.p]["moment.first"])
        self.gradients, self.lifted = self.gradients + g, self.lifted + self.last
        self.feedback = feedback_of(self.optimizer, self.p)
        self.codec_error += feedback_error(self.optimizer, self.p)

    def gap(self):
        return self.lifted + self.b1 / (1 - self.b1) * self.last + self.feedback - self.gradients


@FIELDS
@SHAPES
@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("finder", [Power(inertia=0.5), Exact()], ids=["power", "exact"])
@pytest.mark.parametrize("lazy", [True, False])
def test_telescopes(shape, ranks, transport, period, finder, lazy, dtype):
    sums = Sums(
        randn(shape, dtype),
        rank=ranks,
        transport=transport,
        finder=finder,
        refresh_every=period,
        betas=(0.8, 0.95),
        codec=Full(),
        residual=Feedback(lazy),
    )
    for t in range(11):
        sums.step(randn(shape, dtype, 30 + t))
        assert sums.gap().norm() <= 1e-10
    assert sums.feedback.norm() > 0.1 * sums.gradients.norm() / 11
    turned = [not torch.equal(a.factors[0], b.factors[0]) for a, b in zip(sums.frames, sums.frames[1:], strict=False)]
    assert turned == [(t + 1) % period == 0 for t in range(10)]


@FIELDS
@SHAPES
@pytest.mark.parametrize("codec", LOSSY, ids=str)
def test_a_codec_loses_no_more_than_it_says(shape, ranks, codec, dtype):
    """What is missing after every step is at most the sum of the codec's own bounds, and is not nothing."""
    sums = Sums(randn(shape, dtype), rank=ranks, refresh_every=2, betas=(0.8, 0.95), codec=codec)
    for t in range(12):
        sums.step(randn(shape, dtype, 30 + t))
        assert 0 < sums.gap().norm() <= sums.codec_error * (1 + 1e-5)
    assert sums.codec_error < (2 if isinstance(codec, Int4) else 0.5) * sums.gradients.norm()


@FIELDS
@SHAPES
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_a_changing_decay_rate_loses_nothing(shape, ranks, lazy, beta1, dtype):
    """OneCycleLR turns b1 at every step; e then telescopes with the recursion m <- b1 m + (1 - b1) z as it was."""
    p, optimizer = lone(randn(shape, dtype), rank=ranks, residual=Feedback(lazy), refresh_every=3, eps=1e-3)
    before = torch.zeros(shape, dtype=dtype)
    for t in range(9):
        b1 = beta1 if t % 2 else 0.7
        optimizer.param_groups[0]["betas"] = (b1, 0.95)
        old, m = (frame_of(optimizer, p), optimizer.state[p]["moment.first"].clone()) if t else (None, None)
        g = randn(shape, dtype, 30 + t)
        step(optimizer, p, g)
        frame = frame_of(optimizer, p)
        expected = g + before - frame.lift(frame.project(g + before))
        if old is not None:
            expected += b1 / (1 - b1) * (old.lift(m) - frame.lift(frame.project(old.lift(m))))
        before = feedback_of(optimizer, p)
        close(before, expected, 1e-8)


@FIELDS
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("codec", [*CODECS, *DRAWN], ids=str)
def test_the_lost_momentum_enters_raw(codec, lazy, dtype):
    """e = g~ - F' z + a/b (F m - F' m'), for any momentum handed over: no bias correction of m."""
    shape, residual = (6, 9), Feedback(lazy)
    old, new = random_frame(shape, (2, None), dtype, 1), random_frame(shape, (3, None), dtype, 2)
    g, m, m_new = randn(shape, dtype, 3), randn((2, 9), dtype, 4), randn((3, 9), dtype, 5)
    schema = residual.schema(codec, shape, (2, 9), dtype)
    state = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in schema.items()}
    seen = residual.restore(g, Passage(old, m, 0.8, 0.2, old, m), True, state, codec)
    close(seen.full(), g)
    z, overlap = new.project(g), new.overlap(old)
    passage = Passage(new, m_new, 0.8, 0.2, old, m, overlap, new.project(old.lift(m)))
    close(passage.lost(), (old.lift(m) - new.lift(m_new)).norm(), 1e-5)
    expected = g - new.lift(z) + 4.0 * (old.lift(m) - new.lift(m_new))
    size = residual.keep(seen.dense.clone(), Cores.only(z), passage, True, state, codec)
    close(size.double(), expected.norm(), 1e-6)
    then = 0.8 * m_new + 0.2 * z
    again = residual.restore(g, Passage(new, then, 0.8, 0.2, new, then), True, state, codec)
    assert (again.full() - g - expected).norm() <= residual.error(state, codec) * (1 + 1e-5) + 1e-12


def run(p, optimizer, shape, dtype, steps=14):
    """Steps of two gradients now and then, and decay rates that change."""
    found = []
    for t in range(steps):
        optimizer.param_groups[0]["betas"] = (0.7 if t % 5 else 0.8, 0.95)
        for i in range(2 if t % 4 == 2 else 1):
            optimizer.absorb(p, randn(shape, dtype, 30 + 2 * t + i))
        optimizer.apply(p)
        found.append((feedback_of(optimizer, p), p.detach().clone(), frame_of(optimizer, p)))
    return found


@FIELDS
@SHAPES
@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("options", [{}, {"decay": 0.7}, {"window": 3}, {"momentum": False}], ids=str)
def test_a_core_of_ones_own_is_what_momentum_shows_of_it(shape, ranks, transport, options, dtype):
    """Over refreshes and windows, to rounding."""
    parts = {"transport": transport, "refresh_every": 3, "eps": 1e-3}
    plain, own = (
        run(*lone(randn(shape, dtype), rank=ranks, residual=residual, **parts), shape, dtype)
        for residual in (Feedback(**options), Feedback(**options, own=True))
    )
    for (e, w, f), (own_e, own_w, own_f) in zip(plain, own, strict=True):
        close(own_e, e, 1e-12)
        close(own_w, w, 1e-12)
        for a, b in zip(own_f.factors, f.factors, strict=True):
            assert (a is None) is (b is None)
            if a is not None:
                close(a, b, 1e-12)


@FIELDS
def test_batches_and_windows_with_a_core_of_ones_own(dtype):
    """Several parameters at once, in windows of the backward pass that are clipped."""
    found = []
    for residual in (Feedback(), Feedback(own=True)):
        model = Holder(*(randn((6, 9), dtype, i) for i in range(3)))
        optimizer = LowRankOptimizer(model.parameters(), 0.01, 2, residual=residual, refresh_every=2, eps=1e-3)
        optimizer.step_in_backward(accumulate=2, clip=3.0)
        for t in range(12):
            for i, p in enumerate(model.parameters()):
                (randn((6, 9), dtype, 50 + 3 * t + i).conj() * p).sum().real.backward()
            if t % 2:
                optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-12)


# ---------------------------------------------------------------------------------------------------------- codecs


def encoded(codec, x):
    stored = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in codec.schema(tuple(x.shape), x.dtype).items()}
    codec.encode(x.clone(), stored)
    return stored


def roundtrip(codec, x):
    return codec.decode(encoded(codec, x), tuple(x.shape), x.dtype).clone()


def blocks_of(x, block):
    """Row by row of mode 0, complex as pairs: the blocks as lists of flat indices into the reals."""
    length = prod(x.shape[1:]) * (2 if x.is_complex() else 1)
    count = max(1, ceil(length / block))
    width = ceil(length / count)
    for row in range(x.shape[0]):
        for first in range(0, length, width):
            yield range(row * length + first, row * length + min(first + width, length))


def reals(x):
    return (torch.view_as_real(x) if x.is_complex() else x).flatten()


SAMPLES = {
    "normal": randn,
    "same sign": lambda shape, dtype: (randn(shape, REAL).abs() + 5).to(dtype),
    "zero": lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    "zero blocks": lambda shape, dtype: (
        randn(shape, dtype) * (torch.arange(shape[0]) % 2).reshape(-1, *[1] * (len(shape) - 1))
    ),
    "outlier": lambda shape, dtype: randn(shape, dtype).index_fill(0, torch.tensor([1]), 1e4),
    "small": lambda shape, dtype: randn(shape, dtype) * 1e-12,
    "denormal": lambda shape, dtype: randn(shape, dtype) * 3e-39,
    "large": lambda shape, dtype: randn(shape, dtype) * 1e15,
}
CODED = pytest.mark.parametrize("shape", [(3, 300), (4, 8), (5,), (3, 7, 5), (2, 1), (3, 513)], ids=str)


@CODED
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("block", [8, 256])
def test_int8_takes_the_nearest_of_its_codes(sample, block, shape, dtype):
    """Against every code c in -127 ... 127 times max|x| / 127 of the block, and within the norm that it reports."""
    codec, x = Int8(block=block), SAMPLES[sample](shape, dtype).to(dtype)
    decoded = roundtrip(codec, x)
    values, found = reals(x).double(), reals(decoded).double()
    grid = torch.arange(-127, 128, dtype=REAL)
    for block_of in blocks_of(x, block):
        own = values[list(block_of)]
        largest = own.abs().max()
        step = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
        best = (own[:, None] - grid * step).abs().amin(1)
        assert ((own - found[list(block_of)]).abs() <= best + 2e-6 * largest + 2e-44 * 127).all()
    assert (found - values).norm() <= codec.error(encoded(codec, x)) * (1 + 1e-5) + 1e-6 * values.norm() + FLOOR
    assert decoded.shape == x.shape
    assert decoded.dtype == x.dtype


@CODED
@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_no_block_crosses_rows_of_mode_0(codec, shape, dtype):
    """A huge entry in one row changes no other row's code, so that sharding cuts no block."""
    x = randn(shape, dtype)
    spiked = x.clone()
    spiked[1] = 1e6
    before, after = roundtrip(codec, x), roundtrip(codec, spiked)
    others = [i for i in range(shape[0]) if i != 1]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[1], after[1])
    assert all(x.shape[0] == shape[0] for x in encoded(codec, x).values())


@pytest.mark.parametrize("codec", [*CODECS, *DRAWN], ids=str)
def test_complex_is_stored_as_pairs(codec):
    x = randn((5, 37), torch.complex64)
    assert torch.equal(torch.view_as_real(roundtrip(codec, x)), roundtrip(codec, torch.view_as_real(x)))


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL])
def test_bfloat16_rounds_to_nearest(sample, dtype):
    x = SAMPLES[sample]((5, 37), dtype).to(dtype)
    decoded = roundtrip(BFloat16(), x)
    assert torch.equal(reals(decoded), reals(x).bfloat16().to(reals(x).dtype))
    assert (decoded - x).norm() <= BFloat16().error(encoded(BFloat16(), x)) * (1 + 1e-5) + FLOOR


@pytest.mark.parametrize("codec", [*LOSSY, *DRAWN], ids=str)
def test_the_reported_error_is_not_far_above_the_true_one(codec):
    x = randn((32, 600), torch.float32)
    true, said = (roundtrip(codec, x) - x).norm(), codec.error(encoded(codec, x))
    assert true <= said <= 4 * true


def test_full_is_the_storage_itself():
    x = randn((4, 5))
    stored = encoded(Full(), x)
    assert Full().decode(stored, (4, 5), REAL) is stored["value"]
    assert torch.equal(stored["value"], x)
    assert Full().error(stored) == 0


@pytest.mark.parametrize(("codec", "limit"), [(Full(), 4.0), (BFloat16(), 2.0), (Int8(), 1.02), (Int8(block=8), 1.5)])
def test_bytes_a_number(codec, limit):
    schema = codec.schema((64, 512), torch.float32)
    assert sum(prod(p.shape) * p.dtype.itemsize for p in schema.values()) / (64 * 512) <= limit
