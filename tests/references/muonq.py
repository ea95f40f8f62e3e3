"""MuonQ (2605.11396, Algorithm 1, in 4 bits), for a real m x n matrix; k directions apart.

    M  = b (U' S' + R') + G / |G|            of what was stored; 0 at first
    M  = M / |M|
    V  = S' with rows of unit length         k x n; given at first
    U  = orth(M V^T),  S = U^T M,  R = M - U S
    U' = Q(U) by columns, S' = Q(S) by rows, R' = Q(R) by rows
    p  = p (1 - lr wd) - lr 0.2 sqrt(max(m, n)) orth(M)          Newton-Schulz, of M before it is rounded

Q: c = sgn(x) log(1 + mu |x|) / log(1 + mu), rounded to the nearest of -7, ..., 7 times max |c| / 7, and back.
The authors' code keeps scales in float16; here they are float32, and so is |M| (1 but for rounding), which the library
keeps beside them. A zero gradient adds nothing. The paper has 8 as the most negative code too; no scale reaches it.
"""

import math

import torch

from references.muon import newton_schulz


def quantized(x, mu):
    """By rows."""
    c = x.sgn() * torch.log1p(mu * x.abs()) / math.log1p(mu)
    step = (c.abs().amax(1, keepdim=True) / 7).float().double().clamp_min(torch.finfo(torch.float32).tiny)
    c = (c / step).round() * step
    return c.sgn() * torch.expm1(c.abs() * math.log1p(mu)) / mu


class MuonQ:
    """step(grad) -> parameter; attributes p, u, s, r (as stored), m (what they make)."""

    def __init__(self, p, lr, first, *, momentum=0.95, mu=255.0, eps=1e-7, weight_decay=0.0):
        self.p, self.lr, self.b, self.mu, self.eps, self.wd = p.clone(), lr, momentum, mu, eps, weight_decay
        self.v, self.m = first, torch.zeros_like(p)

    def step(self, g):
        m = self.b * self.m + g / torch.linalg.norm(g).clamp_min(1e-300)
        m = m / torch.linalg.norm(m).clamp_min(1e-300)
        u = torch.linalg.qr(m @ self.v.T)[0]
        s = u.T @ m
        self.u, self.s, self.r = quantized(u.T, self.mu).T, quantized(s, self.mu), quantized(m - u @ s, self.mu)
        self.m = self.u @ self.s + self.r
        self.v = self.s / torch.linalg.norm(self.s, dim=1, keepdim=True)
        size = 0.2 * math.sqrt(max(m.shape))
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * size * newton_schulz(m, eps=self.eps)
        return self.p
