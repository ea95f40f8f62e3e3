"""A small network with the layers of a transformer, and how it is trained here."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x)))


def network(width=8, blocks=2, seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*[Block(width) for _ in range(blocks)], nn.Linear(width, 3)).to(dtype)


def batch(number=0, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(4, 5, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (4, 5), generator=generator)


def backward(model, number=0):
    p = next(model.parameters())
    x, y = batch(number, dtype=p.dtype)
    model.zero_grad()
    loss = F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
    loss.backward()
    return loss.detach()


def train(model, optimizer, steps, first=0, scheduler=None):
    for number in range(first, first + steps):
        backward(model, number)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model
