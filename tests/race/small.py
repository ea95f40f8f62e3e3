"""A task so small that a run takes milliseconds."""

import torch
from torch import nn

from comoving.race.settings import RaceSettings


class Small:
    """Two hidden matrices fit a random linear map; every batch that is drawn is remembered."""

    def __init__(self):
        data = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(256, 16, generator=data)
        self.outputs = self.inputs @ torch.randn(16, 8, generator=data)
        self.batches = []
        self.initial = []

    def fingerprint(self):
        return "small"

    def model(self):
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
        self.initial.append([p.detach().clone() for p in model.parameters()])
        return model

    def batch(self, size, generator):
        rows = torch.randint(256, (size,), generator=generator)
        self.batches.append(rows)
        return self.inputs[rows], self.outputs[rows]

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def validate(self, model):
        dtype = next(model.parameters()).dtype
        value = self.loss(model, (self.inputs.to(dtype), self.outputs.to(dtype))).item()
        return {"value": value, "loss": value}


def settings(out, **changes):
    base = {
        "task": "vit",
        "optimizers": ("torch-adamw",),
        "steps": 12,
        "seeds": 1,
        "rates": (1e-2,),
        "rank": 4,
        "out": out,
        "batch": 8,
        "validations": 3,
    }
    return RaceSettings(**{**base, **changes})
