"""Lion, "Symbolic discovery of optimization algorithms" (2302.06675, Algorithm 2).

c = b1 m + (1-b1) g
p = p (1 - lr wd) - lr unit(c)           unit(c) = c/|c|, 0 at 0: the sign of a real c, the phase of a complex one
m = b2 m + (1-b2) g                      (after the update: m of the previous step enters c)
"""

import torch


def unit(x):
    """x/|x|, and 0 at 0."""
    size = x.abs()
    return torch.where(size > 0, x / torch.where(size > 0, size, torch.ones_like(size)), torch.zeros_like(x))


class Lion:
    """step(grad) -> parameter; attributes p, m, t (finished steps)."""

    def __init__(self, p, lr=1e-4, *, betas=(0.9, 0.99), weight_decay=0.0):
        self.p, self.lr, self.betas, self.wd = p.clone(), lr, betas, weight_decay
        self.m, self.t = torch.zeros_like(p), 0

    def step(self, g):
        b1, b2 = self.betas
        c = b1 * self.m + (1 - b1) * g
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * unit(c)
        self.m = b2 * self.m + (1 - b2) * g
        self.t += 1
        return self.p
