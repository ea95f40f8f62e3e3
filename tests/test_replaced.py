"""Parameters that a tool puts into the places of others in the groups, as accelerate does when it shards a model."""

import copy

import pytest
import torch
from torch import nn

import comoving
from comoving import build


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16))


def replace(model, optimizer):
    """What accelerate does: other tensors in the model, and in the lists of the groups."""
    new = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            new[p] = nn.Parameter(p.detach().clone())
            setattr(module, name, new[p])
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]


def trained(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randint(8, (12,), generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"rank": 4}, {"budget": 0.5}, {"rank": 4, "refresh_every": 3}, {"rank": 4, "dense": ["1.weight"]}],
    ids=str,
)
def test_parameters_that_replace_others_are_trained_as_these_would_have_been(options, named):
    def begun():
        model = made()
        first = model if named else model.parameters()
        given = options if named else {key: value for key, value in options.items() if key != "dense"}
        return model, build("comoving-adamw", first, lr=1e-2, **given)

    model, optimizer = begun()
    expected, reported = trained(model, optimizer), str(comoving.explain(optimizer))
    model, optimizer = begun()
    replace(model, optimizer)
    torch.testing.assert_close(trained(model, optimizer), expected, rtol=0, atol=0)
    assert str(comoving.explain(optimizer)) == reported
    assert set(optimizer.state) == set(model.parameters())


def test_a_state_may_be_loaded_and_a_copy_made_after_that():
    model, optimizer = made(), None
    optimizer = build("comoving-adamw", model, lr=1e-2, rank=4)
    trained(model, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    expected = trained(model, optimizer)
    other = made()
    other.load_state_dict(weights)
    again = build("comoving-adamw", other, lr=1e-2, rank=4)
    replace(other, again)
    again.load_state_dict(saved)
    pair = copy.deepcopy((other, again))
    for model, optimizer in ((other, again), pair):
        torch.testing.assert_close(trained(model, optimizer), expected, rtol=0, atol=0)


def test_gradients_are_absorbed_for_them():
    model = made()
    optimizer = build("comoving-adamw", model, lr=1e-2, rank=4)
    replace(model, optimizer)
    p = model[1].weight
    before = p.detach().clone()
    optimizer.absorb(p, torch.ones_like(p))
    optimizer.apply(p)
    assert not torch.equal(p, before)


def test_what_cannot_be_taken_up_is_refused_and_changes_nothing():
    model = made()
    optimizer = build("comoving-adamw", model, lr=1e-2, rank=4)
    params = optimizer.param_groups[0]["params"]
    whole = list(params)
    params[0] = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"1.weight is torch.float32 of shape \(3, 3\), and was .*\(24, 16\)"):
        optimizer.step()
    params[:] = [*whole, nn.Parameter(torch.zeros(3, 3))]
    with pytest.raises(ValueError, match=r"call add_param_group\(\)"):
        optimizer.step()
    params[:] = whole
    trained(model, optimizer)
    replace(model, optimizer)
    with pytest.raises(ValueError, match="another parameter has taken its place .* before the first step"):
        optimizer.step()
