"""GaLore with AdamW (2403.03507, Algorithm 2), for a real or complex m x n matrix.

    every T steps, from step 0:  G = U S V^H,  P = U[:, :r] when m <= n,  else  Q = V[:, :r]
    R = P^H G   (or G Q)
    M = b1 M + (1-b1) R,  V = b2 V + (1-b2)|R|^2,  N = (M / (1-b1^t)) / (sqrt(V / (1-b2^t)) + eps)
    W = W (1 - lr wd) - lr alpha P N   (or N Q^H)

The moments stay as they are at a refresh, so from the second frame on the result depends on the signs of the singular
vectors, which the paper leaves open. `find(grad) -> P or Q` lets a test hand in the frame of the implementation.
"""

import torch

from references.algebra import every, real_zeros


class GaLore:
    """step(grad) -> parameter; attributes p, frame (P or Q), left, m, v, t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        refresh_at=None,
        scale=0.25,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        side=None,
        find=None,
    ):
        rows, columns = p.shape
        self.p, self.lr, self.betas, self.eps, self.wd, self.scale = p.clone(), lr, betas, eps, weight_decay, scale
        self.left = rows <= columns if side is None else side == "left"
        self.rank = min(rank, rows, columns)
        self.refresh_at = refresh_at or every(200)
        self.find = find or self.exact
        self.frame, self.t = None, 0
        shape = (self.rank, columns) if self.left else (rows, self.rank)
        self.m, self.v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)

    def exact(self, g):
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        return u[:, : self.rank] if self.left else vh.mH[:, : self.rank]

    def step(self, g):
        b1, b2 = self.betas
        if self.refresh_at(self.t):
            self.frame = self.find(g)
        r = self.frame.mH @ g if self.left else g @ self.frame
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * r
        self.v = b2 * self.v + (1 - b2) * (r * r.conj()).real
        n = (self.m / (1 - b1**self.t)) / (torch.sqrt(self.v / (1 - b2**self.t)) + self.eps)
        lifted = self.frame @ n if self.left else n @ self.frame.mH
        self.p = self.p * (1 - self.lr * self.wd)
        self.p = self.p - self.lr * self.scale * lifted
        return self.p
