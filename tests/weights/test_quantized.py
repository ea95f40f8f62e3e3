"""Weights in codes: the layer is exact for what is decoded, the optimizer writes codes, and no copy is kept."""

import copy
import io

import pytest
import torch
from torch import nn

import comoving
from comoving.codecs import BFloat16, Full, Int4, Int8
from comoving.drivers.taken import TakenUp
from comoving.weights import QuantizedLinear, codes_of, dequantize, quantize

torch.set_num_threads(1)
BF16, F64 = torch.bfloat16, torch.float64
NEAREST = [Int8(), Int8(block=16), Int8(table="dynamic"), Int4(), Int4(table="linear")]
STOCHASTIC = [Int8(rounding="stochastic"), Int4(rounding="stochastic")]


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 30, bias=False), nn.LayerNorm(30)).to(dtype)


def batch(dtype=torch.float32, seed=1):
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backward(model, seed=1):
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    loss = model(batch(dtype, seed)).float().square().sum() + model(batch(dtype, seed + 99)).float().sum()
    loss.backward()
    return loss.detach()


def stored(model):
    return {name: x for name, x in model.named_buffers()}


def same(a, b):
    return all(torch.equal(x, stored(b)[name]) for name, x in stored(a).items())


# The layer


@pytest.mark.parametrize("codec", [*NEAREST, *STOCHASTIC], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64, BF16])
def test_loss_and_gradients_are_those_of_the_decoded_weights(codec, dtype):
    model = quantize(network(dtype), codec)
    twin = dequantize(copy.deepcopy(model))
    assert isinstance(model[0], QuantizedLinear) and type(twin[0]) is nn.Linear
    # bfloat16: the twin's weights are rounded to it, and so is what the layer multiplies with.
    assert torch.equal(backward(model), backward(twin))
    for (name, p), (other, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other and p.shape == q.shape and p.dtype == q.dtype and torch.equal(p.grad, q.grad), name


def test_what_is_stored_is_within_half_a_step_and_the_carrier_is_one_number():
    model, plain = quantize(network(), Int8()), network()
    for k in (0, 2):
        layer = model[k]
        assert bool(((layer.decode() - plain[k].weight).abs() <= layer.step.max() * 0.5001).all())
        assert layer.weight.shape == plain[k].weight.shape and layer.weight.untyped_storage().nbytes() == 4
        assert bool(layer.weight.isnan().all())  # who reads it instead of the codes shall notice
    bytes_ = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers())
    }
    rest = sum(p.numel() * 4 for p in (plain[0].bias, *plain[3].parameters()))
    # codes, a step a row, two carriers
    assert sum(bytes_.values()) == (24 * 40 + 40 * 30) + 4 * (40 + 30) + 4 * 2 + rest


def test_the_backward_pass_keeps_codes_and_no_weight():
    kept = []
    model = quantize(network())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(batch())
    assert not any(x.is_floating_point() and x.numel() >= 24 * 40 for x in kept)
    assert any(x.dtype == torch.int8 and x.numel() == 24 * 40 for x in kept)


def test_autocast_multiplies_in_its_own_dtype_and_returns_gradients_in_the_carriers():
    model = quantize(network(), Int8())
    twin = dequantize(copy.deepcopy(model))
    for m in (model, twin):
        with torch.autocast("cpu", dtype=BF16):
            y = m[2](m[0](batch()))
        assert y.dtype == BF16
        y.float().square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert p.grad.dtype == torch.float32
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=2e-2 * float(q.grad.abs().max()))


def test_frozen_codes_get_no_gradient_and_pass_one_on():
    model = quantize(network())
    model[2].weight.requires_grad_(False)
    backward(model)
    assert model[2].weight.grad is None and bool(model[0].weight.grad.any())


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_moving_and_casting_leave_codes_alone():
    model = quantize(network())
    before = {name: x.clone() for name, x in stored(model).items()}
    params = list(model.parameters())
    backward(model)
    model.to(BF16)
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert model[0].weight.dtype == model[0].weight.grad.dtype == model[0].bias.dtype == BF16
    assert model[0].weight.untyped_storage().nbytes() == 2
    assert all(torch.equal(x, before[name]) and x.dtype == before[name].dtype for name, x in stored(model).items())
    backward(model)
    assert str(model.double()(batch(F64)).dtype) == "torch.float64"
    model.to("meta")
    assert model[0].codes.is_meta and model[0].weight.is_meta and not model[0].seed.is_meta
    with pytest.raises(TypeError, match="real weight"):
        quantize(network()).to(torch.complex64)


def test_a_state_dict_holds_codes_and_loads_and_an_ordinary_one_is_encoded():
    model, other = quantize(network()), quantize(network(seed=1))
    saved = model.state_dict()
    assert "0.weight" not in saved and {"0.codes", "0.step", "0.seed", "0.bias"} <= set(saved)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(model, other) and codes_of(other[0].weight) is other[0]
    fresh = quantize(network(seed=2), Int8())
    fresh.load_state_dict(network().state_dict())
    assert same(fresh, quantize(network(), Int8()))
    with pytest.raises(RuntimeError, match="size mismatch for 0.weight"):
        fresh.load_state_dict(network().state_dict() | {"0.weight": torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match="0.codes"):
        fresh.load_state_dict({name: x for name, x in fresh.state_dict().items() if name != "0.codes"})
    with pytest.raises(RuntimeError, match="0.weight"):
        fresh.load_state_dict(fresh.state_dict() | {"0.weight": torch.zeros(40, 24)})


@pytest.mark.parametrize("order", [1, -1])
def test_copies_of_model_and_optimizer_go_on_together(order):
    model = quantize(network())
    optimizer = comoving.AdamW(model.named_parameters(), 1e-2)
    run(model, optimizer, range(2))
    pair = copy.deepcopy((model, optimizer)[::order])
    twin, second = pair[::order]
    assert twin[0].weight is not model[0].weight and twin[0].weight.untyped_storage().nbytes() == 4
    run(model, optimizer, range(2, 4))
    assert not same(model, twin)
    run(twin, second, range(2, 4))
    assert same(model, twin)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert (
        same(model, again) and codes_of(again[0].weight) is again[0] and again[0].weight.untyped_storage().nbytes() == 4
    )


# The optimizer


def run(model, optimizer, steps):
    for t in steps:
        backward(model, t)
        optimizer.step()


@pytest.mark.parametrize("recipe", ["comoving-adamw", "adamw", "galore", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_step_is_that_of_the_decoded_weights_rounded_to_codes(recipe, dtype):
    """Adam steps matrices that are not projected too: torch's own could not write to codes."""
    codec = Int8()
    model = quantize(network(dtype), codec)
    optimizer = comoving.build(recipe, model, 1e-2, rank=8)
    twin = network(torch.float32)  # in working precision, with the gradients of the other
    for k in (0, 2):
        twin[k].weight.data = model[k].decode()
    reference = comoving.build(recipe, twin, 1e-2, rank=8)
    for t in range(3):
        backward(model, t)
        for k in (0, 2):
            twin[k].weight.data = model[k].decode()
            twin[k].weight.grad = model[k].weight.grad.float()
        optimizer.step()
        reference.step()
        for k in (0, 2):
            own = codec.schema((1, 1), dtype) and {n: torch.zeros_like(x) for n, x in model[k].stored().items()}
            codec.encode(twin[k].weight.detach().clone(), own)
            # torch's AdamW of the twin rounds otherwise than ours: a number in the middle may fall to either side
            assert int((own["codes"].int() - model[k].codes.int()).abs().max()) <= (recipe == "adamw")
            torch.testing.assert_close(own["step"], model[k].step, rtol=1e-5, atol=0)


def test_small_updates_survive_in_the_mean_and_rounding_to_nearest_loses_them():
    """Each step moves a weight by 1e-5 of a block's largest, a fourhundredth of the codec's step."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        layer = nn.Sequential(nn.Linear(256, 64, bias=False))
        with torch.no_grad():
            layer[0].weight.fill_(0.5)
            layer[0].weight[:, 0] = 1.0  # fixes the step
        quantize(layer, Int8(rounding=rounding))
        start = layer[0].decode()
        optimizer = comoving.LowRankOptimizer(layer.named_parameters(), lr=2e-5, rank=1.0, weight_decay=0.0)
        for _ in range(50):
            grad = torch.ones(64, 256)
            grad[:, 0] = 0
            layer[0].weight.grad = grad
            optimizer.step()
        moved[rounding] = float((start - layer[0].decode())[:, 1:].double().mean())
    assert moved["nearest"] == 0
    spread = (1e-3 / 127 / (64 * 255)) ** 0.5
    assert abs(moved["stochastic"] - 1e-3) < 5 * spread < 3e-4


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit():
    def make():
        model = quantize(network(BF16))
        return model, comoving.build("comoving-adamw", model, 1e-2, rank=8, rounding="stochastic")

    model, optimizer = make()
    run(model, optimizer, range(3))
    files = [io.BytesIO() for _ in range(2)]
    for saved, file in zip((model, optimizer), files, strict=True):
        torch.save(saved.state_dict(), file)
        file.seek(0)
    twin, second = make()
    twin.load_state_dict(torch.load(files[0], weights_only=True))
    second.load_state_dict(torch.load(files[1], weights_only=True))
    run(model, optimizer, range(3, 7))
    run(twin, second, range(3, 7))
    assert same(model, twin) and torch.equal(model[0].bias, twin[0].bias)


def test_skipped_steps_leave_codes_alone():
    model = quantize(network())
    optimizer = comoving.AdamW(model.named_parameters(), 1e-2, on_nonfinite="skip")
    run(model, optimizer, range(2))
    before = {name: x.clone() for name, x in stored(model).items() if not name.endswith("seed")}
    backward(model, 2)
    model[2].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1 and all(torch.equal(x, stored(model)[name]) for name, x in before.items())


def test_training_in_codes_learns_as_training_in_float32_does():
    target, last = network(seed=5)(batch()).detach(), {}
    for kind, model in (("codes", quantize(network())), ("float32", network())):
        optimizer = comoving.AdamW(model.named_parameters(), 2e-2, rank=8)
        losses = []
        for _ in range(60):
            model.zero_grad()
            loss = (model(batch()) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        last[kind] = losses[-1] / losses[0]
    assert last["float32"] < 0.1 and last["codes"] < last["float32"] + 0.05


# Bad input


def test_models_that_cannot_be_quantized_are_refused_and_left_as_they_were():
    tied = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False), "other": nn.Linear(4, 4)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(ValueError, match="head.weight is shared, as embed.weight and head.weight"):
        quantize(tied)
    assert not any(isinstance(m, QuantizedLinear) for m in tied.modules())
    assert isinstance(quantize(tied, skip=["head"])["other"], QuantizedLinear)
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="shared, as 0.weight and 1.weight"):
        quantize(nn.Sequential(shared, shared))
    with pytest.raises(TypeError, match="complex64"):
        quantize(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)))
    with pytest.raises(ValueError, match="itself a linear layer"):
        quantize(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no layer of type Linear left"):
        quantize(nn.Sequential(nn.Conv2d(3, 3, 3)))
    with pytest.raises(ValueError, match="no layer of type Linear left"):
        quantize(quantize(network()))
    with pytest.raises(ValueError, match="matches skip 'lm_head'"):
        quantize(network(), skip=["lm_head"])
    with pytest.raises(ValueError, match="linear1: TransformerEncoderLayer reads"):
        quantize(nn.TransformerEncoderLayer(8, 2, 16))
    out = type(nn.MultiheadAttention(8, 2).out_proj)
    with pytest.raises(ValueError, match="out_proj: MultiheadAttention reads"):
        quantize(nn.MultiheadAttention(8, 2), modules=(out,))
    hooked = network()
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="0 has hooks"):
        quantize(hooked)
    broken = network()
    broken[2].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="2.weight is not finite"):
        quantize(broken)
    assert type(broken[0]) is nn.Linear
    with pytest.raises(ValueError, match="0.weight is not initialized yet"):
        quantize(nn.Sequential(nn.LazyLinear(4)), modules=(nn.LazyLinear,))
    with pytest.raises(ValueError, match="no quantized layers"):
        dequantize(network())


@pytest.mark.parametrize("codec", [Full(), BFloat16(), Int8().positive, Int8, None])
def test_codecs_that_cannot_hold_weights_are_refused(codec):
    with pytest.raises(TypeError, match="codec must be Int8"):
        quantize(network(), codec)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Bilinear, None])
def test_other_kinds_of_layers_are_refused(kind):
    with pytest.raises(TypeError, match="forward of nn.Linear"):
        quantize(network(), modules=(kind,))


def test_an_optimizer_goes_with_the_weights_that_it_was_built_on():
    for before, after in ((network(), quantize), (quantize(network()), dequantize)):
        optimizer = comoving.AdamW(before.named_parameters())
        after(before)
        backward(before)
        with pytest.raises(ValueError, match=r"0.weight, 2.weight: quantized or dequantized since"):
            optimizer.step()
    model = quantize(network())
    optimizer = comoving.AdamW(model.named_parameters())
    backward(model)
    params = list(model.parameters())
    del model
    with pytest.raises(ValueError, match="without the model"):
        optimizer.step()
    assert params


def test_a_weight_put_in_the_carriers_place_is_refused():
    model = quantize(network())
    model[0].weight = nn.Parameter(torch.zeros(40, 24))
    with pytest.raises(RuntimeError, match="replaced: it holds no numbers"):
        model(batch())


def test_other_optimizers_fail_instead_of_training_nothing():
    model = quantize(network())
    backward(model)
    with pytest.raises(RuntimeError):
        torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("option", ["amsgrad", "fused"])
def test_options_of_torchs_adamw_are_refused_for_dense_codes(option):
    model = quantize(network())
    with pytest.raises(ValueError, match=f"{option}=True is refused: w is stored in codes"):
        comoving.LowRankOptimizer([("w", model[0].weight)], rank=1.0, **{option: True})


@pytest.mark.parametrize(("recipe", "options"), [("q-galore", {}), ("loqt", {"codec": Int4(), "compensate": 1})])
def test_steps_inside_the_backward_pass_are_those_after_it(recipe, options):
    models = []
    for inside in (False, True):
        model = quantize(network(BF16), **options)
        optimizer = comoving.build(recipe, model, 1e-2, rank=8, refresh_every=3, rounding="stochastic")
        if inside:
            optimizer.step_in_backward()
        for t in range(5):
            optimizer.zero_grad()
            model(batch(BF16, t)).float().square().sum().backward()
            assert isinstance(model[0].weight.grad, TakenUp) == inside
            optimizer.step()
        models.append(model)
    assert same(*models) and torch.equal(models[0][0].bias, models[1][0].bias)
