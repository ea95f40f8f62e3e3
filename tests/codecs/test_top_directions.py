"""The strongest directions apart, in four bits: MuonQ's momentum."""

import pytest
import torch

import comoving
from comoving.codecs import Int4, Int8, TopDirections
from comoving.rules import Muon
from comoving.rules.orthogonalize import polar
from contract.support import APART, COMPLEX, REAL, Holder, close, randn, step
from references.muonq import MuonQ, quantized

RULE = Muon(0.8, nesterov=False, normalized=True)
SHAPES = pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)


def cosines(n, k):
    """The second to k+1st column of the discrete cosine transform, as rows."""
    i, j = torch.arange(n, dtype=REAL), torch.arange(1, k + 1, dtype=REAL)
    return torch.cos(torch.pi * (2 * i + 1) * j[:, None] / (2 * n)) * (2 / n) ** 0.5


def gradients(shape, dtype, steps=24):
    """With a few strong directions; the seventh is zero."""
    low = randn((shape[0], 2), dtype, 1) @ randn((2, shape[1]), dtype, 2)
    return [(low + randn(shape, dtype, 10 + t)) * (t != 7) * 10.0 ** (t % 3) for t in range(steps)]


@SHAPES
@pytest.mark.parametrize("mu", [255.0, 10.0])
def test_muonq(shape, mu):
    """Resumed from a saved state in the middle; with weight decay, and k = 4 of 12."""
    codec, start = TopDirections(rank=1 / 3, mu=mu), randn(shape, REAL, 9)
    reference = MuonQ(start, 0.03, cosines(shape[1], 4), momentum=0.8, mu=mu, weight_decay=0.1)
    options = {"rule": RULE, "moments": codec, "lr": 0.03, "weight_decay": 0.1, "eps": 1e-7}
    model = Holder(start)
    optimizer = comoving.build("muonq", model, **options)
    (p,) = model.parameters()
    for t, g in enumerate(gradients(shape, REAL)):
        if t == 12:
            saved, model = optimizer.state_dict(), Holder(p.detach())
            optimizer, (p,) = comoving.build("muonq", model, **options), model.parameters()
            optimizer.load_state_dict(saved)
        step(optimizer, p, g)
        close(p.detach(), reference.step(g), 1e-6)
        state = {name.removeprefix("moment.first."): x for name, x in optimizer.state[p].items()}
        assert (codec.decode(state, shape, REAL) - reference.m).norm() < 1e-5


def test_alike_matrices_are_stepped_together_and_complex_ones_too():
    """Each as alone: the batch's rows have directions of their own."""
    for dtype in (REAL, COMPLEX):
        options = {"rule": RULE, "moments": TopDirections(rank=1 / 3), "lr": 0.03}
        starts = [randn((12, 20), dtype, i) for i in range(3)]
        model = Holder(*starts)
        together = comoving.build("muonq", model, **options)
        alone = [Holder(x) for x in starts]
        single = [comoving.build("muonq", m, **options) for m in alone]
        for t in range(6):
            for i, (p, m, optimizer) in enumerate(zip(model.parameters(), alone, single, strict=True)):
                p.grad = gradients((12, 20), dtype)[t] + i * randn((12, 20), dtype, 77 + t)
                (q,) = m.parameters()
                step(optimizer, q, p.grad)
            together.step()
        for p, m in zip(model.parameters(), alone, strict=True):
            close(p.detach(), next(m.parameters()).detach(), 1e-9)


def through(codec, x, times=1):
    stored = {n: torch.zeros(s.shape, dtype=s.dtype) for n, s in codec.schema(tuple(x.shape), x.dtype).items()}
    assert not codec.decode(stored, tuple(x.shape), x.dtype).any()
    for _ in range(times):
        size = codec.encode(x.clone(), stored)
        wide = x.to(COMPLEX if x.is_complex() else REAL)
        torch.testing.assert_close(size.double(), torch.linalg.vector_norm(wide), rtol=1e-5, atol=0)
    return codec.decode(stored, tuple(x.shape), x.dtype), stored


@pytest.mark.parametrize("codec", APART, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (33, 40), (40, 33), (9, 5, 8)], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-25, 1.0, 1e25])
def test_what_is_lost_is_within_its_bound(codec, shape, dtype, size):
    x = randn(shape, dtype, 3) * size
    decoded, stored = through(codec, x, 2)
    assert decoded.isfinite().all() and decoded.dtype is dtype
    lost = torch.linalg.vector_norm((decoded - x) / (size or 1.0))
    assert lost <= codec.error(stored) / (size or 1.0) * (1 + 1e-4) + 1e-6
    assert lost <= 0.35 * torch.linalg.vector_norm(x / (size or 1.0))
    halved = codec.decode(codec.scaled(stored, 0.5), shape, dtype)
    torch.testing.assert_close(halved, decoded * 0.5, rtol=1e-6, atol=0)
    if size:
        y = randn(shape, dtype, 4) * size
        torch.testing.assert_close(codec.decode_onto(y, stored), y + decoded)


def test_without_directions_apart_it_is_the_mu_law_by_rows():
    x = randn((6, 40), REAL, 3)
    decoded, _ = through(TopDirections(rank=0.0, mu=50.0), x)
    close(decoded, quantized(x / x.norm(), 50.0) * x.norm(), 1e-6)


def test_the_polar_factor_survives_where_directions_are_of_different_strength():
    """The point of it: what orthogonalization makes of the momentum, beside the same table for everything."""
    x = randn((64, 96), REAL, 1) + 2.0 * randn((64, 3), REAL, 2) @ randn((3, 96), REAL, 3)
    codecs = TopDirections(1 / 16, 64), TopDirections(0.0, 64), Int4()
    apart, flat, normal = (float((polar(through(codec, x, 4)[0]) - polar(x)).norm() / 8) for codec in codecs)
    assert apart < 0.16
    assert min(flat, normal) > 2 * apart


def test_the_state_is_about_half_a_byte_an_entry():
    model = torch.nn.Linear(768, 768, bias=False)
    optimizer = comoving.build("muonq", model)
    step(optimizer, model.weight, torch.randn(768, 768))
    assert 0.57 < comoving.state_bytes(optimizer) / 768**2 < 0.59


def test_what_is_kept_is_found_by_the_next_encoding():
    """A second encoding of the same matrix knows the directions that the first one found."""
    x = randn((64, 96), REAL, 1) + 2.0 * randn((64, 2), REAL, 2) @ randn((2, 96), REAL, 3)
    codec = TopDirections(rank=1 / 16)
    once, twice = (through(codec, x, times)[1] for times in (1, 4))

    def rest(stored):
        part = {name: y for name, y in stored.items() if name.startswith("rest")}
        kept = {name: torch.zeros_like(y) for name, y in stored.items() if not name.startswith("rest")}
        return float(codec.decode(part | kept | {"size": stored["size"]}, (64, 96), REAL).norm())

    assert rest(twice) < 0.97 * rest(once)


def test_it_is_refused_for_bases_and_recoded_from_others():
    with pytest.raises(ValueError, match=r"bases=TopDirections.*takes directions apart"):
        comoving.build("galore", torch.nn.Linear(32, 48), bases=TopDirections())
    assert TopDirections(block=32).positive.bits == 4


@pytest.mark.parametrize("moments", [Int8(), Int4()], ids=str)
def test_a_residuals_buffer_may_be_stored_by_it(moments):
    """Error feedback whose buffer has directions apart, beside moments in other codes: finite, and it trains."""
    model = Holder(randn((24, 40), REAL, 1))
    (p,) = model.parameters()
    optimizer = comoving.build("ldadam", model, 0.05, rank=4, codec=TopDirections(rank=0.2), moments=moments)
    goal = randn((24, 40), REAL, 5)
    before = float((p.detach() - goal).norm())
    for _ in range(60):
        p.grad = (p - goal).detach()
        optimizer.step()
    assert float((p.detach() - goal).norm()) < 0.9 * before
