"""Branches: the function, the clamp against exact singular values, saving, merging, and what is refused."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import comoving
from comoving.directions import add_branches
from comoving.directions.clamp import bound, gram_product
from directions.networks import backward, batch, network, train

WIDTH = 8


def exact(branch):
    """sigma_max of each part in float64, from the full product."""
    product = branch.U.detach().double() * branch.a.detach().double().unsqueeze(-2) @ branch.V.detach().double().mT
    return torch.linalg.svdvals(product).amax(-1)


def plain(model, x):
    with torch.no_grad():
        return model(x)


def groups(branches, lr=1e-2):
    return torch.optim.AdamW(branches.param_groups(lr))


@pytest.mark.parametrize("backbone", ["trainable", "frozen", "zero"])
def test_the_effective_weight_and_its_start(backbone):
    model, untouched = network(), network()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    branches = add_branches(model, rank=4, backbone=backbone)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, layer in branches.layers.items():
        before = untouched.get_submodule(name).weight
        branch, blocks = branches[name], 3 if name.endswith("qkv") else 1
        assert branch.U.shape == (blocks, before.shape[0] // blocks, 4) and branch.V.shape == (
            blocks,
            before.shape[1],
            4,
        )
        identity = torch.eye(4).expand(blocks, 4, 4)
        torch.testing.assert_close(branch.U.mT @ branch.U, identity, atol=1e-5, rtol=0)
        torch.testing.assert_close(branch.V.mT @ branch.V, identity, atol=1e-5, rtol=0)
        base = torch.zeros_like(before) if backbone == "zero" else before
        rows = before.shape[0] // blocks
        expected = torch.cat([base[p * rows : (p + 1) * rows] + branch.U[p] @ branch.a[p].diag() @ branch.V[p].T
                              for p in range(blocks)])  # fmt: skip
        torch.testing.assert_close(layer.weight, expected, atol=1e-6, rtol=0)
        size = 0.0 if backbone == "trainable" else 0.7 / before.shape[1] ** 0.5
        torch.testing.assert_close(exact(branch), torch.full((blocks,), size, dtype=torch.float64), atol=1e-6, rtol=0)
        assert layer.parametrizations.weight.original.requires_grad == (backbone == "trainable")
        assert layer.bias.requires_grad
    x, _ = batch()
    assert torch.equal(plain(model, x), plain(untouched, x)) == (backbone == "trainable")


def test_without_a_clamp_the_start_is_one_over_root_d():
    model = network()
    branches = add_branches(model, "attn.proj", rank=2, backbone="frozen", clamp=None)
    torch.testing.assert_close(exact(branches["0.attn.proj"]).float(), torch.tensor([WIDTH**-0.5]))
    with pytest.raises(ValueError, match="clamp=None"):
        branches.clamp()
    with pytest.raises(ValueError, match="clamp=None"):
        branches.attach(groups(branches))


def test_seeds_decide_and_layers_differ():
    one, same, other = (add_branches(network(), rank=3, seed=seed) for seed in (0, 0, 1))
    name, next_ = "0.mlp.fc1", "1.mlp.fc1"
    assert torch.equal(one[name].U, same[name].U) and not torch.allclose(one[name].U, other[name].U)
    assert not torch.allclose(one[name].U, one[next_].U) and not torch.allclose(one[name].U[0, :8], one[name].V[0])


def test_amplitudes_have_their_own_group():
    model = network()
    branches = add_branches(model, rank=4, backbone="frozen")
    others, amplitudes = branches.param_groups(1e-3, amplitude_rate=20.0, weight_decay=0.1)
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.1)
    assert (amplitudes["lr"], amplitudes["weight_decay"]) == (2e-2, 0.0)
    assert {id(p) for p in amplitudes["params"]} == {id(branches[n].a) for n in branches.layers}
    owned = {id(p) for g in (others, amplitudes) for p in g["params"]}
    assert owned == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(owned) == len(others["params"]) + len(amplitudes["params"])
    train(model, torch.optim.SGD(branches.param_groups(1e-2)), 1)


# ------------------------------------------------------------------------------------------------------------ the clamp


@st.composite
def factors(draw):
    rank = draw(st.integers(1, 16))
    rows, columns = rank + draw(st.integers(0, 20)), rank + draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    u, v = (torch.randn(2, d, rank, generator=generator, dtype=torch.float64) for d in (rows, columns))
    kind = draw(st.sampled_from(["equal", "decaying", "gaussian", "parallel", "cancelling"]))
    a = torch.randn(2, rank, generator=generator, dtype=torch.float64)
    if kind in ("equal", "decaying"):
        u, v = torch.linalg.qr(u).Q, torch.linalg.qr(v).Q
        a = torch.ones_like(a) if kind == "equal" else 10.0 ** -torch.arange(rank, dtype=torch.float64).expand(2, rank)
    elif kind == "parallel":
        u = u[..., :1] + 1e-3 * u
    elif rank > 1 and kind == "cancelling":  # the product is far smaller than its terms
        u[..., 1], v[..., 1] = u[..., 0], v[..., 0] * (1 + 1e-3)
        a[..., 1] = -a[..., 0]
    return u, a * 10.0 ** draw(st.integers(-6, 6)), v


@given(factors())
def test_the_bound_is_within_its_accuracy_from_above(drawn):
    u, a, v = drawn
    sigma = torch.linalg.svdvals((u * a.unsqueeze(-2)) @ v.mT).amax(-1)
    found = bound(gram_product(u, a, v))
    assert (found >= sigma * (1 - 1e-6)).all() and (found <= sigma * 1.003).all()


def test_a_product_far_smaller_than_its_terms():
    """Gram matrices in single precision would be wrong by more than the product."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(1, d, 1, generator=generator).expand(1, d, 2).clone() for d in (9, 7))
    v[..., 1] += 1e-4 * torch.randn(7, generator=generator)
    a = torch.tensor([[1.0, -1.0]])
    sigma = torch.linalg.svdvals((u * a.unsqueeze(-2)).double() @ v.double().mT).amax(-1)
    torch.testing.assert_close(bound(gram_product(u, a, v)), sigma, rtol=3e-3, atol=0)


@given(factors(), st.floats(0.1, 10.0))
def test_the_clamp_holds_within_one_percent(drawn, relative):
    u, a, v = (x.float() for x in drawn)
    parts, rows, rank = u.shape
    model = nn.Sequential(nn.Linear(v.shape[1], parts * rows, bias=False))
    branches = add_branches(model, "0", rank=rank, parts=parts, clamp=0.7)
    branch, limit = branches["0"], 0.7 / v.shape[1] ** 0.5
    with torch.no_grad():
        branch.U.copy_(u), branch.V.copy_(v), branch.a.copy_(a)
        branch.a.mul_(relative * limit / exact(branch).amax())
    before = exact(branch)
    branches.clamp()
    after = exact(branch)
    assert (after <= limit * 1.0001).all()
    active = before >= limit
    assert (after[active] >= 0.99 * limit).all()
    assert (after[~active] >= 0.99 * before[~active]).all()
    free = before < 0.99 * limit
    torch.testing.assert_close(after[free], before[free], rtol=0, atol=0)


def test_a_branch_of_zeros_and_one_that_is_not_finite():
    zero = torch.zeros(1, 3, 2)
    assert bound(gram_product(zero, torch.ones(1, 2), zero)).item() == 0.0
    model = network()
    branches = add_branches(model, "attn.proj", rank=2)
    branches.clamp()
    assert all((branches[n].a == 0).all() for n in branches.layers)
    with torch.no_grad():
        branches["0.attn.proj"].U[0, 0, 0] = torch.nan
    assert branches.sigma_max()["0.attn.proj"].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clamp_after_each_step(dtype):
    model = network(dtype=dtype)
    branches = add_branches(model, rank=4)
    optimizer = groups(branches, 1e-1)
    handle = branches.attach(optimizer)
    slack = 1.0001 if dtype == torch.float32 else 1.01
    for number in range(10):
        train(model, optimizer, 1, number)
        for name in branches.layers:
            assert (exact(branches[name]) <= branches.limits[name] * slack).all()
    assert any((exact(branches[n]) >= 0.99 * branches.limits[n]).any() for n in branches.layers)
    handle.remove()
    train(model, optimizer, 5)
    assert any((exact(branches[n]) > 1.1 * branches.limits[n]).any() for n in branches.layers)


def test_the_clamp_with_this_librarys_optimizer():
    model = network()
    branches = add_branches(model, rank=4, backbone="zero")
    optimizer = comoving.AdamW(branches.param_groups(1e-1), rank=1.0)
    branches.attach(optimizer)
    train(model, optimizer, 3)
    assert all((exact(branches[n]) <= branches.limits[n] * 1.0001).all() for n in branches.layers)


# ------------------------------------------------------------------------------------------------- saving and merging


@pytest.mark.parametrize("backbone", ["trainable", "frozen", "zero"])
def test_saved_loaded_and_merged(backbone, tmp_path):
    model = network()
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    branches = add_branches(model, rank=4, backbone=backbone)
    train(model, groups(branches), 3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    x, _ = batch(9)
    before = plain(model, x)

    fresh = network(seed=5)
    add_branches(fresh, rank=4, backbone=backbone, seed=7)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(plain(fresh, x), before)

    branches.merge()
    torch.testing.assert_close(plain(model, x), before, atol=1e-6, rtol=0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert type(module) is nn.Linear and module.weight is weights[name] and module.weight.requires_grad
    assert list(model.state_dict()) == list(network().state_dict())
    network().load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="merged already"):
        branches.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        branches.clamp()


def test_half_precision():
    model = network(dtype=torch.bfloat16)
    branches = add_branches(model, rank=4, backbone="frozen")
    branch = branches["0.attn.qkv"]
    assert (branch.U.dtype, branch.V.dtype, branch.a.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert model.get_submodule("0.attn.qkv").weight.dtype == torch.bfloat16
    assert backward(model).isfinite() and branch.a.grad.dtype == torch.float32
    branches.merge()
    assert model.get_submodule("0.attn.qkv").weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(model, message, *args, error=ValueError, **options):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(error, match=message):
        add_branches(model, *args, **options)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in after)
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"rank": 9}, r"rank must lie in \[1, 8\] for 0.attn.qkv of \(8, 8\), got 9", ValueError),
        ({"rank": 0}, "rank must be >= 1, got 0", ValueError),
        ({"rank": 2.0}, "rank must be an int", TypeError),
        ({"clamp": 0.0}, r"clamp must lie in \(0, inf\), got 0.0", ValueError),
        ({"clamp": -1.0}, "clamp must lie", ValueError),
        ({"backbone": "none"}, "backbone must be one of 'trainable', 'frozen', 'zero', got 'none'", ValueError),
        ({"parts": 5}, "parts = 5 does not divide the 24 rows of 0.attn.qkv", ValueError),
        ({"parts": {"qkv": 1}}, "parts names qkv, which is none of the layers", ValueError),
        ({"parts": 0}, "must be >= 1, got 0", ValueError),
        ({"seed": -1}, "seed must be >= 0", ValueError),
        ({"targets": "nothing"}, "matches no module", ValueError),
        ({"targets": "norm"}, "no matrix", ValueError),
    ],
)
def test_bad_options(options, message, error):
    refused(network(), message, error=error, **options)


def test_bad_layers():
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9))
    refused(gpt2, "h.0.attn.c_attn is a Conv1D, and only torch.nn.Linear")
    model = network()
    model[0].mlp["fc1"].weight = model[1].mlp["fc1"].weight
    refused(model, "share one weight", "mlp.fc1")
    refused(model, "0.mlp.fc1 shares its weight with 1.mlp.fc1", "0.mlp.fc1")
    model = network()
    nn.utils.parametrizations.orthogonal(model[0].attn.proj)
    refused(model, "0.attn.proj is parametrized already", "attn.proj")
    model = network()
    model[0].attn.proj.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    refused(model, "0.attn.proj must be a floating-point parameter, it is torch.int8", "attn.proj")
    model = network(16)
    comoving.weights.quantize(model)
    with pytest.raises(ValueError, match="must be a floating-point parameter, it is quantized"):
        add_branches(model, rank=2)


def test_an_optimizer_without_the_amplitudes():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    branches = add_branches(model, rank=2)
    with pytest.raises(ValueError, match="does not hold the amplitudes of 0.attn.qkv, .* and 4 more"):
        branches.attach(optimizer)


def test_a_model_that_is_wrapped_for_several_processes_is_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Linear(8, 8))

    with pytest.raises(ValueError, match="before DistributedDataParallel wraps it"):
        add_branches(DistributedDataParallel(), "module.0", rank=2)
