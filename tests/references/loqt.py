"""LoQT (2405.16528, Algorithm 1) for a real m x n matrix, W = Q + s P B where m <= n, else W = Q + s B P^T.

    steps T_0 = 0, T_1 = tau (or a phase below it), T_{k+1} = T_k + tau + floor(psi^k):
        W = Q + s P B;  P = the leading r left (right) singular vectors of G;  Q, B from W:
        X = W, then C + 1 times:  Q = q(X),  B = P^T (W - Q) / s,  X = W - s P B;  the pair of least |W - Q - s P B|
        nothing else: no step of the optimizer
    other steps, the gradient of B being s P^T G:
        B = B - lr N(s P^T G),  N Adam's direction, with t the number of these steps
        W is multiplied by 1 - lr wd before (the paper's AdamW would decay B alone; its runs have wd = 0)

The moments stay as they are at a merge, as the authors' code has it. q rounds blocks of b consecutive numbers of a row
to step * level, with step = max|x| as float32 holds it: to the nearest of the 16 levels of NF4. `find(grad) -> P` lets
a test hand in the frame of an implementation; P is not quantized here.
"""

import torch
from scipy.stats import norm

from references.algebra import real_zeros
from references.q_galore import in_blocks, single


def nf4():
    """QLoRA's levels: quantiles of the normal distribution, eight from 0 up, seven below 0, scaled to [-1, 1]."""
    above = norm.ppf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64).numpy())[:-1]
    below = -norm.ppf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64).numpy())[:-1]
    return torch.tensor(sorted([*above, *below, 0.0]), dtype=torch.float64) / above[0]


LEVELS = nf4()


def steps(values):
    return torch.full_like(values, single(float(values.abs().max())))


def coded(x, block):
    """Levels and steps of every number."""
    step = in_blocks(x, block, steps)
    return LEVELS[((x / step)[..., None] - LEVELS).abs().argmin(-1)], step


class LoQT:
    """step(grad) -> W; attributes q, b, p (the projection), m, v, t (steps of the optimizer), now, merges."""

    def __init__(self, w, lr, rank, *, tau, psi, phase=0, scale=0.5, compensate=5, block=64, betas=(0.9, 0.999),
                 eps=1e-8, weight_decay=0.0, find=None):  # fmt: skip
        rows, columns = w.shape
        self.left, self.rank, self.block = rows <= columns, rank, block
        self.lr, self.tau, self.psi, self.phase, self.scale, self.compensate = lr, tau, psi, phase, scale, compensate
        self.betas, self.eps, self.wd, self.find = betas, eps, weight_decay, find or self.exact
        shape = (rank, columns) if self.left else (rows, rank)
        self.m, self.v, self.t, self.now, self.next, self.merges = real_zeros(shape), real_zeros(shape), 0, 0, 0, []
        self.codes, self.p, self.b = coded(w, block), None, None

    def exact(self, g):
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        return u[:, : self.rank] if self.left else vh.mT[:, : self.rank]

    def lift(self, b):
        return self.scale * (self.p @ b if self.left else b @ self.p.mT)

    def project(self, x):
        return self.p.mT @ x if self.left else x @ self.p

    @property
    def q(self):
        return self.codes[0] * self.codes[1]

    @property
    def w(self):
        return self.q if self.p is None else self.q + self.lift(self.b)

    def merge(self, g):
        w = self.w
        self.p = self.find(g)
        best, x = None, w
        for _ in range(self.compensate + 1):
            self.codes = coded(x, self.block)
            self.b = self.project(w - self.q) / self.scale
            x = w - self.lift(self.b)
            error = torch.linalg.norm(x - self.q)
            if best is None or error < best[0]:
                best = error, self.codes, self.b
        _, self.codes, self.b = best

    def step(self, g):
        if self.now == self.next:
            self.merge(g)
            k = len(self.merges)
            self.merges.append(self.now)
            self.next += (self.phase or self.tau) if k == 0 else self.tau + int(self.psi**k)
        else:
            b1, b2 = self.betas
            z = self.scale * self.project(g)
            self.t += 1
            self.m = b1 * self.m + (1 - b1) * z
            self.v = b2 * self.v + (1 - b2) * z**2
            n = (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
            shrink = 1 - self.lr * self.wd
            levels, step = self.codes
            self.codes = levels, (step.float() * torch.tensor(shrink, dtype=torch.float32)).double()
            self.b = self.b * shrink - self.lr * n
        self.now += 1
        return self.w
