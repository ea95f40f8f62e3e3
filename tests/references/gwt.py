"""GWT (arXiv 2501.07237): Adam on the approximation coefficients of an l-level Haar transform along the last mode.

A, D_1, ..., D_l = haar(g):   a level takes neighbours (a, b) to (a + b) / sqrt(2), the next A, and (a - b) / sqrt(2)
M = b1 M + (1-b1) A,   V = b2 V + (1-b2) |A|^2
A' = M / (sqrt(V) + eps'),   D_k' = D_k / (sqrt(V) + eps'), each D_k by the V of the run of 2^l entries that it lies in
A', D' divided by max(|A'| / (last + 1e-8), growth) / growth, |A'| after it the next last       (authors' code; Fira's)
W = W (1 - lr wd) - lr alpha sqrt(1-b2^t) / (1-b1^t) haar^-1(A', D')

eps' = sqrt(1-b2^t) eps is comoving's, which corrects V before eps is added; so is `limit` on the entries of the lifted
details, with the bias corrections.
"""

import torch

from references.algebra import real_zeros


def haar(x, levels):
    """A and the details, the finest first."""
    details = []
    for _ in range(levels):
        even, odd = x[..., 0::2], x[..., 1::2]
        x, detail = (even + odd) / 2**0.5, (even - odd) / 2**0.5
        details.append(detail)
    return x, details


def inverse(x, details):
    for detail in reversed(details):
        x = torch.stack([(x + detail) / 2**0.5, (x - detail) / 2**0.5], -1).flatten(-2)
    return x


class Gwt:
    """step(grad) -> parameter; attributes p, m, v, last (the norm that is limited), t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        levels,
        *,
        scale=0.25,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        growth=1.01,
        limit=None,
        raw_eps=False,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd, self.scale = p.clone(), lr, betas, eps, weight_decay, scale
        self.levels, self.growth, self.limit, self.raw_eps, self.last, self.t = levels, growth, limit, raw_eps, None, 0
        self.m = torch.zeros((*p.shape[:-1], p.shape[-1] >> levels), dtype=p.dtype)
        self.v = real_zeros(self.m.shape)

    def step(self, g):
        b1, b2 = self.betas
        self.t += 1
        a, details = haar(g, self.levels)
        self.m = b1 * self.m + (1 - b1) * a
        self.v = b2 * self.v + (1 - b2) * a.abs() ** 2
        root = (1 - b2**self.t) ** 0.5
        corrections = root / (1 - b1**self.t)
        denominator = torch.sqrt(self.v) + self.eps * (1 if self.raw_eps else root)
        a = self.m / denominator
        divided = []
        for detail in reversed(details):  # the coarsest has as many coefficients as A
            divided.insert(0, detail / denominator)
            denominator = denominator.repeat_interleave(2, -1)
        inside, outside = inverse(a, [0 * d for d in divided]), inverse(0 * a, divided)
        if self.limit is not None:
            sizes = outside.abs() * corrections
            outside = outside / (sizes / self.limit).clamp_min(1)
        limiter = 1.0
        if self.growth is not None:
            size = float(torch.linalg.norm(a))
            if self.last is not None:
                limiter = max(size / (self.last + 1e-8), self.growth) / self.growth
            self.last = size / limiter
        update = corrections * (inside + outside) / limiter
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.scale * update
        return self.p
