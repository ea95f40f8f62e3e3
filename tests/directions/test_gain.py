"""Gain: the gradient that the optimizer sees, with any optimizer and closure, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

import comoving
from comoving.directions import Gain, amplify
from directions.networks import backward, network, train


def basis(rows, columns, seed=0, dtype=torch.float32):
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.to(dtype)


def reference(g, u, v, alpha):
    """By explicit projectors, in float64."""
    left = u.double() @ u.double().T
    right = torch.eye(g.shape[1], dtype=torch.float64) if v is None else v.double() @ v.double().T
    return g.double() + (alpha - 1) * left @ g.double() @ right


def test_the_gradient_inside_is_multiplied():
    model = network()
    fc1, proj, fc2 = model[0].mlp["fc1"], model[0].attn.proj, model[1].mlp["fc2"]
    u, v, w = basis(16, 3), basis(8, 2, 1), basis(8, 2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    amplify(optimizer, {fc1: (u, v), proj.weight: (w, None), fc2: (u.new_zeros(8, 0), None)}, 3.0)
    backward(model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    changed = {"0.mlp.fc1.weight": (u, v), "0.attn.proj.weight": (w, None)}
    for name, p in model.named_parameters():
        g = reference(grads[name], *changed[name], 3.0) if name in changed else grads[name].double()
        torch.testing.assert_close(p.detach().double(), before[name].double() - 0.5 * g, atol=1e-6, rtol=0)
        if name not in changed:
            assert torch.equal(p.grad, grads[name])
    g = fc1.weight.grad
    torch.testing.assert_close(u.T @ g @ v, 3 * u.T @ grads["0.mlp.fc1.weight"] @ v, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(g - u @ u.T @ g @ v @ v.T,
                               grads["0.mlp.fc1.weight"] - u @ u.T @ grads["0.mlp.fc1.weight"] @ v @ v.T)  # fmt: skip


def test_directions_are_replaced_and_removed():
    layer = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    u, v = basis(5, 2), basis(6, 2, 1)
    handle = amplify(optimizer, {layer: (u, v)}, Gain(2.0))
    u.zero_()  # a copy was taken

    def seen():
        layer.weight.grad = torch.ones(5, 6)
        optimizer.step()
        return layer.weight.grad

    torch.testing.assert_close(seen().double(), reference(torch.ones(5, 6), basis(5, 2), v, 2.0), atol=1e-6, rtol=0)
    handle.use(layer, basis(5, 1, 4))
    torch.testing.assert_close(
        seen().double(), reference(torch.ones(5, 6), basis(5, 1, 4), None, 2.0), atol=1e-6, rtol=0
    )
    with pytest.raises(ValueError, match="orthonormal"):
        handle.use(layer, 2 * basis(5, 1, 4))
    assert not torch.equal(seen(), torch.ones(5, 6))
    handle.remove()
    assert torch.equal(seen(), torch.ones(5, 6))


@pytest.mark.parametrize("by_name", [True, False])
def test_a_closure_gives_the_same_step(by_name):
    models = [network(), network()]
    for model, closed in zip(models, (False, True), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        amplify(optimizer, {model[0].mlp["fc1"]: (basis(16, 3), basis(8, 2, 1))}, 4.0)
        for number in range(3):
            closure = (lambda model=model, number=number: backward(model, number)) if closed else None
            if not closed:
                backward(model, number)
                optimizer.step()
            else:
                loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                assert loss.isfinite()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_half_precision_and_missing_gradients():
    layer = nn.Linear(6, 5, bias=False, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    amplify(optimizer, {layer: (basis(5, 2, dtype=torch.bfloat16), basis(6, 2, 1))}, 2.0)
    optimizer.step()
    assert layer.weight.grad is None
    layer.weight.grad = torch.ones(5, 6, dtype=torch.bfloat16)
    optimizer.step()
    expected = reference(torch.ones(5, 6), basis(5, 2, dtype=torch.bfloat16), basis(6, 2, 1), 2.0)
    torch.testing.assert_close(layer.weight.grad.double(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("alpha", [1.0, 0.5, -2.0, math.inf, math.nan])
def test_alpha_outside_its_interval(alpha):
    layer = nn.Linear(6, 5)
    with pytest.raises(ValueError, match=r"alpha must lie in \(1, inf\)"):
        amplify(torch.optim.SGD(layer.parameters()), {}, alpha)
    with pytest.raises(TypeError, match="alpha must be a number"):
        Gain("2")


def test_bad_directions():
    layer, other = nn.Linear(6, 5), nn.Linear(6, 5)
    optimizer = torch.optim.SGD(layer.parameters())
    u, v = basis(5, 2), basis(6, 2)
    for where, bases, message in [
        (layer, (v, u), r"U must be \(5, r\)"),
        (layer, (u, u), r"V must be \(6, r\)"),
        (layer, (u[:, 0], v), r"U must be \(5, r\)"),
        (layer, (u * 1.01, v), "U must have orthonormal columns"),
        (layer, (u, v * torch.nan), "V must have orthonormal columns"),
        (layer.bias, (u, v), "amplify needs a floating-point matrix"),
        (nn.ReLU(), (u, v), "ReLU has no weight"),
        (other, (u, v), r"the optimizer does not hold the parameter of shape \(5, 6\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            amplify(optimizer, {where: bases})
    with pytest.raises(TypeError, match=r"U must be a floating-point tensor"):
        amplify(optimizer, {layer: (torch.eye(5, dtype=torch.int64), v)})
    layer.weight.grad = torch.ones(5, 6)
    optimizer.step()
    assert torch.equal(layer.weight.grad, torch.ones(5, 6))  # nothing stayed behind


def test_sparse_gradients():
    table = nn.Embedding(6, 5, sparse=True)
    optimizer = torch.optim.SGD(table.parameters())
    amplify(optimizer, {table: (basis(6, 2), None)})
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="only dense gradients"):
        optimizer.step()


def test_stepping_in_the_backward_pass_is_refused():
    model = network(16)
    optimizer = comoving.AdamW(model.parameters())
    where = {model[0].mlp["fc1"]: (basis(32, 3), basis(16, 2, 1))}
    optimizer.step_in_backward()
    with pytest.raises(ValueError, match="steps in the backward pass"):
        amplify(optimizer, where)
    optimizer.step_after_backward()
    handle = amplify(optimizer, where)
    optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match="steps in the backward pass"):
        optimizer.step()
    handle.remove()
    optimizer.step()


def test_with_this_librarys_optimizer_projected():
    """The same as training on gradients that were amplified by hand."""
    one = network(16, dtype=torch.float64)
    two = copy.deepcopy(one)
    u, v = basis(32, 3, dtype=torch.float64), basis(16, 2, 1, torch.float64)
    optimizers = [comoving.AdamW(m.parameters(), lr=1e-2, rank=4) for m in (one, two)]
    amplify(optimizers[0], {one[0].mlp["fc1"]: (u, v)}, 2.5)
    for number in range(3):
        for model, optimizer in zip((one, two), optimizers, strict=True):
            x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(number)).double()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if model is two:
                weight = two[0].mlp["fc1"].weight
                weight.grad = reference(weight.grad, u, v, 2.5)
            optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=0)


def test_training_works():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    amplify(optimizer, {model[0].mlp["fc1"]: (basis(16, 3), basis(8, 2, 1))}, 2.0)
    first = backward(model)
    train(model, optimizer, 30)
    assert backward(model) < first
