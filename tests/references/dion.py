"""Dion (2504.05295, the centralized Algorithm 1), for a real or complex m x n matrix; Q is n x r.

    B = M + G
    P = orth(B Q),  R = B^H P              (QR; with power_iters > 1, again with Q = R)
    M = B - (1-mu) P R^H                   (error feedback: what P R^H misses stays whole in M)
    Q = R with column j divided by |R_j| + eps
    p = p (1 - lr wd) - lr sqrt(m/n) P Q^H          (the new Q)

B = 0 is no information: P Q^H is taken as 0 and Q is kept (QR of 0 would invent directions and then erase Q).
Orth-Dion (2605.16341) changes one line: Q = orth(R) instead of the columns' lengths, QR with a positive diagonal (with
any other sign an update would climb).
Signs of QR's columns cancel: P D, R D, Q D give the same P R^H and P Q^H, and D does not move the next span.
"""

import math

import torch


class Dion:
    """step(grad) -> parameter; attributes p, m, q, t (finished steps); `q` is the initial n x r matrix."""

    def __init__(self, p, lr, q, *, mu=0.95, eps=1e-8, weight_decay=0.0, power_iters=1, orthonormal=False):
        self.p, self.lr, self.q, self.mu, self.eps, self.wd = p.clone(), lr, q.clone(), mu, eps, weight_decay
        self.power_iters, self.orthonormal = power_iters, orthonormal
        self.m, self.t = torch.zeros_like(p), 0

    def power_iteration(self, b):
        q = self.q
        for _ in range(self.power_iters):
            left = torch.linalg.qr(b @ q)[0]
            q = b.mH @ left
        return left, q

    def step(self, g):
        rows, columns = self.p.shape
        b = self.m + g
        update = torch.zeros_like(b)
        self.m = b
        if torch.any(b != 0):
            left, right = self.power_iteration(b)
            self.m = b - (1 - self.mu) * left @ right.mH
            self.q = right / (torch.linalg.norm(right, dim=0, keepdim=True) + self.eps)
            if self.orthonormal:
                self.q, t = torch.linalg.qr(right)
                self.q = self.q * t.diagonal().sgn()
            update = left @ self.q.mH
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * math.sqrt(rows / columns) * update
        self.t += 1
        return self.p
