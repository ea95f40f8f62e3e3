"""Stochastic rounding into bfloat16: unbiased, exact where it can be, and enough for updates that nearest loses."""

import copy
import io

import pytest
import torch
from torch import nn

from comoving import AdamW, LowRankOptimizer, build, param_groups
from comoving.finders import Exact
from comoving.frames import Blocks
from comoving.rounding import SEED, advance, generator, stochastic_bfloat16
from comoving.rules import Lion

BF16 = torch.bfloat16


def drawn(seed=0):
    return generator(torch.device("cpu"), (seed,))


def every_bfloat16():
    """All 2^16 of them: zeros, denormals, infinities and NaN too."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)


def test_what_bfloat16_holds_stays_as_it_is():
    x = every_bfloat16()
    rounded = stochastic_bfloat16(x.float(), drawn())
    assert torch.equal(rounded.isnan(), x.isnan()) and rounded.dtype == BF16
    finite = ~x.isnan()
    assert torch.equal(rounded[finite].view(torch.int16), x[finite].view(torch.int16))  # the sign of 0 too


@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_one_of_two_neighbours_with_the_share_of_the_distance(sign):
    low = every_bfloat16()[:0x7F7F][::4001].float()  # from 0 and denormals up
    high = (low.view(torch.int32) + 2**16).view(torch.float32)
    shares = torch.tensor([2**-16, 0.25, 0.5, 0.9])[:, None]
    x = low + shares.double() * (high.double() - low.double())
    draws = 4000
    many = (sign * x.float()).expand(draws, *x.shape)
    rounded = sign * stochastic_bfloat16(many, drawn()).float()
    assert bool(((rounded == low) | (rounded == high)).all())
    found = (rounded == high).double().mean(0)
    # Denormals have fewer bits, hence the share of what float32 holds.
    share = (x.float().double() - low) / (high.double() - low)
    spread = (share * (1 - share) / draws).sqrt()
    assert bool(((found - share).abs() <= 5 * spread + 1e-9).all())
    assert bool((found[1:] > 0).all()) and bool((found < 1).all())


def test_the_ends_of_the_range_are_those_of_nearest():
    top = torch.finfo(BF16).max
    x = torch.tensor([top, -top, top * 1.001, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan]).repeat(1000)
    rounded = stochastic_bfloat16(x, drawn())
    torch.testing.assert_close(rounded, x.to(BF16), rtol=0, atol=0, equal_nan=True)
    below = torch.full((1000,), top * (1 - 2**-10))
    assert bool(stochastic_bfloat16(below, drawn()).isfinite().all())


def test_strides_do_not_matter():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stochastic_bfloat16(x.mT, drawn()), stochastic_bfloat16(x.mT.contiguous(), drawn()))


def test_no_seed_comes_twice():
    seeds = set()
    for first in (0, 1, 2):
        state = {SEED: torch.tensor(first)}
        seeds |= {advance(state)[0] for _ in range(50)}
        assert int(state[SEED]) in seeds and state[SEED].dtype == torch.int64
    assert len(seeds) == 150


# In the optimizer


class Two(nn.Module):
    """A projected and a dense parameter, all ones: the spacing of bfloat16 is 2^-8 below 1, 2^-7 above."""

    def __init__(self, dtype, rows=64, columns=48):
        super().__init__()
        self.wide = nn.Parameter(torch.ones(rows, columns, dtype=dtype))
        self.bias = nn.Parameter(torch.ones(rows * columns, dtype=dtype))


def gradient(p, step):
    """The same direction at every step, within a frame of rank 1, in numbers that bfloat16 holds."""
    return torch.full(p.shape, 1.0 + (step % 2), dtype=p.dtype)


def run(dtype, rounding, steps=60, **options):
    model = Two(dtype)
    given = dict(rank=1, refresh_every=10, scale=8.0, finder=Exact(), rounding=rounding) | options
    optimizer = LowRankOptimizer(model.named_parameters(), **given)
    assert optimizer.sites[model.wide].projected and not optimizer.sites[model.bias].projected
    for t in range(steps):
        for p in model.parameters():
            p.grad = gradient(p, t) if options["weight_decay"] == 0 else torch.zeros_like(p)
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "options",
    [{"lr": 2e-5, "weight_decay": 0.0, "betas": (0.8, 0.95)}, {"lr": 1e-3, "weight_decay": 2e-2}],
    ids=["updates", "weight decay"],
)
def test_what_lies_far_below_the_spacing_survives_in_the_mean(options):
    """Each step moves a weight by 2e-5, half the spacing is 2e-3: rounding to nearest loses all of it."""
    exact, nearest = run(torch.float32, "nearest", **options), run(BF16, "nearest", **options)
    stochastic = run(BF16, "stochastic", **options)
    for name, p in exact.named_parameters():
        moved = 1 - float(p.detach().double().mean())
        assert 1.0e-3 < moved < 1.5e-3, name
        assert bool((getattr(nearest, name) == 1).all()), name
        w = getattr(stochastic, name).detach().double()
        # An entry has moved by 2^-8 with probability moved 2^8, and else not: that gives the spread of the mean.
        spread = (moved * 2**-8 / w.numel()) ** 0.5
        assert abs(float(1 - w.mean()) - moved) < 5 * spread, name


def noise(model, step):
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(97 * step + i)).to(p.dtype)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def stepped(model, optimizer, steps):
    for t in steps:
        noise(model, t)
        optimizer.step()
    return model


def experts(model):
    model = nn.Module()
    model.experts = nn.Parameter(torch.ones(3, 16, 24, dtype=BF16))
    return model


MAKERS = {
    "default": lambda model, **o: AdamW(model.named_parameters(), 1e-3, rounding="stochastic", **o),
    "whole frames": lambda model, **o: LowRankOptimizer(model.named_parameters(), rule=Lion(), rank=1.0,
                                                         rounding="stochastic", **o),
    "blocks": lambda model, **o: LowRankOptimizer(model.named_parameters(), rank=4, frame=Blocks(),
                                                  rounding="stochastic", **o),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(kind):
    start = experts(None) if kind == "blocks" else Two(BF16)
    model, twin = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = MAKERS[kind](model)
    stepped(model, optimizer, range(9))
    first = MAKERS[kind](twin)
    stepped(twin, first, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = MAKERS[kind](twin, seed=7)  # the seeds of rounding are part of the state
    second.load_state_dict(torch.load(file, weights_only=True))
    stepped(twin, second, range(4, 9))
    assert same(model, twin)
    other = stepped(copy.deepcopy(start), MAKERS[kind](copy.deepcopy(start)), range(0))
    assert not same(model, stepped(other, MAKERS[kind](other, seed=1), range(9)))


def test_parameters_of_one_shape_are_rounded_independently():
    model = nn.ParameterList([torch.full((4096,), 1.0, dtype=BF16) for _ in range(2)])
    optimizer = AdamW(model.named_parameters(), 1e-3, rounding="stochastic")
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(model[0], model[1])


def test_skipped_steps_leave_weights_alone_and_untouched_experts_keep_their_seed():
    model = Two(BF16)
    optimizer = AdamW(model.named_parameters(), 1e-2, rounding="stochastic", on_nonfinite="skip")
    stepped(model, optimizer, range(3))
    before = copy.deepcopy(model)
    noise(model, 3)
    model.bias.grad[0] = torch.nan
    optimizer.step()
    assert same(model, before) and optimizer.skipped_steps == 1
    model = experts(None)
    optimizer = MAKERS["blocks"](model)
    stepped(model, optimizer, range(2))
    seeds = [int(optimizer.state[model.experts][f"{b}.{SEED}"]) for b in range(3)]
    kept = model.experts[1].clone()
    noise(model, 2)
    model.experts.grad[1] = 0
    optimizer.step()
    moved = [int(optimizer.state[model.experts][f"{b}.{SEED}"]) != seed for b, seed in enumerate(seeds)]
    assert moved == [True, False, True] and torch.equal(model.experts[1], kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_wider_parameters_are_written_as_ever(dtype):
    model, twin = Two(dtype), Two(dtype)
    ours = AdamW(model.named_parameters(), 1e-3, rounding="stochastic")
    for t in range(3):
        noise(model, t)
        noise(twin, t)
        ours.step()
    stepped(twin, AdamW(twin.named_parameters(), 1e-3), range(3))
    assert same(model, twin) and not any(SEED in state for state in ours.state.values())


def test_a_checkpoint_of_torchs_adamw_is_taken_over():
    model, twin = Two(BF16), Two(BF16)
    torchs = torch.optim.AdamW(model.named_parameters(), 1e-3)
    stepped(model, torchs, range(3))
    optimizer = AdamW(twin.named_parameters(), 1e-3, rounding="stochastic")
    optimizer.load_state_dict(torchs.state_dict())
    stepped(twin, optimizer, range(3, 5))
    state = optimizer.state[twin.bias]
    assert int(state["step"]) == 5 and state["moment.first"].dtype == torch.float32 and int(state[SEED]) > 0


def test_dense_moments_are_kept_in_float32_and_windows_add_up():
    model, twin = Two(BF16), Two(BF16)
    one, two = AdamW(model.named_parameters(), rounding="stochastic"), AdamW(twin.named_parameters(), lr=1e-3,
                                                                            rounding="stochastic")  # fmt: skip
    noise(model, 0)
    one.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for _ in range(2):
            two.absorb(q, p.grad / 2)
        two.apply(q)
    assert torch.equal(model.bias, twin.bias)
    assert two.state[twin.bias]["moment.second"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex32])
def test_half_precision_without_the_range_is_refused(dtype):
    for shape in ((12, 20), (20,)):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        with pytest.raises(ValueError, match="rounding='stochastic' is refused: w is half precision.*bfloat16"):
            AdamW([("w", p)], rounding="stochastic")
        AdamW([("w", p)])


def test_bad_options_are_refused():
    model = Two(BF16)
    named = list(model.named_parameters())
    with pytest.raises(ValueError, match="rounding must be one of 'nearest', 'stochastic', got 'up'"):
        AdamW(named, rounding="up")
    with pytest.raises(ValueError, match="amsgrad=True is refused: bias is not rounded to nearest"):
        AdamW([("bias", model.bias)], rounding="stochastic", amsgrad=True)
    with pytest.raises(ValueError, match="fused=True is refused: bias is not rounded to nearest"):
        AdamW([("bias", model.bias)], rounding="stochastic", fused=True)
    optimizer = AdamW(named, rounding="stochastic")
    with pytest.raises(ValueError, match="rounding: saved 'nearest', here 'stochastic'"):
        optimizer.load_state_dict(AdamW(named).state_dict())
    noise(model, 0)
    optimizer.param_groups[0]["rounding"] = "nearest"
    with pytest.raises(ValueError, match="rounding cannot be edited"):
        optimizer.step()


def test_each_group_rounds_in_its_own_way():
    model = Two(BF16)
    groups = param_groups(model, rank=8)
    groups[0]["rounding"] = "stochastic"
    optimizer = LowRankOptimizer(groups)
    stepped(model, optimizer, range(2))
    assert SEED in optimizer.state[model.wide] and SEED not in optimizer.state[model.bias]
    assert optimizer.sites[model.bias].plain
    assert build("galore", Two(BF16), rounding="stochastic").param_groups[1]["rounding"] == "stochastic"
