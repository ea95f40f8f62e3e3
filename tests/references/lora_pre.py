"""LoRA-Pre (2602.24283) for Adam and for Muon, of a real or complex m x n matrix G.

    B = (1 - g) B + g G A^H (A A^H)^-1,   A = (1 - g) A + g (B^H B)^-1 B^H G        with the new B; B = 0 at first
    Adam:  1 - g = b1^(1/2) for B A of G, (b2)^(1/4) for C D of |G|
           m = b1 B A + (1 - b1) G,  v = b2 (C D)^2 + (1 - b2) |G|^2
           p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    Muon:  1 - g = b^(1/2),  m = b B A + (1 - b) G,  p = p (1 - lr wd) - lr scale orth(m)

`newest=False` leaves the newest gradient out: m = B A, v = (C D)^2. A and D begin with what is given, k x n.
"""

import torch

from references.muon import polar
from references.side import square


class Factors:
    """B (m x k) and A (k x n) of a moment."""

    def __init__(self, start, rows):
        self.b, self.a = torch.zeros(rows, start.shape[0], dtype=start.dtype), start.clone()

    def fit(self, g, gamma):
        a = self.a
        self.b = (1 - gamma) * self.b + gamma * g @ a.mH @ torch.linalg.inv(a @ a.mH)
        b = self.b
        self.a = (1 - gamma) * a + gamma * torch.linalg.inv(b.mH @ b) @ b.mH @ g
        return self.b @ self.a


class LoraPreAdam:
    def __init__(self, p, lr, start, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, newest=True):
        self.p, self.lr, self.betas, self.eps, self.wd, self.newest = p.clone(), lr, betas, eps, weight_decay, newest
        self.first, self.second = Factors(start, p.shape[0]), Factors(start.real, p.shape[0])
        self.t = 0

    def step(self, g):
        (b1, b2), self.t = self.betas, self.t + 1
        m, v = self.first.fit(g, 1 - b1**0.5), self.second.fit(g.abs(), 1 - b2**0.25) ** 2
        if self.newest:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * square(g)
        d = (m / (1 - b1**self.t)) / (torch.sqrt(v / (1 - b2**self.t)) + self.eps)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * d
        return self.p


class LoraPreMuon:
    def __init__(self, p, lr, start, *, beta=0.95, scale=1.0, weight_decay=0.0, newest=True):
        self.p, self.lr, self.beta, self.scale, self.wd, self.newest = p.clone(), lr, beta, scale, weight_decay, newest
        self.first = Factors(start, p.shape[0])

    def step(self, g):
        m = self.first.fit(g, 1 - self.beta**0.5)
        m = self.beta * m + (1 - self.beta) * g if self.newest else m
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.scale * polar(m)
        return self.p
