"""Parameters that are sharded over processes (FSDP2, tensor parallelism) are trained as by one process."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import comoving
from comoving.finders import Delayed
from distributed.processes import run

STEPS = 50


class Waves(nn.Module):
    """Complex weights, in a module of their own, as FSDP wants them."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x.to(self.weight.dtype) @ self.weight


class Net(nn.Module):
    """Matrices that are tall, wide and odd, a tensor, complex weights, a bias and a norm."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def drawn(*shape):
            return nn.Parameter(torch.randn(shape, dtype=dtype, generator=g) / shape[-1] ** 0.5)

        self.tall, self.wide, self.odd = drawn(24, 10), drawn(10, 24), drawn(13, 11)
        self.twin, self.kernel, self.bias = drawn(24, 10), drawn(10, 9, 9), drawn(24)
        self.spectral = Waves(torch.complex(drawn(9, 8).data, drawn(9, 8).data))
        self.norm = drawn(11)

    def forward(self, x):
        """Of inputs (batch, 24)."""
        y = torch.tanh(x @ self.tall + (x * self.bias) @ self.twin)
        z = torch.tanh(y @ self.wide)[:, :13] @ self.odd * self.norm
        waves = self.spectral(z[:, :9]).abs()
        cube = torch.einsum("bi,ijk,bj->bk", y, self.kernel, z[:, :9])
        return (z - x[:, :11]).square().mean() + (waves - 1).square().mean() + cube.square().mean()


def inputs(step):
    return torch.randn((8, 24), dtype=torch.float64, generator=torch.Generator().manual_seed(100 + step))


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def sharded(model, how):
    """The model with its parameters sharded over all processes."""
    count = dist.get_world_size()
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (count,))
        fully_shard(model.spectral, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    mesh = init_device_mesh("cpu", (count,)) if how == "columns" else None
    for name, p in [*model.named_parameters()]:
        if mesh is not None and p.ndim > 1:
            setattr(model, name, nn.Parameter(distribute_tensor(p.data, mesh, [Shard(1)])))
    return model


def trained(build, how=None, steps=STEPS, dtype=torch.float64):
    """Losses and final weights, whole; and bytes of state here."""
    torch.manual_seed(0)
    model = Net(dtype)
    model = sharded(model, how) if how else model
    optimizer = build(model)
    # Sums of two equal gradients and zeros have no rounding: the gauge of a decomposition may depend on the last digit.
    share = 1.0 if how is None or how == "columns" else dist.get_world_size() / 2 * (dist.get_rank() < 2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        if how is None or how == "fsdp":
            loss = model(inputs(step).to(dtype))
        else:
            loss = _gathered_loss(model, inputs(step).to(dtype))
        (loss * share).backward()
        optimizer.step()
        losses.append(whole(loss).item())
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return (
        losses,
        weights,
        comoving.state_bytes(optimizer),
        {s.name: (s.shard, s.owner) for s in optimizer.sites.values()},
    )


def _gathered_loss(model, x):
    """The loss of a model whose parameters are put together first."""
    plain = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return torch.func.functional_call(model, plain, (x,))


def _recipe(name, options, model):
    own = {} if name == "comoving" else {"side": "right", "refresh_every": 4}
    return comoving.build(name, model, 1e-2, rank=0.25, **(own | options))


def _work(rank, name, options, how):
    return trained(partial(_recipe, name, options), how)


RECIPES = [
    ("adamw", {}),
    ("galore", {}),
    ("ldadam", {}),
    ("tucker-adam", {}),
    ("tucker-adam", {"finder": Delayed(by=2)}),
    ("comoving-adamw", {}),
    ("muon", {}),
    ("soap", {}),
    ("comoving", {"budget": "1/16"}),
]


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        pytest.param(
            *case,
            count,
            id=f"{case[0]}{' delayed' if 'finder' in case[1] else ''}-{count}",
            marks=[pytest.mark.full] if count == 4 and case[0] != "muon" else [],
        )
        for case in RECIPES
        for count in ((2,) if "finder" in case[1] else (2, 4))
    ],
)
def test_sharded_training_is_that_of_one_process(name, options, count):
    losses, weights, *_ = trained(partial(_recipe, name, options))
    for found, own, *_ in run(count, _work, name, options, "fsdp"):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-9, atol=1e-9)
        for key, x in weights.items():
            torch.testing.assert_close(
                own[key], x, rtol=1e-9, atol=1e-9, msg=f"{key} differs by {(own[key] - x).abs().max()}"
            )
