"""Subset-Norm with Subspace-Momentum (arXiv 2411.07120) for m x n matrices.

every k steps:  U = the leading singular vectors of g on the short side, and the momentum begins anew
m   = b1 m + (1-b1) U^H g              (g U^* etc. for the right side)
b_i^2 = b_i^2 + |g_i|^2                g_i the rows of a matrix with m >= n, else its columns
W   = W (1 - lr wd) - lr alpha (U m + g - U U^H g) / (b + eps)

With `decay` b_i^2 = (1-decay) (sum over s of decay^(t-s) |g_i,s|^2) / (1 - decay^t): the Adam variant, with the bias
correction of v alone. The authors' code zeroes the momentum a step late, after it has been used in coordinates of the
new basis; the paper restarts it. `limit` on the entries of the update is comoving's.
"""

import torch

from references.algebra import every, real_zeros
from references.side import Side


class Snsm:
    """step(grad) -> parameter; attributes p, u, m, squares, t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        refresh_at=None,
        scale=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        decay=None,
        limit=None,
        find=None,
    ):
        self.p, self.lr, self.b1, self.eps, self.wd, self.scale = p.clone(), lr, betas[0], eps, weight_decay, scale
        self.side, self.rank, self.decay, self.limit = Side(p.shape), rank, decay, limit
        self.refresh_at, self.find = refresh_at or every(200), find or (lambda g: self.side.leading(g, rank))
        self.across = 1 if p.shape[0] >= p.shape[1] else 0  # the dimension that is summed over
        self.squares, self.t = real_zeros(max(p.shape)), 0
        self.u = self.m = None

    def step(self, g):
        if self.refresh_at(self.t):
            self.u, self.m = self.find(g), torch.zeros(self.side.core(self.rank), dtype=g.dtype)
        self.t += 1
        z = self.side.project(self.u, g)
        self.m = self.b1 * self.m + (1 - self.b1) * z
        own = (g.abs() ** 2).sum(self.across)
        if self.decay is None:
            self.squares = self.squares + own
            mean = self.squares
        else:
            self.squares = self.decay * self.squares + (1 - self.decay) * own
            mean = self.squares / (1 - self.decay**self.t)
        b = torch.sqrt(mean).unsqueeze(self.across) + self.eps
        update = (self.side.lift(self.u, self.m) + g - self.side.lift(self.u, z)) / b
        if self.limit is not None:
            update = update / (update.abs() / self.limit).clamp_min(1)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.scale * update
        return self.p
