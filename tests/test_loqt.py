"""loqt follows its reference; what is kept beside the codes is stored once, saved, and merged when frames change."""

import copy
import io

import pytest
import torch
from torch import nn

import comoving
from comoving.cadence import Every, Growing, Lazy
from comoving.codecs import Int4, Int8
from comoving.finders import Exact
from comoving.residual import Feedback
from comoving.weights import DeferringLinear, dequantize, quantize
from contract.support import frame_of, randn
from references.loqt import LEVELS, LoQT

torch.set_num_threads(1)
F64, STEPS, SCALE = torch.float64, 60, 0.6
HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}


class Layers(nn.Module):
    def __init__(self, shape, dtype=F64):
        super().__init__()
        self.one, self.two = (nn.Linear(*shape[::-1], bias=False, dtype=F64) for _ in range(2))
        for i, p in enumerate(self.parameters()):
            p.data = randn(shape, F64, 70 + i)
        self.to(dtype)

    def forward(self, x):
        return self.one(x).square() + self.two(x)


def gradients(shape, seed):
    low, high = randn(shape, F64, seed), randn(shape, F64, seed + 1)
    for t in range(STEPS):
        yield low * (1 - t / STEPS) + high * (t / STEPS) + 0.5 * randn(shape, F64, 50 * seed + t)


def test_levels_are_those_of_qlora():
    published = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803,
                 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip
    torch.testing.assert_close(LEVELS, torch.tensor(published, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=["wide", "tall"])
@pytest.mark.parametrize("compensate", [0, 3])
def test_it_is_its_reference(shape, compensate):
    model = quantize(Layers(shape), Int4(block=8), compensate=compensate)
    cadence = Growing(base=1.7)
    optimizer = comoving.build(
        "loqt", model, rank=3, refresh_every=4, scale=SCALE, cadence=cadence, eps=1e-3 / SCALE, **HYPER
    )
    layers, left = [model.one, model.two], shape[0] <= shape[1]

    def ours(p):
        return frame_of(optimizer, p).factors[0 if left else 1]

    references = [
        LoQT(
            weight.detach(), rank=3, tau=4, psi=1.7, phase=optimizer.sites[layer.weight].phase, scale=SCALE, block=8,
            eps=1e-3, compensate=compensate, find=lambda g, layer=layer: ours(layer.weight), **HYPER,
        )
        for layer, weight in zip(layers, Layers(shape).parameters(), strict=True)
    ]  # fmt: skip
    for grads in zip(gradients(shape, 1), gradients(shape, 2), strict=True):
        for layer, g in zip(layers, grads, strict=True):
            layer.weight.grad = g.clone()
        optimizer.step()
        for layer, reference, g in zip(layers, references, grads, strict=True):
            t = reference.now
            torch.testing.assert_close(layer.decode(), reference.step(g), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(layer.change, SCALE * reference.b, rtol=1e-8, atol=1e-8)
            if t in reference.merges:
                u, v = ours(layer.weight), reference.exact(g)
                torch.testing.assert_close(u @ u.mT, v @ v.mT, rtol=1e-6, atol=1e-6)
    assert references[0].merges == [0, 4, 9, 15, 23, 35, 53]
    assert references[1].merges[:3] == [0, 1, 6]


def test_compensation_takes_up_what_the_frame_holds_of_the_rounding_error():
    w = randn((16, 24), F64, 3)
    errors = {}
    for compensate in (0, 5):
        model = quantize(nn.Sequential(nn.Linear(24, 16, bias=False, dtype=F64)), Int4(), compensate=compensate)
        p = torch.linalg.qr(randn((16, 4), F64, 4))[0]
        model[0].merge(w, p, True)
        rest = w - model[0].codes_alone()
        errors[compensate] = float((w - model[0].decode()).norm())
        assert errors[compensate] < float(rest.norm())
        torch.testing.assert_close(p.mT @ (w - model[0].decode()), torch.zeros(4, 24, dtype=F64), rtol=0, atol=1e-12)
    assert errors[5] < errors[0]


def run(model, optimizer, steps):
    for t in steps:
        model.zero_grad()
        model(randn((7, 24), torch.float32, t).to(model.one.weight.dtype)).float().square().sum().backward()
        optimizer.step()


def make(dtype=torch.float32, lr=1e-2, **options):
    model = quantize(Layers((16, 24), dtype), Int4(), compensate=2)
    return model, comoving.build("loqt", model, lr, rank=4, refresh_every=3, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_what_is_read_and_the_factor_is_stored_once(dtype):
    model, optimizer = make(dtype, lr=0.2)
    run(model, optimizer, range(5))
    twin = dequantize(copy.deepcopy(model))
    for m in (model, twin):
        m.zero_grad()
        m(randn((7, 24), torch.float32, 9).to(dtype)).float().square().sum().backward()
    assert torch.equal(model.one.weight.grad, twin.one.weight.grad)
    assert model.one.factor is optimizer.state[model.one.weight]["frame.0"]
    assert model.one.change.dtype == torch.float32 and model.one.weight.untyped_storage().nbytes() == dtype.itemsize
    codes = model.one.codes.clone()
    before = int(optimizer.state[model.one.weight]["cadence.next"])
    run(model, optimizer, range(5, before))
    assert torch.equal(model.one.codes, codes)
    run(model, optimizer, range(before, before + 1))
    assert not torch.equal(model.one.codes, codes)


@pytest.mark.parametrize("cadence", [Every(), Lazy(threshold=0.0, patience=1), Growing(1.0)], ids=str)
def test_codes_are_merged_at_refreshes_of_any_cadence_and_at_no_other_step(cadence, monkeypatch):
    model, optimizer = make(cadence=cadence)
    refreshes, merges, merge = [], [], DeferringLinear.merge
    optimizer.refresh_scope = lambda: refreshes.append(t) or torch.no_grad()
    monkeypatch.setattr(DeferringLinear, "merge", lambda *args: merges.append(t) or merge(*args))
    for t in range(14):
        before = model.one.codes.clone()
        run(model, optimizer, [t])
        assert torch.equal(model.one.codes, before) or t in merges
        assert not any("refreshed" in optimizer.state[layer.weight] for layer in (model.one, model.two))
    assert merges == refreshes and 6 <= len(refreshes) < 14


@pytest.mark.parametrize("t", [0, 3])
def test_a_new_frame_that_is_not_merged_yet_is_saved(t):
    """Between the first gradient and the step, in the middle of a window."""
    (model, optimizer), (twin, second) = make(), make()
    run(model, optimizer, range(t))
    run(twin, second, range(t))
    for m, o in ((model, optimizer), (twin, second)):
        gradient = randn((16, 24), torch.float32, 77)
        o.absorb(m.one.weight, gradient)
    assert optimizer.state[model.one.weight]["refreshed"] is True
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    third = comoving.build("loqt", model, 1e-2, rank=4, refresh_every=3)
    third.load_state_dict(torch.load(file, weights_only=True))
    third.apply(model.one.weight)
    second.apply(twin.one.weight)
    assert torch.equal(model.one.codes, twin.one.codes)
    assert "refreshed" not in third.state[model.one.weight]


@pytest.mark.parametrize("cut", [3, 4, 8])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(cut):
    (model, optimizer), (twin, second) = make(), make()
    run(model, optimizer, range(cut))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin.load_state_dict(weights)
    second.load_state_dict(state)
    run(model, optimizer, range(cut, 14))
    run(twin, second, range(cut, 14))
    assert torch.equal(model.one.decode(), twin.one.decode()) and torch.equal(model.two.decode(), twin.two.decode())


def test_a_new_optimizer_or_new_weights_are_merged_before_anything_else():
    model, optimizer = make()
    run(model, optimizer, range(1))
    before = model.one.decode()
    again = comoving.build("loqt", model, 1e-2, rank=8, refresh_every=3)
    run(model, again, range(1, 2))
    assert tuple(model.one.change.shape) == (8, 24)
    assert float((model.one.decode() - before).norm()) < 0.3 * float(before.norm())
    model.load_state_dict(Layers((16, 24), torch.float32).state_dict())
    assert model.one.change is None
    run(model, again, range(2, 4))
    assert tuple(model.one.change.shape) == (8, 24)


def test_it_moves_with_the_model_and_trains():
    model, optimizer = make()
    run(model, optimizer, range(2))
    factor = model.one.factor
    model.to(torch.bfloat16)
    assert model.one.factor is factor and model.one.change.dtype == torch.float32
    start = float(model(randn((7, 24), torch.float32, 0).to(torch.bfloat16)).float().square().sum().detach())
    model, optimizer = make(lr=0.2)
    run(model, optimizer, range(40))
    assert float(model(randn((7, 24), torch.float32, 0)).square().sum().detach()) < 0.7 * start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1.0}, "is not projected"),
        ({"refresh_every": 1}, "one that merges makes no update"),
        ({"residual": Feedback()}, "outside of that frame"),
        ({"side": "both"}, "one side of the matrix"),
        ({"on_nonfinite": "skip"}, "on_nonfinite='skip' is refused: one.weight, two.weight"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_change_beside_codes_is_refused(options, message):
    model = quantize(Layers((16, 24)), Int4(), compensate=2)
    given = dict(rank=4, refresh_every=3) | options
    with pytest.raises(ValueError, match=message):
        comoving.LowRankOptimizer(model.named_parameters(), **given)


def test_bad_numbers_of_repetitions_are_refused():
    for bad, error in ((-1, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="compensate"):
            quantize(Layers((16, 24)), Int8(), compensate=bad)
    assert isinstance(quantize(Layers((16, 24)), Int8(), compensate=0).one, DeferringLinear)


def test_defaults_are_the_papers():
    options = comoving.recipes()["loqt"].options
    assert (options["finder"], options["cadence"]) == (Exact(), Growing(1.2))
    assert (options["refresh_every"], options["scale"]) == (100, 0.5)
