"""Moments in the low bits of their weights."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import comoving
from comoving import LowRankOptimizer, Optimizer, build, explain, state_bytes
from comoving.codecs import BFloat16, Int4, Int8, InWeights
from comoving.codecs.mantissa import Mantissa
from comoving.frames import Blocks
from comoving.rules import Adam, Lion, Momentum, Muon, NorMuon
from contract.support import Holder, randn

F32, C64 = torch.float32, torch.complex64
SHAPES = [((24, 40), F32), ((24, 40), F32), ((13, 19), F32), ((12, 10, 9), F32), ((12, 12, 3, 3), C64)]
RULES = [Muon(decay=0.8), Muon(decay=0.7, nesterov=False), NorMuon(decay=0.8), Lion()]
INNER = [Int8(), Int8(block=32), Int8(table="dynamic"), Int4(block=32)]


def drawn_bytes(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ the bits


@given(entries=st.integers(1, 70), kept=st.integers(0, 90), rows=st.integers(0, 3), step=st.integers(0, 2**40))
def test_bytes_come_back_and_numbers_are_rounded(entries, kept, rows, step):
    mantissa = Mantissa(entries, kept)
    if mantissa.width > 16:
        return
    lead = (rows,) if rows else ()
    x, bytes_ = randn((*lead, entries), F32, 1), drawn_bytes(*lead, kept, seed=entries)
    stored = mantissa.put(x, bytes_, step)
    numbers, found = mantissa.take(stored)
    assert torch.equal(found, bytes_)
    distance = 2.0 ** (mantissa.width - 23)
    assert ((numbers - x).abs() <= distance * x.abs()).all()
    assert ((stored - numbers).abs() < distance * stored.abs()).all()
    for i in range(rows):
        assert torch.equal(mantissa.put(x[i], bytes_[i], step), stored[i])
        assert torch.equal(mantissa.take(stored[i])[1], bytes_[i])


def test_no_more_bits_are_taken_than_bytes_need():
    """Planes of 8 and 4 bits lose none; single ones at most one bit of each number, the last plane's."""
    for entries in (16, 64, 1000):
        for kept in range(0, 2 * entries, 7):
            assert 0 <= Mantissa(entries, kept).width * entries - 8 * (kept + 4) < entries + 8


def test_rounding_makes_small_changes_on_average():
    """A change of a twentieth of the distance between neighbours, 2,000 times: nearest rounding would lose each."""
    mantissa, kept = Mantissa(64, 64), drawn_bytes(64)
    x = torch.full((64,), 1.5)
    change = 2.0 ** (mantissa.width - 23) / 20
    for step in range(2000):
        x, _ = mantissa.take(mantissa.put(x + change, kept, step))
    moved = (x - 1.5) / (2000 * change)
    assert moved.mean() == pytest.approx(1.0, abs=0.02)
    assert moved.min() > 0.5  # each by itself: a deviation of sqrt(20 / 2000) = .1


@pytest.mark.parametrize("change", ["one", "all", "cast", "other"])
def test_numbers_that_somebody_changed_have_nothing_in_them(change):
    mantissa = Mantissa(256, 264)
    x = mantissa.put(randn((2, 256), F32, 0), drawn_bytes(2, 264), 1)
    before = x[1].clone()
    if change == "one":
        x[0, 17] = torch.nextafter(x[0, 17], torch.tensor(9.0)) * 1.001
    elif change == "all":
        x[0] *= 0.999
    elif change == "cast":
        x[0] = x[0].bfloat16().float()
    else:
        x[0] = randn((256,), F32, 3)
    found = mantissa.take(x)[1]
    assert not found[0].any()
    assert torch.equal(found[1], drawn_bytes(2, 264)[1])
    assert torch.equal(x[1], before)


def test_zeros_hold_zeros():
    numbers, kept = Mantissa(40, 45).take(torch.zeros(40))
    assert not numbers.any() and not kept.any()


# ------------------------------------------------------------------------------------------------------------ the step


def build_on(shapes=SHAPES, **options):
    model = Holder(*(randn(shape, dtype, i) for i, (shape, dtype) in enumerate(shapes)))
    settings = {"lr": 0.02, "rank": 1.0, "rule": Muon(decay=0.8), "moments": InWeights()} | options
    return model, LowRankOptimizer(model.parameters(), **settings)


def train(model, optimizer, first, last):
    for t in range(first, last):
        for i, p in enumerate(model.parameters()):
            p.grad = randn(tuple(p.shape), p.dtype, 100 * t + i)
        optimizer.step()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("codec", INNER, ids=str)
def test_weights_move_as_with_the_same_codes_in_the_state(rule, codec):
    """Up to the rounding of the weights: of at most 2^-11 of each, which moves codes by a level here and there."""
    here, ours = build_on(rule=rule, moments=InWeights(codec), weight_decay=0.1)
    there, theirs = build_on(rule=rule, moments=codec, weight_decay=0.1)
    without, plain = build_on(rule=Muon(decay=0.0, nesterov=False), weight_decay=0.1)
    starts = [p.detach().clone() for p in here.parameters()]
    for model, optimizer in ((here, ours), (there, theirs), (without, plain)):
        train(model, optimizer, 0, 12)
    for p, q, r, start in zip(*(m.parameters() for m in (here, there, without)), starts, strict=True):
        way = (q - start).norm()
        assert (p - q).norm() < 0.04 * way
        assert (r - q).norm() > 0.1 * way
    assert all({*state} == {"tick", "step"} for state in ours.state.values())
    assert state_bytes(ours) == explain(ours).state_bytes == 4 * len(SHAPES)
    assert "Int" in (why := explain(ours).rows[0].rule) and why.endswith("in the weights")


def test_a_batch_equals_its_members():
    together, ours = build_on([((20, 30), F32)] * 3)
    alone, theirs = build_on([((20, 30), F32)] * 3)
    theirs.stacked_entries = 0
    for model, optimizer in ((together, ours), (alone, theirs)):
        train(model, optimizer, 0, 4)
    assert all(map(torch.equal, together.parameters(), alone.parameters()))


def test_experts_that_have_no_gradient_keep_their_moments():
    model, optimizer = build_on([((3, 24, 20), F32)], frame=Blocks())
    (p,) = model.parameters()
    train(model, optimizer, 0, 3)
    before = p.detach().clone()
    p.grad = randn((3, 24, 20), F32, 7)
    p.grad[1] = 0.0
    optimizer.step()
    assert torch.equal(p[1], before[1]) and not torch.equal(p[0], before[0])


def test_the_model_alone_resumes_bitwise():
    model, optimizer = build_on()
    train(model, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, 3, 6)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, resumed = build_on()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, 3, 6)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_after_somebody_changed_the_weights_moments_begin_anew():
    model, optimizer = build_on(lr=0.5)
    train(model, optimizer, 0, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    fresh = copy.deepcopy(model)
    anew = LowRankOptimizer(fresh.parameters(), lr=0.5, rank=1.0, rule=Muon(decay=0.8), moments=InWeights())
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 4, 5)
    train(fresh, anew, 4, 5)
    for p, q, start in zip(model.parameters(), fresh.parameters(), before, strict=True):
        assert (p - q).norm() < 2**-11 * q.norm() < 0.05 * (p - start).norm()  # rounded by other bits


def test_a_refused_gradient_changes_nothing():
    model, optimizer = build_on(on_nonfinite="skip")
    train(model, optimizer, 0, 2)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "shape", "dtype", "said"),
    [
        ({"rank": 4}, (24, 40), F32, r"is projected, and its moments belong to a frame.*rank=1.0"),
        ({}, (24, 40), torch.bfloat16, r"only float32 has bits to spare"),
        ({}, (24, 40), torch.float64, r"only float32 has bits to spare"),
        ({"rule": Adam()}, (24, 40), F32, r"Adam\(\) goes by the age.*use muon\(\)"),
        ({"rule": Momentum(corrected=True)}, (24, 40), F32, r"goes by the age"),
        ({}, (24, 3), F32, r"take 20 bits of each of its 72 weights, of which 12 are free"),
        ({"moments": InWeights(BFloat16())}, (24, 40), F32, r"take 17 bits"),
        ({"moments": Int8(), "codec": InWeights()}, (24, 40), F32, r"codec=InWeights.*is for moments"),
        ({"moments": Int8(), "bases": InWeights()}, (24, 40), F32, r"bases=InWeights"),
    ],
    ids=str,
)
def test_what_does_not_go_is_refused_before_anything_changes(options, shape, dtype, said):
    with pytest.raises(ValueError, match=said):
        build_on([(shape, dtype)], **options)


@pytest.mark.parametrize(
    ("codec", "said"),
    [(Int8(rounding="stochastic"), "rounding='nearest'"), (InWeights(), "InWeights.. again")],
    ids=str,
)
def test_codecs_that_keep_more_than_codes_are_refused(codec, said):
    with pytest.raises(ValueError, match=said):
        InWeights(codec)


def test_moments_of_another_checkpoint_have_no_place():
    model, optimizer = build_on()
    _, other = build_on(moments=Int8())
    with pytest.raises(ValueError, match="another recipe"):
        optimizer.load_state_dict(other.state_dict())
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, 0, 1)
    with pytest.raises(ValueError, match=r"moments.*in its weights"):
        optimizer.load_state_dict(adamw.state_dict())


# ---------------------------------------------------------------------------------------------------------- the default


def test_without_a_byte_of_state_matrices_have_momentum_where_there_is_room():
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 3), nn.Linear(3, 32)).requires_grad_()
    model[1].to(torch.bfloat16)
    why = {row.parameter: row.why for row in explain(Optimizer(model, budget=0)).rows}
    assert why["0.weight"].endswith("in the weights")
    assert why["1.weight"] == why["3.weight"] == "orthogonalized gradient"


def test_text_names_it():
    model = nn.Linear(32, 48)
    optimizer = build("muon", model, moments="in_weights(codec='int4')")
    assert optimizer.param_groups[0]["moments"] == InWeights(Int4())
    assert "in the weights" in str(comoving.explain(optimizer))
