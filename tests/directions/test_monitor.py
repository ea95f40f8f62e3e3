"""What a monitor reads, against NumPy on copies taken beside it; any optimizer; resumption; bad input."""

from copy import deepcopy

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn.utils import parametrize

import comoving
from comoving.directions import SpectralMonitor
from comoving.directions.figures import Key
from comoving.directions.matrices import momentum_of
from comoving.frames import Blocks
from comoving.views import Heads
from directions.watched import Kept, Net, backward

NAME = "blocks.1.mlp.fc1"


def svd(a, k):
    u, s, vh = np.linalg.svd(a.detach().double().numpy(), full_matrices=False)
    return u[:, :k], s[:k], vh[:k].T


def run(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        backward(model, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


@pytest.mark.parametrize("exact", [False, True])
def test_every_figure_of_a_plain_loop_against_numpy(exact):
    model, kept, k = Net(), Kept(), 3
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = SpectralMonitor(model, "mlp.fc1,attn.qkv", every=3, k=k, sinks=[kept], exact=exact).attach(optimizer)
    assert list(monitor.modules) == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", NAME]
    weight, seen = model.blocks[1].mlp["fc1"].weight, {}
    for step in range(7):
        old = weight.detach().clone()
        run(model, optimizer, 1, step)
        seen[step + 1] = {
            "weight": weight.detach().clone(),
            "gradient": weight.grad.clone(),
            "momentum": optimizer.state[weight]["exp_avg"].clone(),
            "update": weight.detach() - old,
        }
    assert list(kept.rows) == [1, 4, 7] and monitor.updates == 7
    assert not any("cos" in name or "delta" in name or name.endswith(("/p", "/p_weight")) for name in kept.rows[1])
    paths = {"weight": "", "gradient": "grad/", "momentum": "momentum/", "update": "update/"}
    for now, last in ((4, 1), (7, 4)):
        for kind, path in paths.items():
            row = {n.removeprefix(f"spec/{NAME}/{path}"): x for n, x in kept.rows[now].items() if f"{NAME}/{path}" in n}
            (u, s, v), (u0, s0, v0) = svd(seen[now][kind], k), svd(seen[last][kind], k)
            assert row["sigma_max"] == row["sv1"]
            np.testing.assert_allclose([row[f"sv{i + 1}"] for i in range(k)], s, rtol=1e-4)
            assert row["delta_sv_rel"] == pytest.approx(np.linalg.norm(s - s0) / np.linalg.norm(s0), abs=1e-3)
            for side, a, b in (("u", u, u0), ("v", v, v0)):
                vectors = [row[f"cos_{side}{i + 1}"] for i in range(k)]
                np.testing.assert_allclose(vectors, np.abs(np.sum(a * b, 0)), atol=5e-3)
                angles = np.cos(scipy.linalg.subspace_angles(a, b))
                np.testing.assert_allclose(row[f"cos_{side}_max"], angles.max(), atol=5e-3)
                np.testing.assert_allclose(row[f"cos_{side}_mean"], angles.mean(), atol=5e-3)
            g = seen[now][kind].double().numpy()
            for field, of in (("p", "momentum"), ("p_weight", "weight")):
                a, _, b = svd(seen[last][of], k)
                if kind == "weight":
                    assert field not in row
                else:
                    energy = np.sum((a.T @ g @ b) ** 2) / np.sum(g**2)
                    assert row[field] == pytest.approx(energy, abs=5e-3)
    u, v, s = monitor.directions(NAME, "update")
    torch.testing.assert_close(
        u @ torch.diag(s) @ v.T, torch.from_numpy(low_rank(seen[7]["update"], k)), atol=1e-5, rtol=0
    )


def low_rank(a, k):
    u, s, v = svd(a, k)
    return (u * s @ v.T).astype(np.float32)


def test_watching_changes_nothing():
    weights = []
    for watched in (False, True):
        model = Net()
        optimizer = comoving.AdamW(model.named_parameters(), 1e-2)
        state = torch.random.get_rng_state()
        if watched:
            SpectralMonitor(model, every=1, k=4).attach(optimizer)
        run(model, optimizer, 5)
        assert torch.equal(state, torch.random.get_rng_state())
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), 1e-2),
    "ours": lambda m: comoving.AdamW(m.named_parameters(), 1e-2),
    "adamw": lambda m: comoving.build("adamw", m, 1e-2),
    "galore": lambda m: comoving.build("galore", m, 1e-2, rank=4),
    "ldadam": lambda m: comoving.build("ldadam", m, 1e-2, rank=4),
    "8 bits": lambda m: comoving.AdamW(m.named_parameters(), 1e-2, moments=comoving.codecs.Int8()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_momentum_of_any_optimizer(name):
    """With gradients of one fixed low-rank direction, every momentum is a multiple of it, in any frame."""
    model, kept = Net(), Kept()
    optimizer = OPTIMIZERS[name](model)
    SpectralMonitor(model, "mlp.fc1", every=2, k=2, sinks=[kept]).attach(optimizer)
    weight = model.blocks[1].mlp["fc1"].weight
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(48, 1, generator=g), torch.randn(1, 24, generator=g)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        weight.grad = (a @ b).clone()
        optimizer.step()
    momentum = momentum_of(optimizer, weight).double()
    assert momentum.shape == weight.shape
    cosine = float((momentum * (a @ b)).sum() / momentum.norm() / (a @ b).norm())
    assert abs(cosine) > (0.98 if name == "8 bits" else 0.9999)
    row = kept.rows[3]
    assert row[f"spec/{NAME}/momentum/sigma_max"] == pytest.approx(float(momentum.norm()), rel=0.03)
    assert row[f"spec/{NAME}/momentum/p"] > 0.96 and row[f"spec/{NAME}/grad/cos_u1"] == pytest.approx(1, abs=1e-5)
    assert row["spec/blocks.0.mlp.fc1/grad/sigma_max"] == 0 == row["spec/blocks.0.mlp.fc1/grad/cos_u_max"]


def test_the_momentum_of_blocks_is_that_of_each_head():
    weight = nn.Parameter(torch.zeros(12, 20))
    optimizer = comoving.LowRankOptimizer(
        [weight], 1e-2, rank=2, frame=Blocks(0), view=Heads(4), betas=(0.5, 0.9), refresh_every=10
    )
    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(12, 2, generator=g) @ torch.randn(2, 20, generator=g)
    gradient[4:8] = 0  # an idle head has no state
    weight.grad = gradient.clone()
    assert momentum_of(optimizer, weight) is None
    optimizer.step()
    torch.testing.assert_close(momentum_of(optimizer, weight), 0.5 * gradient, atol=1e-5, rtol=1e-4)


def test_two_optimizers_and_a_closure():
    model, kept = Net(), Kept()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "qkv" in n]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    muon, adam = torch.optim.Muon(matrices, 1e-3), torch.optim.AdamW(rest, 1e-3)
    monitor = SpectralMonitor(model, "attn.qkv,mlp.fc2", every=2, k=2, sinks=[kept]).attach(muon, adam)
    for step in range(3):
        muon.step(lambda step=step: backward(model, step))  # gradients exist only once the closure has run
        adam.step()
    assert list(kept.rows) == [1, 3]
    for name in monitor.modules:
        want = svd(model.get_submodule(name).weight.grad, 2)[1]
        np.testing.assert_allclose(kept.rows[3][f"spec/{name}/grad/sv2"], want[1], rtol=1e-4)
        assert kept.rows[3][f"spec/{name}/update/sigma_max"] > 0


def test_stable_directions_are_those_of_two_readings():
    model = nn.ModuleDict({"fc": nn.Linear(30, 20, bias=False)})
    monitor = SpectralMonitor(model, "fc", k=4, kinds=["weight"])
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 8, generator=g)).Q for n in (20, 30))
    s = torch.tensor([4.0, 3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="the weight of fc has not been read yet"):
        monitor.stable("fc", "weight")
    with torch.no_grad():
        model["fc"].weight.copy_(u[:, :4] * s @ v[:, :4].T)
        monitor.read()
        assert monitor.stable("fc", "weight")[0].shape == (20, 0)
        # The first two directions stay, turned among themselves; the third's right one and the fourth are new.
        w, z = torch.cat([u[:, :3], u[:, 5:6]], 1), torch.cat([v[:, :2], v[:, 4:6]], 1)
        model["fc"].weight.copy_(w * torch.tensor([3.0, 4.0, 2.0, 1.0]) @ z.T)
    monitor.read()
    a, b = monitor.stable("fc", "weight", 0.7)
    assert a.shape == (20, 2) and b.shape == (30, 2)
    torch.testing.assert_close(a @ a.T, u[:, :2] @ u[:, :2].T, atol=1e-5, rtol=0)
    torch.testing.assert_close(b @ b.T, v[:, :2] @ v[:, :2].T, atol=1e-5, rtol=0)


def test_a_resumed_run_reads_the_same():
    def fresh():
        model, kept = Net(), Kept()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        return model, optimizer, SpectralMonitor(model, every=3, k=2, sinks=[kept]), kept

    model, optimizer, monitor, whole = fresh()
    monitor.attach(optimizer)
    run(model, optimizer, 5)
    saved = [deepcopy(x.state_dict()) for x in (model, optimizer, monitor)]
    assert all(isinstance(x, torch.Tensor) for x in saved[2].values())
    run(model, optimizer, 3, 5)
    model, optimizer, monitor, resumed = fresh()
    for x, state in zip((model, optimizer, monitor.attach(optimizer)), saved, strict=True):
        x.load_state_dict(state)
    run(model, optimizer, 3, 5)
    assert list(resumed.rows) == [7] and resumed.rows[7] == whole.rows[7]
    with pytest.raises(
        ValueError, match=r"blocks.0.attn.qkv/u in the state has shape \(72, 2\); \(72, 3\) is expected"
    ):
        SpectralMonitor(model, k=3).load_state_dict(saved[2])
    with pytest.raises(ValueError, match="is not watched"):
        SpectralMonitor(model, "mlp.fc1", k=2).load_state_dict(saved[2])


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrized_and_frozen_layers():
    model, kept = Net(), Kept()
    parametrize.register_parametrization(model.blocks[0].mlp["fc1"], "weight", Doubled())
    model.blocks[1].mlp["fc1"].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
    SpectralMonitor(model, "mlp.fc1", k=2, sinks=[kept]).attach(optimizer)
    backward(model, 0)
    optimizer.step()
    row, layer = kept.rows[1], model.blocks[0].mlp["fc1"]
    original = layer.parametrizations.weight.original
    assert row["spec/blocks.0.mlp.fc1/sigma_max"] == pytest.approx(2 * svd(original, 1)[1][0], rel=1e-5)
    assert row["spec/blocks.0.mlp.fc1/grad/sv2"] == pytest.approx(svd(original.grad, 2)[1][1], rel=1e-4)
    assert row["spec/blocks.0.mlp.fc1/update/sv1"] == pytest.approx(2 * svd(original.grad, 1)[1][0], rel=1e-4)
    assert {n.rsplit("/", 1)[0] for n in row if NAME in n} == {f"spec/{NAME}"}


def test_a_nan_reaches_no_sink():
    model, kept = Net(), Kept()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = SpectralMonitor(model, every=1, k=2, sinks=[kept]).attach(optimizer)
    run(model, optimizer, 1)
    before = dict(monitor.last)
    model.blocks[1].mlp["fc2"].weight.grad[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the gradient of blocks.1.mlp.fc2 has entries that are NaN or infinite"):
        optimizer.step()
    assert list(kept.rows) == [1] and monitor.last == before


def test_bad_input():
    model = Net()
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv: k = 25 is outside \[1, 24\]"):
        SpectralMonitor(model, k=25)
    with pytest.raises(ValueError, match="kinds = "):
        SpectralMonitor(model, kinds=("weight", "hessian"))
    with pytest.raises(ValueError, match="every"):
        SpectralMonitor(model, every=0)
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp["fc2"])
    with pytest.raises(ValueError, match="parametrized from several tensors"):
        SpectralMonitor(model)

    model = Net()
    some = torch.optim.AdamW(model.blocks[0].parameters(), 1e-2)
    monitor = SpectralMonitor(model, k=2)
    with pytest.raises(ValueError, match="blocks.1.attn.qkv, .* trained by no optimizer"):
        monitor.attach(some)
    backwards = comoving.AdamW(model.named_parameters(), 1e-2)
    backwards.step_in_backward()
    with pytest.raises(ValueError, match="steps in the backward pass"):
        monitor.attach(backwards)
    model = Net()
    plain, monitor = torch.optim.SGD(model.parameters(), 1e-2), SpectralMonitor(model, k=2)
    monitor.attach(plain)
    with pytest.raises(RuntimeError, match="attached already"):
        monitor.attach(plain)
    backward(model, 0)
    with pytest.raises(ValueError, match="SGD has no momentum .* its state holds nothing; looked for exp_avg"):
        plain.step()
    monitor.detach()
    plain.step()
    kept = Kept()
    with SpectralMonitor(model, k=2, kinds=("weight", "update"), sinks=[kept]).attach(plain) as monitor:
        plain.step()
    assert kept.closed and list(kept.rows) == [1] and Key(NAME, "update") in monitor.last


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_is_no_reading(fused):
    torch.manual_seed(0)
    model, kept = nn.Sequential(nn.Linear(8, 8)), Kept()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    monitor = SpectralMonitor(model, "0", every=2, k=2, sinks=[kept]).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (float("inf"), 1.0, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 8)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert monitor.updates == 3 and list(kept.rows) == [1, 3]


def test_looking_at_a_spectral_norm_does_not_move_it():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))
    model = nn.Sequential(layer)
    before = deepcopy(layer.state_dict())
    SpectralMonitor(model, "0", k=2, kinds=("weight",)).read()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert all(module.training for module in model.modules())
