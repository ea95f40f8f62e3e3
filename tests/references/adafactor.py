"""Adafactor (1804.04235, Algorithms 4 and 5), for a real or complex tensor of any order N.

At step t = 1, 2, ..., with s = |g|^2 + eps1 (real):

    b2_t  = 1 - t^decay                             (decay < 0, so b2_1 = 0; or a constant b2)
    r_n   = b2_t r_n + (1-b2_t) mean of s over every mode but n                      n = 1..N
    V_hat = r_1 (x) ... (x) r_N / mean^(N-1)        (mean = the mean of any r_n: they all agree)
    V_hat = V_hat / (1 - b2^t)                      (constant b2 only)
    u     = g / sqrt(V_hat)                         (0 where V_hat = 0, which needs eps1 = 0)
    u     = u / max(1, RMS(u)/d)                    (d is not None)
    m     = b1 m + (1-b1) u,  u = m                 (b1 > 0; the clipped update is averaged, without bias correction)
    p     = p (1 - lr wd) - alpha u                 alpha = lr, or lr max(eps2, RMS(p)) if eps2 is not None

For a matrix V_hat is the paper's R C / (1^T R), sums being means times the sizes. A vector keeps the whole V.
With momentum_on="gradient": m = b1 m + (1-b1) g, and u = m/(1-b1^t) / sqrt(V_hat) before the clipping.
"""

import math

import torch

from references.algebra import real_zeros


def mean_of_mode(x, mode):
    """The mean of the slices of index i of the mode, as a vector over i."""
    return x.movedim(mode, 0).reshape(x.shape[mode], -1).mean(dim=1)


def outer(vectors):
    """v_1 (x) ... (x) v_N."""
    big = torch.ones((), dtype=vectors[0].dtype)
    for vector in vectors:
        big = big.unsqueeze(-1) * vector
    return big


def rms(x):
    return math.sqrt(float((x * x.conj()).real.mean()))


class Adafactor:
    """step(grad) -> parameter; attributes p, factors (r_1 .. r_N), m (None without b1), t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        *,
        decay=-0.8,
        b2=None,
        b1=0.0,
        eps1=1e-30,
        eps2=None,
        d=1.0,
        weight_decay=0.0,
        momentum_on="update",
    ):
        self.p, self.lr, self.decay, self.b2, self.b1 = p.clone(), lr, decay, b2, b1
        self.eps1, self.eps2, self.d, self.wd, self.momentum_on = eps1, eps2, d, weight_decay, momentum_on
        self.factors = [real_zeros((size,)) for size in p.shape]
        self.m = torch.zeros_like(p) if b1 > 0 else None
        self.t = 0

    def second_moment(self):
        """V_hat, without the bias correction."""
        mean = self.factors[0].mean()
        if mean == 0:
            return real_zeros(self.p.shape)
        return mean * outer([r / mean for r in self.factors])

    def step(self, g):
        self.t += 1
        b2 = 1 - self.t**self.decay if self.b2 is None else self.b2
        s = (g * g.conj()).real + self.eps1
        self.factors = [b2 * r + (1 - b2) * mean_of_mode(s, n) for n, r in enumerate(self.factors)]
        v = self.second_moment()
        if self.b2 is not None:
            v = v / (1 - self.b2**self.t)

        top = g
        if self.b1 > 0 and self.momentum_on == "gradient":
            self.m = self.b1 * self.m + (1 - self.b1) * g
            top = self.m / (1 - self.b1**self.t)
        u = torch.where(v > 0, top / torch.sqrt(torch.where(v > 0, v, torch.ones_like(v))), torch.zeros_like(g))
        if self.d is not None:
            u = u / max(1.0, rms(u) / self.d)
        if self.b1 > 0 and self.momentum_on == "update":
            self.m = self.b1 * self.m + (1 - self.b1) * u
            u = self.m

        alpha = self.lr if self.eps2 is None else self.lr * max(self.eps2, rms(self.p))
        self.p = self.p * (1 - self.lr * self.wd) - alpha * u
        return self.p
