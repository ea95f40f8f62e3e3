"""What happens to an optimizer from outside between two steps: edits, hand-made windows, foreign checkpoints."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import comoving
from comoving import LowRankOptimizer
from comoving.codecs import Full
from comoving.frames import Blocks, Modes
from comoving.transport import Carry, Rotate


def parameters(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def gradients(params, t):
    generator = torch.Generator().manual_seed(100 + t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def train(params, optimizer, start, stop):
    for t in range(start, stop):
        gradients(params, t)
        optimizer.step()


def test_a_shorter_refresh_period_refreshes_every_parameter():
    params = parameters(*[(12, 16)] * 4)
    optimizer = comoving.AdamW(params, rank=3, refresh_every=4)
    train(params, optimizer, 0, 4)
    optimizer.param_groups[0]["refresh_every"] = 2
    before = [optimizer.state[p]["frame.0"].clone() for p in params]
    train(params, optimizer, 4, 6)
    assert not any(torch.equal(optimizer.state[p]["frame.0"], u) for p, u in zip(params, before, strict=True))


@pytest.mark.parametrize("edit", [{"rank": 4}, {"transport": Carry()}, {"codec": Full()}, {"diagnostics": False}])
def test_edits_of_what_was_decided_at_construction_are_refused(edit):
    params = parameters((12, 16))
    optimizer = comoving.AdamW(params, rank=3)
    train(params, optimizer, 0, 2)
    before = params[0].detach().clone()
    optimizer.param_groups[0].update(edit)
    with pytest.raises(ValueError, match=next(iter(edit))):
        train(params, optimizer, 2, 3)
    assert torch.equal(params[0], before)


def test_a_copy_keeps_what_was_decided():
    params = parameters((12, 16))
    optimizer = comoving.AdamW(params, rank=3)
    train(params, optimizer, 0, 2)
    clone = copy.deepcopy(optimizer)
    assert [site.ranks for site in clone.sites.values()] == [(3, None)]
    assert next(iter(clone.sites)) is clone.param_groups[0]["params"][0]


def test_absorbing_keeps_no_hold_on_the_gradient():
    params = parameters((6,), dtype=torch.complex64)
    optimizer = comoving.AdamW(params, 0.1)
    start = params[0].detach().clone()
    gradients(params, 0)
    optimizer.absorb(params[0], params[0].grad)
    params[0].grad.zero_()
    optimizer.apply(params[0])
    assert (params[0].detach() - start).abs().min() > 0.05


@pytest.mark.parametrize("frame", [Modes(), Blocks(0)], ids=str)
def test_what_was_absorbed_is_stepped_without_a_gradient(frame):
    weights = [nn.Parameter(torch.randn(4, 12, 10, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    optimizers = [LowRankOptimizer([p], 1e-2, 4, frame=frame) for p in weights]
    for t in range(3):
        gradient = torch.randn(4, 12, 10, generator=torch.Generator().manual_seed(t))
        optimizers[0].absorb(weights[0], gradient)
        optimizers[0].step()
        weights[1].grad = gradient
        optimizers[1].step()
    torch.testing.assert_close(*weights)
    optimizers[0].step()
    torch.testing.assert_close(*weights)  # it was used up


def test_a_parameter_that_is_sharded_over_one_process_is_like_any_other():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, found = init_device_mesh("cpu", (1,)), []
        for shard in (False, True):
            values = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((24, 16), (24,))]
            params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)]) if shard else x) for x in values]
            optimizer = LowRankOptimizer([("weight", params[0]), ("bias", params[1])], 1e-2, 4)
            for _ in range(3):
                sum(p.square().sum() for p in params).backward()
                optimizer.step()
            found.append([p.full_tensor() if shard else p for p in params])
        assert all(map(torch.equal, *found))
    finally:
        torch.distributed.destroy_process_group()


def test_absorbing_for_a_plain_parameter_is_refused_before_anything_changes():
    params = parameters((6,))
    optimizer = comoving.AdamW(params)
    with pytest.raises(RuntimeError, match="torch's AdamW"):
        optimizer.absorb(params[0], torch.ones(6))
    assert not optimizer.state[params[0]]


def test_a_checkpoint_inside_a_window_resumes_bitwise():
    results = []
    for interrupt in (False, True):
        params = parameters((12, 16))
        optimizer = comoving.AdamW(params, rank=3)
        train(params, optimizer, 0, 5)
        gradients(params, 5)
        optimizer.absorb(params[0], params[0].grad)
        if interrupt:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = comoving.AdamW(params, rank=3)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        optimizer.apply(params[0])
        results.append(params[0].detach().clone())
    assert torch.equal(*results)


def test_the_bound_holds_for_windows_filled_by_hand():
    params = parameters((12, 16))
    optimizer = comoving.AdamW(params, rank=3)
    train(params, optimizer, 0, 3)
    optimizer.absorb(params[0], 50 * torch.ones(12, 16))
    optimizer.absorb(params[0], torch.randn(12, 16))
    optimizer.apply(params[0])
    (figures,) = optimizer.diagnostics().values()
    assert figures["error"] <= figures["bound"] * (1 + 1e-5)


def test_the_bound_recovers_from_a_norm_that_overflowed():
    params = parameters((12, 16))
    optimizer = comoving.AdamW(params, rank=3)
    params[0].grad = torch.full((12, 16), 1e19)
    optimizer.step()
    train(params, optimizer, 0, 60)  # until the momentum has forgotten it
    (figures,) = optimizer.diagnostics().values()
    assert figures["bound"] == figures["bound"] < float("inf")


def test_rates_come_from_the_saved_group_that_holds_the_parameters():
    weight, bias = parameters((12, 16), (16,))
    theirs = torch.optim.AdamW(
        [
            {"params": [("bias", bias)], "weight_decay": 0.0},
            {"params": [("weight", weight)], "weight_decay": 0.1, "lr": 5e-3},
        ]
    )
    train([weight, bias], theirs, 0, 1)
    ours = comoving.AdamW(
        [
            {"params": [("weight", weight)], "rank": 3},
            {"params": [("bias", bias)]},
        ]
    )
    ours.load_state_dict(theirs.state_dict())
    assert [(g["lr"], g["weight_decay"]) for g in ours.param_groups] == [(5e-3, 0.1), (1e-3, 0.0)]
    assert "capturable" not in ours.param_groups[0]


def test_a_bent_frame_is_mended_on_loading_and_a_good_one_left_alone():
    params = parameters((12, 16))
    optimizer = comoving.AdamW(params, rank=3)
    train(params, optimizer, 0, 3)
    state = copy.deepcopy(optimizer.state_dict())
    good = state["state"][0]["frame.0"].clone()
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[params[0]]["frame.0"], good)
    state["state"][0]["frame.0"] = good.bfloat16()
    optimizer.load_state_dict(state)
    mended = optimizer.state[params[0]]["frame.0"]
    assert mended.dtype is torch.float32
    torch.testing.assert_close(mended.mT @ mended, torch.eye(3), atol=1e-5, rtol=0)


def test_a_real_state_is_refused_for_a_complex_parameter():
    (real,) = parameters((12, 16))
    (complex_one,) = parameters((12, 16), dtype=torch.complex64)
    source, target = (comoving.LowRankOptimizer([p], rank=3, transport=Rotate()) for p in (real, complex_one))
    train([real], source, 0, 2)
    with pytest.raises(ValueError, match="float32 in the checkpoint, torch.complex64 here"):
        target.load_state_dict(source.state_dict())


def test_skipping_a_step_that_would_change_ranks_changes_nothing():
    (p,) = parameters((12, 16))
    source = comoving.AdamW([p], rank=3)
    train([p], source, 0, 3)
    target = comoving.AdamW([p], rank=6, on_nonfinite="skip")
    target.load_state_dict(source.state_dict())
    before = {n: x.clone() for n, x in target.state[p].items() if torch.is_tensor(x)}
    p.grad = torch.full((12, 16), float("nan"))
    target.step()
    assert all(torch.equal(target.state[p][n], x) for n, x in before.items())
    assert target.skipped_steps == 1


def test_pairs_in_a_mixed_model():
    model = nn.ParameterDict({"spec": torch.randn(16, 12, 8, 2), "matrix": torch.randn(24, 32)})
    optimizer = comoving.build("comoving-adamw", model, 1e-2, rank=0.2, pairs=["spec"])
    sites = {site.name: site for site in optimizer.sites.values()}
    assert sites["spec"].view.name == "pairs"
    assert sites["spec"].view.shape == (16, 12, 8)
    assert sites["matrix"].view.name == "tensor"
    assert all(site.projected for site in sites.values())
