"""Models, batches and optimizers for processes that train the same."""

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from comoving import LowRankOptimizer
from comoving.finders import Power
from comoving.residual import Feedback

WIDTH = 12


class Net(nn.Module):
    """Three alike layers that are stacked, one of another shape, and dense biases."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        sizes = [(WIDTH, 16), (16, 16), (16, 16), (16, 16), (16, 8)]
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in sizes)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) / 4
        self.layers[0].weight.data = self.layers[0].weight.data.mT.contiguous().mT  # its gradients lie so too

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


def batch(t, rank, dtype=torch.float64, count=6):
    """Inputs and targets of a process at a step."""
    generator = torch.Generator().manual_seed(1000 * t + rank)
    x = torch.randn((count, WIDTH), generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.sin(x[:, :8] * 2)


def loss_of(model, t, rank, dtype=torch.float64):
    x, y = batch(t, rank, dtype)
    return mse_loss(model(x), y)


def optimizer_of(model, **options):
    defaults = dict(rank=3, residual=Feedback(), finder=Power(), refresh_every=3, lr=0.01, eps=1e-3)
    return LowRankOptimizer(model.named_parameters(), **(defaults | options))


def wrapped(model, **options):
    return DistributedDataParallel(model, **options)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def slots_of(optimizer):
    """The tensors of the state, but for those that a process has for itself."""
    return {
        (site.name, name): x.clone()
        for p, site in optimizer.sites.items()
        for name, x in optimizer.state[p].items()
        if isinstance(x, torch.Tensor) and not name.startswith(("feedback.", "error")) and "feedback." not in name
    }


def raised(call, *args, **options):
    """What it raises, as text."""
    try:
        call(*args, **options)
    except Exception as error:  # noqa: BLE001  (whatever it is, the test looks at it)
        return f"{type(error).__name__}: {error}"
    return "nothing"
