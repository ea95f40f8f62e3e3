"""Columns of unfoldings: how they are formed, drawn and weighted, and what they capture."""

import pytest
import torch

from comoving import LowRankOptimizer
from comoving.finders import Exact, Nystroem, Operand
from comoving.finders.columns import inclusion
from comoving.frames import Blocks, Modes
from comoving.linalg import unfold
from comoving.ranks import Tolerance
from contract.support import COMPLEX, REAL, close, known_rank, memory_of, randn, random_frame, search

from .test_tucker import TENSORS, cold, decaying, energy

FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=str)
WAYS = pytest.mark.parametrize("columns", ["uniform", "energy", "slices"])


def spiked(dtype=REAL):
    """48 columns, of which four, far apart and in directions of their own, hold nearly all energy."""
    x = 0.02 * randn((32, 48), dtype, 1)
    x[:, [3, 17, 30, 41]] += torch.linalg.qr(randn((32, 4), dtype, 2)).Q
    return x


def concentrated():
    """A tensor with all but 1% of the energy in a few slices."""
    strong, mask = known_rank((20, 24, 22), (3, 3, 3), seed=1), torch.zeros(24, 22, dtype=REAL)
    mask[:3, :3] = 1.0
    return strong * mask + 0.01 * strong.abs().mean() * randn((20, 24, 22))


@FIELDS
@TENSORS
@pytest.mark.parametrize("count", [1, 7, None])
def test_an_operand_in_two_terms_is_sampled_as_the_sum(shape, ranks, dtype, count):
    x, frame = randn(shape, dtype, 1), random_frame(shape, ranks, dtype, 2)
    w = frame.project(randn(shape, dtype, 3))
    whole = 0.3 * x + frame.lift(w)
    for n, d in enumerate(shape):
        columns = torch.randperm(whole.numel() // d, generator=torch.Generator().manual_seed(n))[:count]
        expected = unfold(whole, n, whole.ndim)[:, columns]
        operand = Operand(x, 0.3, frame, w)
        assert operand.columns(n) == whole.numel() // d
        close(operand.sample(n, columns), expected)
        assert ("_formed" in vars(operand)) == (200 * len(columns) * d >= whole.numel())
        _ = operand.full()
        close(operand.sample(n, columns), expected)
        close(Operand(whole).sample(n, columns), expected)


@FIELDS
@WAYS
@pytest.mark.parametrize("samples", [0.9999, 11.0, 1000.0])
def test_as_many_samples_as_columns_are_exact(columns, dtype, samples):
    for shape, ranks in (((12, 20), (4, None)), ((7, 6, 5), (5, 4, 4))):
        x = decaying(shape, dtype)
        finder = Nystroem(samples=samples, columns=columns)
        frame, exact = cold(finder, x, ranks), cold(Exact(method="svd"), x, ranks)
        for u, v in zip(frame.factors, exact.factors, strict=True):
            if u is not None:
                close(u @ u.mH, v @ v.mH, 1e-7)


@FIELDS
@WAYS
def test_the_sampled_gram_matrix_is_unbiased(columns, dtype):
    """The mean over many draws, within six of its own standard errors and 3% in norm; unweighted, it would not be."""
    x, mode, draws = decaying((5, 6, 7), dtype), 1, 3000
    finder = Nystroem(samples=10, columns=columns)
    memory = memory_of(finder, x + 0.3 * randn((5, 6, 7), dtype, 9) * x.abs().mean(), (2, 2, 2))
    exact, grams, plain = Operand(x).gram(mode), [], []
    often = torch.zeros(35, dtype=REAL)
    for t in range(draws):
        chosen, weights = finder.draw((5, 6, 7), {mode: 2}, t, memory)[mode]
        assert len(chosen) == 10
        assert columns == "slices" or len(set(chosen.tolist())) == 10
        often[chosen] += 1 / draws
        sampled = Operand(x).sample(mode, chosen)
        plain.append(3.5 * sampled @ sampled.mH)
        grams.append(plain[-1] if weights is None else sampled * weights @ sampled.mH)
    grams = torch.stack(grams)
    mean, deviation = grams.mean(0), (grams - grams.mean(0)).abs().square().mean(0).sqrt()
    assert ((mean - exact).abs() <= 6 * deviation / draws**0.5 + 1e-12).all()
    assert (mean - exact).norm() < 0.03 * exact.norm()
    biased = (torch.stack(plain).mean(0) - exact).norm() > 0.1 * exact.norm()
    assert bool(biased) is (columns != "uniform")
    if columns == "energy":
        shares = memory["columns.1"] / memory["columns.1"].sum()
        close(often, inclusion(0.9 * shares + 0.1 / 35, 10), 0.04)


def test_chances_are_proportional_below_one_and_sum_to_the_samples():
    shares = randn((50,), seed=1).abs() ** 3
    for count in (1, 7, 20, 49):
        chances = inclusion(shares, count)
        assert chances.sum() == pytest.approx(count)
        assert chances.max() <= 1
        free = chances < 1
        ratio = (chances / shares)[free]
        close(ratio, ratio[:1].expand_as(ratio), 1e-12)
        assert (shares[~free] * ratio.max() >= 1 - 1e-12).all()
    assert (inclusion(shares, 20) == 1).any()


@FIELDS
def test_the_factor_is_that_of_the_weighted_sample(dtype):
    x, ranks = spiked(dtype) + 0.5 * randn((32, 48), dtype, 3), (4, None)
    finder = Nystroem(columns="energy")
    memory = memory_of(finder, x, ranks)
    chosen, weights = finder.draw((32, 48), {0: 4}, 0, memory)[0]
    assert len(chosen) == 8
    frame = finder.find(Operand(x), Modes().start(x, ranks, None, 0), True, memory)
    u = torch.linalg.svd(x[:, chosen] * weights.sqrt()).U[:, :4]
    close(frame.factors[0] @ frame.factors[0].mH, u @ u.mH, 1e-7)
    plain = torch.linalg.svd(x[:, chosen]).U[:, :4]
    assert (plain @ plain.mH - u @ u.mH).norm() > 0.1


@pytest.mark.parametrize(
    ("x", "rank", "samples", "columns"),
    [
        (spiked(), 4, 2.0, "energy"), (spiked(COMPLEX), 4, 2.0, "energy"),
        (concentrated(), 3, 16, "slices"), (concentrated(), 3, 16, "energy"),
    ],
)  # fmt: skip
def test_energies_beat_uniform_draws_where_few_columns_hold_it(x, rank, samples, columns):
    ranks = (rank, *[None] * (x.ndim - 1))
    best = energy(cold(Exact(), x, ranks), x)
    shares = {
        way: sum(energy(cold(Nystroem(samples=samples, columns=way, seed=s), x, ranks), x) for s in range(10)) / 10
        for way in ("uniform", columns)
    }
    assert shares[columns] > 0.95 * best
    assert shares["uniform"] < shares[columns] - 0.05


@FIELDS
@pytest.mark.parametrize("columns", ["energy", "slices"])
def test_energies_are_decayed_sums_whatever_the_gradients_size(columns, dtype):
    finder, shape, ranks = Nystroem(columns=columns, decay=0.5), (5, 4, 6), (2, None, 3)
    memory = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in finder.schema(shape, ranks, dtype).items()}
    expected = {name: x.clone() for name, x in memory.items() if name != "draws"}
    modes = {"energy": {"columns.0": (0,), "columns.2": (2,)}, "slices": {f"energy.{m}": m for m in range(3)}}[columns]
    assert set(expected) == set(modes)
    for t, size in enumerate((1e-27, 1.0, 1e27, 0.0)):
        g = randn(shape, dtype, t) * size
        finder.observe(g, memory)
        squares = g.abs().square() / (g.abs().square().sum() if size else 1.0)
        for name, mode in modes.items():
            summed = mode if columns == "energy" else [i for i in range(3) if i != mode]
            expected[name] = 0.5 * expected[name] + squares.sum(summed).flatten()
            close(memory[name], expected[name])


def test_more_samples_than_columns_are_refused_at_construction():
    p = torch.nn.Parameter(torch.zeros(16, 24))
    with pytest.raises(ValueError, match=r"weight: samples must lie in \[1, 24\].*mode 0, got 25"):
        LowRankOptimizer([("weight", p)], rank=4, finder=Nystroem(samples=25))
    LowRankOptimizer([("weight", p)], rank=4, finder=Nystroem(samples=24))
    p = torch.nn.Parameter(torch.zeros(3, 16, 24))
    LowRankOptimizer([p], rank=4, frame=Blocks(), finder=Nystroem(samples=24))  # by their own columns
    with pytest.raises(ValueError, match=r"samples must lie in \[1, 24\].*got 25"):
        LowRankOptimizer([p], rank=4, frame=Blocks(), finder=Nystroem(samples=25))


@WAYS
def test_a_fixed_number_of_samples_follows_the_rank_where_that_is_higher(columns):
    """In the exact span of as many columns as the rank asks for; ranks that adapt pass the number on the way."""
    x = randn((16, 24), REAL)
    finder, more = Nystroem(samples=3, columns=columns), Nystroem(samples=4, columns=columns)
    frames = [search(f, x, (4, None), False)[1].factors[0] for f in (finder, more)]
    close(frames[0] @ frames[0].T, frames[1] @ frames[1].T, 1e-9)
    p = torch.nn.Parameter(torch.zeros(16, 24))
    optimizer = LowRankOptimizer([p], rank=2, finder=finder, ranks=Tolerance(step=1, error=0.05))
    for t in range(12):
        p.grad = randn((16, 24), torch.float32, t)
        optimizer.step()
    assert optimizer.state[p]["frame.0"].shape[1] > 3
    assert p.isfinite().all()


def test_a_share_of_the_columns_is_never_too_small_for_the_rank():
    assert [Nystroem(samples=0.1).count(n, 4) for n in (5, 100, 1000)] == [5, 12, 100]
    assert Nystroem(samples=0.1).count(100, 20) == 40
    assert Nystroem(samples=1.0).count(100, 20) == 20
