"""Shampoo (1802.09568, Algorithm 2; averages and grafting of 2309.06497), real or complex tensor of order N >= 1.

At step t = 1, 2, ..., for every mode n, G_(n) being the unfolding of the gradient:

    L_n = L_n + G_(n) G_(n)^H                       (b2=None; the paper's L_0 = eps I is the eps below)
    L_n = b2 L_n + (1-b2) G_(n) G_(n)^H,  L_hat = L_n/(1-b2^t)              (otherwise)
    A_n = (L_hat_n + eps I)^-power                  (at t = 1 and then every `period` steps; power = 1/(2N))
    m   = b1 m + (1-b1) g,  m_hat = m/(1-b1^t)      (m_hat = g with b1 = 0; the L_n see the gradient itself)
    u   = m_hat x_1 A_1 ... x_N A_N
    u   = u |a|/|u|,  a = m_hat / (sqrt(v/(1-graft_b2^t)) + graft_eps)      (graft="adam", v the mean of |g|^2)
    p   = p (1 - lr wd) - lr u

A mode longer than max_size keeps diag(L_n) only, hence a diagonal A_n. N counts every mode, diagonal ones included.
Since A_n belongs to mode n, a matrix's columns get the root of the second unfolding, conj(G^H G): u = A_1 m A_2^T.
"""

import torch

from references.algebra import every, mode_product, real_zeros, unfold


def inverse_power(matrix, eps, power):
    """(L + eps I)^-power of a positive semi-definite L; a vector is the diagonal of a diagonal L."""
    if matrix.ndim == 1:
        return torch.diag((matrix + eps) ** -power)
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag((values.clamp(min=0) + eps) ** -power).to(vectors.dtype) @ vectors.mH


class Shampoo:
    """step(grad) -> parameter; attributes p, stats (L_n, or its diagonal as a vector), roots (A_n), m, v, t."""

    def __init__(
        self,
        p,
        lr,
        *,
        b1=0.0,
        b2=None,
        eps=1e-6,
        power=None,
        period=1,
        refresh_at=None,
        max_size=None,
        graft=None,
        graft_b2=0.999,
        graft_eps=1e-8,
        weight_decay=0.0,
    ):
        self.p, self.lr, self.b1, self.b2, self.eps, self.wd = p.clone(), lr, b1, b2, eps, weight_decay
        self.power = 1 / (2 * p.ndim) if power is None else power
        self.refresh_at = refresh_at or every(period)
        self.graft, self.graft_b2, self.graft_eps = graft, graft_b2, graft_eps
        whole = [max_size is None or size <= max_size for size in p.shape]
        self.stats = [
            torch.zeros(size, size, dtype=p.dtype) if w else real_zeros((size,))
            for size, w in zip(p.shape, whole, strict=True)
        ]
        self.roots = [None] * p.ndim
        self.m, self.v, self.t = torch.zeros_like(p), real_zeros(p.shape), 0

    def step(self, g):
        refresh = self.refresh_at(self.t)
        self.t += 1
        keep, add = (1.0, 1.0) if self.b2 is None else (self.b2, 1 - self.b2)
        correction = 1.0 if self.b2 is None else 1 - self.b2**self.t
        for n, stat in enumerate(self.stats):
            full = unfold(g, n) @ unfold(g, n).mH
            self.stats[n] = keep * stat + add * (full if stat.ndim == 2 else full.diagonal().real)
            if refresh:
                self.roots[n] = inverse_power(self.stats[n] / correction, self.eps, self.power)

        self.m = self.b1 * self.m + (1 - self.b1) * g
        m_hat = self.m / (1 - self.b1**self.t)
        u = m_hat
        for n, root in enumerate(self.roots):
            u = mode_product(u, root.to(u.dtype), n)

        self.v = self.graft_b2 * self.v + (1 - self.graft_b2) * (g * g.conj()).real
        if self.graft == "adam" and torch.any(u != 0):
            a = m_hat / (torch.sqrt(self.v / (1 - self.graft_b2**self.t)) + self.graft_eps)
            u = u * (torch.linalg.norm(a) / torch.linalg.norm(u))
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * u
        return self.p
