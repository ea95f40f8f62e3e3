"""AdamS (2505.16363): the normalizer is made of the momentum of the step before and the gradient of this one.

v = b2 |m|^2 + (1-b2) |g|^2
m = b1 m + (1-b1) g
p = p (1 - lr wd) - lr m / (sqrt(v) + eps)          no bias correction
"""

import torch


class AdamS:
    """step(grad) -> parameter; attributes p, m."""

    def __init__(self, p, lr, *, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        self.p, self.lr, self.betas, self.eps, self.wd = p.clone(), lr, betas, eps, weight_decay
        self.m = torch.zeros_like(p)

    def step(self, g):
        b1, b2 = self.betas
        v = b2 * (self.m * self.m.conj()).real + (1 - b2) * (g * g.conj()).real
        self.m = b1 * self.m + (1 - b1) * g
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.m / (v.sqrt() + self.eps)
        return self.p
