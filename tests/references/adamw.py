"""AdamW, "Decoupled weight decay regularization" (1711.05101, Algorithm 2), for real and complex parameters.

m = b1 m + (1-b1) g            v = b2 v + (1-b2) |g|^2   (real)
d = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
p = p (1 - lr wd) - lr d
"""

import torch

from references.algebra import real_zeros


class AdamW:
    """step(grad) -> parameter; attributes p, m, v, t (finished steps)."""

    def __init__(self, p, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.p, self.lr, self.betas, self.eps, self.wd = p.clone(), lr, betas, eps, weight_decay
        self.m, self.v, self.t = torch.zeros_like(p), real_zeros(p.shape), 0

    def step(self, g):
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * (g * g.conj()).real
        m_hat = self.m / (1 - b1**self.t)
        v_hat = self.v / (1 - b2**self.t)
        d = m_hat / (torch.sqrt(v_hat) + self.eps)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * d
        return self.p
