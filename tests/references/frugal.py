"""FRUGAL with AdamW and signSGD (2411.07837), for a real or complex m x n matrix; U is d x r, left or right.

    every T steps, from step 0:  U = a new frame (singular vectors of g, random, or columns of the identity);
                                 m = v = 0 and t = 0 where the moments are reset (the default)
    z = U^H g  (or g U),   r = g - U z
    m = b1 m + (1-b1) z,  v = b2 v + (1-b2) |z|^2,  d = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    p = p (1 - lr wd) - lr scale (U d + free_scale sgn(r))       sgn(r) = r / |r|, 0 at 0, entry by entry
    state-free SGD:  r in place of sgn(r);  none:  0

t counts the steps since the moments were zeroed, so the bias correction begins anew. Where r vanishes but for rounding
sgn(r) is +-1 all the same: with a full frame other than the identity the update is Adam's plus noise of size lr.
`free_at` is the smallest |r|, relative to the largest |g|, that counts (0 as published).
"""

import torch

from references.algebra import every, real_zeros
from references.side import Side, averages, direction


class Frugal:
    """step(grad) -> parameter; attributes p, u, m, v, t (finished steps), since (steps since the moments were zero)."""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        refresh_at=None,
        scale=1.0,
        free_scale=1.0,
        free="sign",
        free_at=0.0,
        reset=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        side=None,
        find=None,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd = p.clone(), lr, betas, eps, weight_decay
        self.scale, self.free_scale, self.free, self.free_at, self.reset = scale, free_scale, free, free_at, reset
        self.side = Side(p.shape, side)
        rank = min(rank, *p.shape)
        self.refresh_at = refresh_at or every(200)
        self.find = find or (lambda operand, old: self.side.leading(operand, rank))
        shape = self.side.core(rank)
        self.m, self.v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)
        self.u, self.t, self.since = None, 0, 0

    def state_free(self, r, g):
        if self.free == "sign":
            counts = r.abs() > self.free_at * g.abs().max()
            return torch.where(counts, torch.sgn(r), torch.zeros_like(r))
        return r if self.free == "sgd" else torch.zeros_like(r)

    def step(self, g):
        if self.refresh_at(self.t):
            self.u = self.find(g, self.u)
            if self.reset:
                self.m, self.v, self.since = torch.zeros_like(self.m), torch.zeros_like(self.v), 0
        self.t += 1
        self.since += 1
        z = self.side.project(self.u, g)
        r = g - self.side.lift(self.u, z)
        self.m, self.v = averages(self.m, self.v, z, self.betas)
        d = direction(self.m, self.v, self.since, self.betas, self.eps)
        update = self.side.lift(self.u, d) + self.free_scale * self.state_free(r, g)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.scale * update
        return self.p
