"""Streams of small gradients with a few strong directions."""

import torch

from comoving.bench.gradients import Stream

SHAPES = [(24, 16), (16, 24), (8, 9, 10)]


def stream(shape, steps):
    generator = torch.Generator().manual_seed(3)
    weights = 0.5 ** torch.arange(shape[0])
    strong = weights[:, None] * torch.randn(shape[0], shape[0], generator=generator)
    mix = torch.randn((shape[0], *shape[1:]), generator=generator)
    made = [torch.tensordot(strong, mix + 0.2 * torch.randn(mix.shape, generator=generator), 1) for _ in range(steps)]
    return Stream(str(shape), made, 4)
