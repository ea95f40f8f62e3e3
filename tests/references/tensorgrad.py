"""TensorGRaD (2501.02379v2), for a real or complex tensor of any order: a sparse and a Tucker part of the gradient.

    every T steps, from step 0, from the operand of each part:
        Omega = the k largest |entries|, k = ceil(density x entries), ascending;   U_n = Tucker factors
    sparse first (the paper's order):    x = g on Omega,   r = g - scatter(x),   y = r x_1 U_1^H ... x_N U_N^H
    low rank first:                      y = g x_n U_n^H,  r = g - y x_n U_n,    x = r on Omega
    both of g ("sum"):                   x = g on Omega,   y = g x_n U_n^H       (what they share is counted twice)
    m_L, v_L and m_S, v_S: Adam's moments of y and of x, |.|^2 real, one count of steps t
    d = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)       of either part
    p = p (1 - lr wd) - lr (scale d_L x_1 U_1 ... x_N U_N + sparse_scale scatter(d_S))

At a refresh the moments of the core stay as they are, and those of Omega too: the i-th smallest old index hands its
moments to the i-th smallest new one ("keep", the published default), or they are zeroed ("reset", its option; t goes
on), or they follow their entry, newcomers starting from zero ("match", not published). The published code takes
k = max(1, floor(density x entries)), adds eps before the bias correction, m / (sqrt(v) + eps) (`corrected=False`), and
where sparse_scale is not given takes the ratio of the parts' sizes, k / core entries (`sparse_scale=None`).
"""

import math

import torch

from references.algebra import every, mode_product, real_zeros
from references.side import averages, direction, uncorrected
from references.tensor_galore import tucker


def largest(operand, k):
    """The k largest entries in magnitude, as ascending indices of the flattened (row-major) tensor."""
    return torch.topk(operand.flatten().abs(), k).indices.sort().values


class TensorGRaD:
    """step(grad) -> parameter; attributes p, factors, indices, low and sparse ([m, v] of the core, on Omega), t."""

    def __init__(
        self,
        p,
        lr,
        ranks,
        *,
        k=None,
        density=0.05,
        refresh_at=None,
        order="sparse_first",
        scale=1.0,
        sparse_scale=1.0,
        sparse_moments="keep",
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        corrected=True,
        n_iter=10,
        find=None,
        select=None,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd = p.clone(), lr, betas, eps, weight_decay
        self.k = math.ceil(density * p.numel()) if k is None else k
        shape = tuple(size if rank is None else rank for rank, size in zip(ranks, p.shape, strict=True))
        self.scale = scale
        self.sparse_scale = self.k / math.prod(shape) if sparse_scale is None else sparse_scale
        self.order, self.sparse_moments, self.corrected = order, sparse_moments, corrected
        self.refresh_at = refresh_at or every(1000)
        self.find, self.select = find or tucker(ranks, n_iter), select or largest
        self.factors, self.indices, self.t = None, None, 0
        self.low = [torch.zeros(shape, dtype=p.dtype), real_zeros(shape)]
        self.sparse = [torch.zeros(self.k, dtype=p.dtype), real_zeros(self.k)]

    def project(self, x):
        for n, factor in enumerate(self.factors):
            x = x if factor is None else mode_product(x, factor.mH, n)
        return x

    def lift(self, z):
        for n, factor in enumerate(self.factors):
            z = z if factor is None else mode_product(z, factor, n)
        return z

    def gather(self, x):
        return x.flatten()[self.indices]

    def scatter(self, x):
        full = torch.zeros(self.p.numel(), dtype=x.dtype)
        full[self.indices] = x
        return full.reshape(self.p.shape)

    def reselect(self, operand):
        old, self.indices = self.indices, self.select(operand, self.k)
        if old is None or self.sparse_moments == "keep":
            return
        moments = [torch.zeros_like(x) for x in self.sparse]
        if self.sparse_moments == "match":
            place = {int(index): i for i, index in enumerate(old)}
            for i, index in enumerate(self.indices):
                if int(index) in place:
                    for new, before in zip(moments, self.sparse, strict=True):
                        new[i] = before[place[int(index)]]
        self.sparse = moments

    def low_part(self, operand, refresh):
        if refresh:
            self.factors = self.find(operand, self.factors)
        return self.project(operand)

    def sparse_part(self, operand, refresh):
        if refresh:
            self.reselect(operand)
        return self.gather(operand)

    def split(self, g, refresh):
        if self.order == "sparse_first":
            x = self.sparse_part(g, refresh)
            return self.low_part(g - self.scatter(x), refresh), x
        y = self.low_part(g, refresh)
        return y, self.sparse_part(g if self.order == "sum" else g - self.lift(y), refresh)

    def adam(self, moments, z):
        moments[:] = averages(*moments, z, self.betas)
        if self.corrected:
            return direction(*moments, self.t, self.betas, self.eps)
        d, c = uncorrected(*moments, self.t, self.betas, self.eps)
        return c * d

    def step(self, g):
        y, x = self.split(g, self.refresh_at(self.t))
        self.t += 1
        low, sparse = self.adam(self.low, y), self.adam(self.sparse, x)
        self.p = self.p * (1 - self.lr * self.wd)
        self.p = self.p - self.lr * (self.scale * self.lift(low) + self.sparse_scale * self.scatter(sparse))
        return self.p
