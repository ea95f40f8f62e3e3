"""Stepping inside the backward pass of a sharded model."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import comoving
from distributed.processes import run
from distributed.test_shards import Net, inputs, sharded, whole

OPTIONS = {"side": "right", "refresh_every": 3}
WAYS = {
    "at once": {},
    "windows": {"accumulate": 2},
    "clipped": {"accumulate": 2, "clip": 0.3},
    "running": {"clip": 0.3, "norm": "running"},
}


def trained(recipe, how, way):
    model = Net()
    if recipe == "comoving-adamw":
        # It is dealt out, so that a frame is found in the sum of a window's gradients: one process has the first alone.
        model.kernel.requires_grad_(False)
    model = sharded(model, how) if how else model
    optimizer = comoving.build(recipe, model, 1e-2, rank=0.25, **OPTIONS)
    optimizer.step_in_backward(**way)
    norms, losses = [], []
    for step in range(8):
        for part in range(way.get("accumulate", 1)):
            loss = model(inputs(10 * step + part))
            loss.backward()
            losses.append(loss.item())
        if step == 5:
            with pytest.raises(RuntimeError, match="was taken up inside backward"):
                clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        norms.append(optimizer.gradient_norm or 0.0)
    return torch.tensor(losses), torch.tensor(norms), {n: whole(p.detach()) for n, p in model.named_parameters()}


def _work(rank, recipe, way):
    return trained(recipe, "fsdp", way)


@pytest.mark.parametrize("recipe", ["comoving-adamw", "muon"])
@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_model_is_stepped_in_its_backward_pass(recipe, way):
    losses, norms, weights = trained(recipe, None, WAYS[way])
    close = 1e-6 if "clip" in WAYS[way] else 1e-9  # norms are added in single precision
    for own, sizes, found in run(2, _work, recipe, WAYS[way]):
        torch.testing.assert_close(own, losses, rtol=close, atol=close)
        torch.testing.assert_close(sizes, norms, rtol=1e-5, atol=1e-6)
        for name, x in weights.items():
            torch.testing.assert_close(found[name], x, rtol=close, atol=close)


def _refused(rank):
    optimizer = comoving.AdamW(Net().named_parameters())
    with pytest.raises(ValueError, match="refused with 2 processes for tall") as error:
        optimizer.step_in_backward()
    return str(error.value)


def test_parameters_whose_gradients_are_not_averaged_yet_are_refused():
    assert all("fully_shard" in message for message in run(2, _refused))


def _unstepped(rank):
    model = sharded(Net(), "fsdp")
    optimizer = comoving.build("muon", model, 1e-2)
    optimizer.step_in_backward(accumulate=2)
    model(inputs(0)).backward()
    with pytest.raises(RuntimeError, match="in the middle of a window"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="a window is open"):
        optimizer.step_after_backward()
    optimizer.step()
    optimizer.state_dict()
    return True


def test_a_window_of_gradients_that_others_step_is_not_saved():
    assert all(run(2, _unstepped))


def _nonfinite(rank, on_nonfinite):
    model = sharded(Net(), "fsdp")
    optimizer = comoving.build("comoving-adamw", model, 1e-2, rank=0.25, on_nonfinite=on_nonfinite)
    optimizer.step_in_backward(clip=1.0)
    before = {n: whole(p.detach()).clone() for n, p in model.named_parameters()}
    loss = model(inputs(0)) * (float("nan") if rank == 1 else 1.0)
    if on_nonfinite == "raise":
        with pytest.raises(RuntimeError, match="non-finite gradient in"):
            loss.backward()
        return True
    loss.backward()
    optimizer.step()
    return all(torch.equal(whole(p.detach()), before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_bad_gradient_is_bad_for_all(on_nonfinite):
    assert all(run(2, _nonfinite, on_nonfinite))
