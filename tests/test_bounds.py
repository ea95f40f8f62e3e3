"""The largest step on gradients as they really are: few live rows, dead units, a rank of one; and recipes that leave
what they never saw within Adam's bound."""

from math import sqrt

import pytest
import torch

import comoving
from comoving.clock import Clock
from comoving.codecs import Int4, Int8
from comoving.residual import Channel, Fira
from comoving.rules import SOAP
from contract.support import COMPLEX, REAL, Holder, lone, randn, step
from references.soap import adams_bound

STEPS = 30


def one_row(shape, dtype, t):
    """A random live row."""
    g = torch.zeros(shape, dtype=dtype)
    g[int(torch.randint(shape[0], (), generator=torch.Generator().manual_seed(t)))] = randn(shape[1:], dtype, 100 + t)
    return g


def new_row(shape, dtype, t):
    """Another live row at every step."""
    g = torch.zeros(shape, dtype=dtype)
    g[t % shape[0]] = randn(shape[1:], dtype, 100 + t)
    return g


def one_entry(shape, dtype, t):
    g = torch.zeros(shape, dtype=dtype)
    g.view(-1)[int(torch.randint(g.numel(), (), generator=torch.Generator().manual_seed(t)))] = 1
    return g


def rank_one(shape, dtype, t):
    return torch.tensordot(randn(shape[:1], dtype, 1), randn(shape[1:], dtype, 2), 0) * (1 + 0.3 * (t % 3))


def dead_then_alive(shape, dtype, t):
    g = randn(shape, dtype, 100 + t)
    g[(slice(shape[0] // 4, None) if t < 13 else slice(shape[0] // 4))] = 0
    return g


SERIES = [one_row, new_row, one_entry, rank_one, dead_then_alive]


def largest_step(recipe, shape, series, dtype=torch.float32, scale=1.0, **options):
    """max |dw| / lr over all steps."""
    model = Holder(torch.zeros(shape, dtype=dtype))
    optimizer = comoving.build(recipe, model, 1.0, weight_decay=0.0, **options)
    sizes = []
    for t in range(STEPS):
        before = model.w0.detach().clone()
        step(optimizer, model.w0, series(shape, dtype, t) * scale)
        sizes.append((model.w0.detach() - before).abs().max())
    return float(torch.stack(sizes).max())


@pytest.mark.parametrize("series", SERIES, ids=lambda s: s.__name__)
@pytest.mark.parametrize("shape", [(32, 48), (48, 32)], ids=str)
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("fira", {}),
        ("online-subspace-descent", {"residual": Fira()}),
        ("soap", {}),
        ("soap", {"moments": Int4()}),
        ("low-rank-soap", {}),
    ],
    ids=["fira", "osd+fira", "soap", "soap in 4 bits", "low-rank-soap"],
)
def test_steps_are_a_small_multiple_of_the_rate(recipe, options, shape, series):
    assert largest_step(recipe, shape, series, **options) < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, COMPLEX], ids=str)
@pytest.mark.parametrize("series", [one_row, new_row], ids=lambda s: s.__name__)
def test_soap_on_tensors(series, dtype):
    assert largest_step("soap", (16, 12, 10), series, dtype) < 10


def test_a_first_gradient_within_the_frame_does_not_unleash_fira():
    """The first row lies in the frame; the second has z = 0 but a direction from before."""
    model = Holder(torch.zeros(32, 48))
    optimizer = comoving.build("fira", model, 1.0, rank=8, weight_decay=0.0)
    first, second = torch.zeros(32, 48), torch.zeros(32, 48)
    first[3], second[17] = randn((48,), torch.float32, 1), randn((48,), torch.float32, 2)
    step(optimizer, model.w0, first)
    assert float(optimizer.state[model.w0]["scaled.norm"]) == 0
    before = model.w0.detach().clone()
    step(optimizer, model.w0, second)
    # d has one live direction with 48 entries of at most 1; outside of the frame are three times as many directions
    limit = sqrt(48) * sqrt(32 / 8 - 1)
    assert 0.1 < float(optimizer.state[model.w0]["scaled.norm"]) <= limit
    assert (model.w0.detach() - before).norm() <= limit + 0.25 * sqrt(48)


@pytest.mark.parametrize("rest", [0.0, 1e-6])
def test_rounding_outside_the_frame_is_no_limit(rest):
    """A first batch of low rank, up to rounding; the next ones are not held at its 1e-6."""
    model = Holder(torch.zeros(12, 20))
    optimizer = comoving.build("fira", model, 1.0, rank=4, weight_decay=0.0)
    low = randn((12, 2), torch.float32, 1) @ randn((2, 20), torch.float32, 2)
    step(optimizer, model.w0, low + rest * randn((12, 20), torch.float32, 3))
    step(optimizer, model.w0, randn((12, 20), torch.float32, 4))
    assert float(optimizer.state[model.w0]["scaled.norm"]) > 1


@pytest.mark.parametrize("residual", [Fira(growth=None), Channel(growth=None)], ids=str)
def test_without_a_limit_the_floor_keeps_channels_finite(residual):
    size = largest_step("galore", (32, 48), one_row, scale=1e12, residual=residual)
    assert size < 50 / torch.finfo(torch.float32).eps


def test_a_draw_that_misses_the_first_gradient_does_not_unleash_apollo():
    """|d| <= sqrt(48) for one direction of 48 entries; of twenty draws some hold a tenth of the row's average share."""
    for seed in range(20):
        p, optimizer = lone(torch.zeros(32, 48), rank=1, seed=seed, **comoving.recipes()["apollo-mini"].options)
        step(optimizer, p, one_row((32, 48), torch.float32, 1))
        assert 0 < float(optimizer.state[p]["scaled.norm"]) <= sqrt(48) * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.999), (0.99, 0.95), (0.5, 0.25)], ids=str)
def test_soaps_entries_stay_within_adams_bound(betas, dtype):
    """In the bases; Cauchy-Schwarz, summed term by term."""
    rule, (b1, b2) = SOAP(every=3), betas
    p, optimizer = lone(torch.zeros(12, 9, dtype=dtype), rule=rule, rank=1.0, betas=betas, lr=1.0, weight_decay=0.0)
    reached = 0.0
    for t in range(1, 20):
        before = p.detach().clone()
        step(optimizer, p, one_row((12, 9), dtype, t))
        left, right = (optimizer.state[p][f"soap.{n}.basis"] for n in (0, 1))
        d = (left.mH @ (before - p.detach()) @ right.conj()).abs().max()
        bound = adams_bound(t, b1, b2)
        assert Clock(torch.tensor(float(t)), b1, b2).limit == pytest.approx(bound, rel=1e-9)
        assert d <= bound * (1 + 1e-9)
        reached = max(reached, float(d) / bound)
    assert reached > 0.99  # and the bound is at work


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_the_limit_without_a_second_moment(b1):
    assert Clock(torch.tensor(3.0), b1, 0.0).limit == (1.0 if b1 == 0 else float("inf"))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("moments", [Int4(), Int4(table="linear"), Int8(), Int8(table="dynamic")], ids=str)
@pytest.mark.parametrize("recipe", ["soap", "low-rank-soap"])
def test_covariances_beyond_float32_in_codes(recipe, moments, dtype):
    """|g|^2 = 1e60 is no float32 number, which the steps of blocks are."""
    assert largest_step(recipe, (10, 8), one_row, dtype, scale=1e30, moments=moments) < 20


def adaptive(shape, dtype=torch.float32, **options):
    model = Holder(torch.zeros(shape, dtype=dtype))
    ranks = comoving.ranks.Energy(low=0.5, high=0.7, step=1)
    return model.w0, comoving.build("low-rank-soap", model, 1e-2, (3,) * len(shape), ranks=ranks, **options)


@pytest.mark.parametrize("shape", [(10, 8, 6), (9, 6, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_adaptive_ranks_of_low_rank_soap_reach_one_and_resume(shape, dtype):
    def gradient(t):
        if t % 24 >= 12:
            return randn(shape, dtype, t)
        # of rank one in all modes but two, which is when the core looks like a matrix
        g = torch.tensordot(randn(shape[:-2], dtype, 1), randn(shape[-2:], dtype, 10 + t), 0)
        return g + 1e-3 * randn(shape, dtype, t)

    p, optimizer = adaptive(shape, dtype)
    seen, twins = set(), []
    for t in range(36):
        step(optimizer, p, gradient(t))
        seen.add(tuple(optimizer.state[p]["moment.first"].shape))
        for q, other in twins:
            step(other, q, gradient(t))
            assert torch.equal(p, q)
        if t in (9, 14, 21):
            q, other = adaptive(shape, dtype)
            with torch.no_grad():
                q.copy_(p)
            other.load_state_dict(optimizer.state_dict())
            twins.append((q, other))
    assert any(min(core) == 1 for core in seen)
    assert len(seen) > 2
    assert p.isfinite().all()


def test_ranks_that_would_change_which_side_is_turned_are_refused():
    with pytest.raises(ValueError, match=r"slots of another kind.*one_sided=False"):
        lone(randn((6, 9)), rule=SOAP(one_sided=True), rank=(2, 3), ranks=comoving.ranks.Energy())
    lone(randn((6, 9)), rule=SOAP(one_sided=True), rank=3, ranks=comoving.ranks.Energy())
