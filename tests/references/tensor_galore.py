"""Tensor-GaLore (2501.02379), for a real or complex tensor of any order.

    every T steps, from step 0:  G ~ C x_1 U_1 ... x_N U_N  (Tucker: HOSVD, then sweeps of HOOI)
        HOSVD:  U_n = leading left singular vectors of G_(n)
        HOOI:   U_n = leading left singular vectors of (G x_(k != n) U_k^H)_(n), mode after mode
    R = G x_1 U_1^H ... x_N U_N^H
    M = b1 M + (1-b1) R,  V = b2 V + (1-b2) |R|^2 (real)
    W = W (1 - lr wd) - lr alpha (M / (1-b1^t)) / (sqrt(V / (1-b2^t)) + eps) x_1 U_1 ... x_N U_N

The moments stay as they are at a refresh, so from the second frame on the result depends on the phases of the new
columns, which the paper leaves open. `find(grad, old_factors) -> factors` lets a test hand in those of the
implementation. A rank of None leaves the mode whole.
"""

import torch

from references.algebra import every, hosvd, left_singular, mode_product, real_zeros, unfold


def tucker(ranks, n_iter=10, warm=False):
    """Finder: HOSVD (or the old factors, where warm) followed by n_iter sweeps of HOOI."""

    def find(g, old_factors):
        factors = list(old_factors) if warm and old_factors is not None else hosvd(ranks)(g, None)
        for _ in range(n_iter):
            for n, rank in enumerate(ranks):
                if rank is None:
                    continue
                seen = g
                for k, factor in enumerate(factors):
                    if k != n and factor is not None:
                        seen = mode_product(seen, factor.mH, k)
                factors[n] = left_singular(unfold(seen, n), rank)
        return factors

    return find


class TensorGaLore:
    """step(grad) -> parameter; attributes p, factors, m, v, t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        ranks,
        *,
        refresh_at=None,
        n_iter=10,
        warm=False,
        scale=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        find=None,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd, self.scale = p.clone(), lr, betas, eps, weight_decay, scale
        self.refresh_at = refresh_at or every(200)
        self.find = find or tucker(ranks, n_iter, warm)
        shape = tuple(size if rank is None else rank for rank, size in zip(ranks, p.shape, strict=True))
        self.factors, self.t = None, 0
        self.m, self.v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)

    def project(self, x):
        for n, factor in enumerate(self.factors):
            x = x if factor is None else mode_product(x, factor.mH, n)
        return x

    def lift(self, z):
        for n, factor in enumerate(self.factors):
            z = z if factor is None else mode_product(z, factor, n)
        return z

    def step(self, g):
        b1, b2 = self.betas
        if self.refresh_at(self.t):
            self.factors = self.find(g, self.factors)
        r = self.project(g)
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * r
        self.v = b2 * self.v + (1 - b2) * (r * r.conj()).real
        d = (self.m / (1 - b1**self.t)) / (torch.sqrt(self.v / (1 - b2**self.t)) + self.eps)
        self.p = self.p * (1 - self.lr * self.wd)
        self.p = self.p - self.lr * self.scale * self.lift(d)
        return self.p
