"""DCT-AdamW (2505.17967), for a real or complex m x n matrix; Q (d x d) is a fixed real orthogonal matrix.

    a = g + e                                        (e = 0 without error feedback, which is not the default)
    every T steps, from step 0:  S = a Q  (or Q^T a);  I = the r columns (rows) of S of largest l1 (or l2) norm
        R = Q_I_old^T Q_I,  m = m R,  v = |v R|      (right; left: R = Q_I^T Q_I_old, m = R m, v = |R v|), if rotated
    z = a Q_I  (or Q_I^T a),   e = a - z Q_I^T  (or a - Q_I z)
    m = b1 m + (1-b1) z,  v = b2 v + (1-b2) |z|^2,  d = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    p = p (1 - lr wd) - lr d Q_I^T  (or Q_I d)

R is a partial permutation: a column that stays selected keeps its moments wherever it lands, a new one starts from zero
(with the bias correction of the old t), a column that leaves loses its own. Unrotated moments stay in their slots,
whatever column comes there. Q is the matrix Q_ij = sqrt(2/d) cos(i (2j+1) pi / 2d), row 0 over sqrt 2, ("dct3", as in
the published code with products), or its transpose, whose columns are the cosines themselves ("dct2", as there with the
FFT), or any other given. The published code takes the right side of a square matrix, keeps e in 8 or 4 bits (here
exactly), and refreshes at t = 0 and t + 1 = 0 mod T.
"""

import math

import torch

from references.algebra import every, real_zeros
from references.side import Side, averages, direction


def dct3(size):
    """Q_ij = sqrt(2/d) cos(i (2j+1) pi / 2d), the first row over sqrt 2."""
    q = torch.empty(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            q[i, j] = math.sqrt((1 if i == 0 else 2) / size) * math.cos(math.pi * i * (2 * j + 1) / (2 * size))
    return q


def largest(norms, rank):
    """Indices of the largest norms, in descending order of the norms."""
    return torch.topk(norms, rank).indices


class DctAdamW:
    """step(grad) -> parameter; attributes p, q, indices, u (= Q_I), m, v, e, t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        refresh_at=None,
        basis="dct3",
        norm=1,
        rotate=True,
        error_feedback=False,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        side=None,
        select=largest,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd = p.clone(), lr, betas, eps, weight_decay
        self.side = Side(p.shape, side)
        self.rank = min(rank, self.side.size)
        if isinstance(basis, str):
            basis = dct3(self.side.size).mT if basis == "dct2" else dct3(self.side.size)
        self.q = basis.to(p.dtype)
        self.norm, self.rotate, self.error_feedback, self.select = norm, rotate, error_feedback, select
        self.refresh_at = refresh_at or every(1)
        shape = self.side.core(self.rank)
        self.m, self.v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)
        self.e, self.indices, self.u, self.t = torch.zeros_like(p), None, None, 0

    def norms(self, a):
        s = self.side.project(self.q, a).abs()
        return (s**self.norm).sum(1 if self.side.left else 0) ** (1 / self.norm)

    def rotated(self, old):
        r = self.u.mH @ old  # new x old
        if self.side.left:
            return r @ self.m, (r.real @ self.v).abs()
        return self.m @ r.mH, (self.v @ r.real.mT).abs()

    def step(self, g):
        a = g + self.e
        if self.refresh_at(self.t):
            old = self.u
            self.indices = self.select(self.norms(a), self.rank)
            self.u = self.q[:, self.indices]
            if old is not None and self.rotate:
                self.m, self.v = self.rotated(old)
        z = self.side.project(self.u, a)
        if self.error_feedback:
            self.e = a - self.side.lift(self.u, z)
        self.t += 1
        self.m, self.v = averages(self.m, self.v, z, self.betas)
        d = direction(self.m, self.v, self.t, self.betas, self.eps)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.side.lift(self.u, d)
        return self.p
