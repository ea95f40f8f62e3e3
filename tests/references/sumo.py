"""SUMO (2505.24749, Algorithm 1), of a real or complex m x n matrix; Q is d x r, of rows when left, else of columns.

    every K steps, from step 0:  Q' = leading singular vectors of g,  M = Q'^H Q M      (0 at step 0)
    z = Q^H g,   M = mu M + z
    O = U V^H   of  M = U S V^H
    O = O gamma |O_last| / |O|   where |O| > gamma |O_last|                   (block 3, optional; not at step 0)
    p = p (1 - lr wd) - lr (g - Q z + c Q O)

c = 0.2 sqrt(max(m, n)): the paper multiplies by sqrt(max(m, n)) as Moonlight does, whose 0.2 this is. The paper lets Q
act on the longer side; either has m r + n r numbers of state.
"""

import math

import torch

from references.algebra import every
from references.side import Side


class Sumo:
    """step(grad) -> parameter; attributes p, q, m, last (|O|), limited (how often block 3 acted)."""

    def __init__(
        self, p, lr, rank, *, mu=0.95, gamma=1.1, weight_decay=0.0, scale=None, rest=1.0, side=None, refresh_at=None,
        find=None,
    ):  # fmt: skip
        self.p, self.lr, self.mu, self.gamma, self.wd, self.rest = p.clone(), lr, mu, gamma, weight_decay, rest
        self.side = Side(p.shape, side)
        self.scale = 0.2 * math.sqrt(max(p.shape)) if scale is None else scale
        self.refresh_at = refresh_at or every(200)
        self.find = find or (lambda g: self.side.leading(g, rank))
        self.m = torch.zeros(self.side.core(rank), dtype=p.dtype)
        self.q, self.last, self.t, self.limited = None, None, 0, 0

    def step(self, g):
        if self.refresh_at(self.t):
            new = self.find(g)
            if self.q is not None:
                r = new.mH @ self.q
                self.m = r @ self.m if self.side.left else self.m @ r.mH
            self.q = new
        z = self.side.project(self.q, g)
        self.m = self.mu * self.m + z
        u, _, vh = torch.linalg.svd(self.m, full_matrices=False)
        o = u @ vh
        size = float(torch.linalg.norm(o))
        if self.last is not None and size > self.gamma * self.last:
            o, self.limited = o * (self.gamma * self.last / size), self.limited + 1
        self.last, self.t = float(torch.linalg.norm(o)), self.t + 1
        outside = g - self.side.lift(self.q, z)
        self.p = self.p * (1 - self.lr * self.wd)
        self.p = self.p - self.lr * (self.rest * outside + self.scale * self.side.lift(self.q, o))
        return self.p
