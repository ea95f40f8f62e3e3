"""Checkpoints of several processes, loaded by another number of them."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import comoving
from distributed.processes import run
from distributed.test_shards import Net, inputs, sharded

OPTIONS = {"side": "right", "refresh_every": 4}
OTHERS = ["adamw", "galore", "soap", "left"]
BETAS = (0.908, 0.99)  # of ldadam: which group takes over those of a checkpoint is up to torch


def _built(recipe, model, **options):
    """Of "left", frames along the mode that is cut, at a rank at which four processes share the core."""
    if recipe == "left":
        recipe, options = "comoving-adamw", {"side": "left", "rank": 1 / 8} | options
    return comoving.build(recipe, model, 1e-2, **{"rank": 0.25} | OPTIONS | options)


def _trained(rank, recipe, folder, start, steps):
    """Load where there is something to be loaded, train, save; what the state is before and after, whole."""
    model = sharded(Net(), "fsdp")
    optimizer = _built(recipe, model)
    if start:
        saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(saved, checkpoint_id=f"{folder}/{start}")
        set_model_state_dict(model, saved["model"])
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    before = _whole(get_optimizer_state_dict(model, optimizer)) if start else None
    losses = _losses(model, optimizer, start, steps)
    saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=f"{folder}/{start + steps}")
    return before, _whole(saved["optimizer"]), losses


def _whole(state):
    if isinstance(state, dict):
        return {key: _whole(value) for key, value in state.items()}
    state = state.full_tensor() if isinstance(state, DTensor) else state
    return state.clone() if isinstance(state, torch.Tensor) else state


def same(one, other, path=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            same(value, other[key], f"{path}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{path}: {one} {other}"
    else:
        assert one == other, path


@pytest.mark.parametrize("recipe", ["comoving-adamw", *(pytest.param(r, marks=pytest.mark.full) for r in OTHERS)])
def test_a_checkpoint_goes_from_one_process_to_two_to_four_to_one(recipe, tmp_path):
    """Frames and moments bitwise; and the training goes on as if nothing had happened."""
    alone = run(1, _trained, recipe, str(tmp_path / "alone"), 0, 24)[0][2]
    losses, last = [], None
    (tmp_path / "steps").mkdir()
    for start, count in ((0, 1), (6, 2), (12, 4), (18, 1)):
        found = run(count, _trained, recipe, str(tmp_path / "steps"), start, 6)
        for before, after, _ in found:
            same(after, found[0][1])
            if last is not None:
                same(before["state"], last["state"])
        last = found[0][1]
        losses += found[0][2]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone), rtol=1e-9, atol=1e-9)


def _full(rank, recipe, given, start, steps):
    """From a whole state on rank 0, or from none, to a whole state on rank 0."""
    model = sharded(Net(), "fsdp")
    optimizer = _built(recipe, model)
    if start:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        weights, state = given if rank == 0 else ({}, {})
        set_model_state_dict(model, weights, options=options)
        set_optimizer_state_dict(model, optimizer, state, options=options)
    losses = _losses(model, optimizer, start, steps)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)
    return losses, whole


def _losses(model, optimizer, start, steps):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = model(inputs(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", ["left", "soap"])
def test_a_whole_state_on_the_first_process_goes_to_one_process_and_to_all(recipe):
    losses, whole = run(2, _full, recipe, None, 0, 6)[0]
    expected = run(1, _full, recipe, None, 0, 12)[0][0]
    model = Net()
    optimizer = _built(recipe, model)
    set_model_state_dict(model, whole[0])
    set_optimizer_state_dict(model, optimizer, whole[1])
    alone = _losses(model, optimizer, 6, 6)
    together = run(2, _full, recipe, whole, 6, 6)[0][0]
    for own in (alone, together):
        torch.testing.assert_close(torch.tensor(losses + own), torch.tensor(expected), rtol=1e-9, atol=1e-9)


def _adopted(rank):
    """The state of torch's AdamW, saved by two processes, in the frames of another optimizer."""
    model = sharded(Net(), "fsdp")
    torch_adamw = torch.optim.AdamW(model.parameters(), 1e-2, betas=BETAS)
    _losses(model, torch_adamw, 0, 3)
    saved = get_optimizer_state_dict(model, torch_adamw)
    optimizer = comoving.build("ldadam", model, 1e-2, rank=0.25, **OPTIONS)
    set_optimizer_state_dict(model, optimizer, saved)
    losses = _losses(model, optimizer, 3, 3)
    return losses, {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def test_the_state_of_a_sharded_adamw_is_taken_over():
    model = Net()
    torch_adamw = torch.optim.AdamW(model.named_parameters(), 1e-2, betas=BETAS)
    _losses(model, torch_adamw, 0, 3)
    optimizer = comoving.build("ldadam", model, 1e-2, rank=0.25, **OPTIONS)
    optimizer.load_state_dict(torch_adamw.state_dict())
    expected = _losses(model, optimizer, 3, 3)
    for losses, weights in run(2, _adopted):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=1e-9)
        for name, p in model.named_parameters():
            torch.testing.assert_close(weights[name], p.detach(), rtol=1e-9, atol=1e-9)


def _saved(side):
    model = Net()
    optimizer = _built("ldadam", model, side=side)
    _losses(model, optimizer, 0, 3)
    return optimizer.state_dict()


def _loaded(model, saved, side):
    """An optimizer with its frames on this side, and the state of one that had them on the other."""
    optimizer = _built("ldadam", model, side=side)
    optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer


def _from_the_other_side(rank, left, right):
    """What is said of frames along the cut; and losses with frames that come to lie along it."""
    with pytest.raises(ValueError, match="cut") as error:
        _loaded(sharded(Net(), "fsdp"), left, "right")
    model = sharded(Net(), "fsdp")
    return str(error.value), _losses(model, _loaded(model, right, "left"), 3, 6)


def test_frames_go_from_the_side_that_is_not_cut_to_the_one_that_is_and_not_back():
    left, right = _saved("left"), _saved("right")
    model = Net()
    expected = _losses(model, _loaded(model, right, "left"), 3, 6)
    for message, losses in run(2, _from_the_other_side, left, right):
        assert "tall: its frame was saved along mode 0, which is cut" in message
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=1e-9)
