"""A small transformer-like model with timm's names, and gradients for it."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, d=24):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, 2 * d), "fc2": nn.Linear(2 * d, d)})

    def forward(self, x):
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["proj"](torch.sigmoid(q * k) * v)
        return x + self.mlp["fc2"](torch.relu(self.mlp["fc1"](x)))


class Net(nn.Module):
    def __init__(self, d=24, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks, self.head = nn.Sequential(Block(d), Block(d)), nn.Linear(d, 4)

    def forward(self, x):
        return self.head(self.blocks(x))


def backward(model, step):
    x, y = sample(step)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def sample(step, count=16, d=24):
    g = torch.Generator().manual_seed(100 + step)
    x = torch.randn(count, d, generator=g)
    return x, x[:, :4].argmax(-1)


class Kept:
    """A sink that remembers."""

    def __init__(self):
        self.rows, self.closed = {}, False

    def write(self, step, values):
        self.rows[step] = dict(values)

    def close(self):
        self.closed = True
