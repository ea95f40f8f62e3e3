"""Flora (2402.03293), for a real or complex m x n matrix; U (d x r, the paper's A^H) is any matrix, left or right.

Accumulation (Algorithm 1), tau gradients to a step:
    U = a new draw at the first gradient of a window;  c = sum of U^H g_i  (or g_i U);  h = U c / tau  (or c U^H / tau)
    without it h = g. (With tau = 1 the gradient is compressed still.)
Base:
    sgd:        w = h
    adafactor:  b2t = 1 - t^-0.8, q = |h|^2 + 1e-30, R = b2t R + (1-b2t) mean_j q_ij, C = b2t C + (1-b2t) mean_i q_ij,
                w_ij = h_ij / sqrt(R_i C_j / mean R)
Momentum (Algorithm 2), t = finished steps, every kappa steps, from step 0:
    U' = a new draw,  m = U'^H U m  (or m U^H U')        the paper's m A_old A_new^T; no bias correction
    m = b m + (1-b) U'^H w (or w U'),   u = U' m  (or m U'^H)                                 ("compressed", the paper)
    u = b U m_old + (1-b) w with the old U and m, then m as above                      ("exact", the published code)
adafactor ends with u = u / max(1, rms(u) / clip) and lr = lr max(1e-3, rms(p)) where the step is relative.
    p = p (1 - lr wd) - lr u

The paper's algorithms leave the base open and its experiments take Adafactor; U is Gaussian of variance 1/r, so that
E[U U^H] = I and U m is unbiased: orthonormal U of rank r shrinks m by r/d on average at every redraw. The published
code redraws at t + 1 = 0 mod kappa, sums without the division by tau, and takes the right side of a square matrix.
"""

import math

import torch

from references.algebra import every, real_zeros
from references.apollo import gaussian
from references.side import Side, square


def rms(x):
    return float(torch.linalg.norm(x)) / math.sqrt(x.numel())


class Flora:
    """step(grad) -> parameter (unchanged within a window); p, u, m, row, column, accumulator_u, c, count, t"""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        beta=0.9,
        refresh_at=None,
        window=None,
        mean=True,
        base="sgd",
        current="compressed",
        decay_rate=-0.8,
        square_eps=1e-30,
        clip=1.0,
        relative=False,
        weight_decay=0.0,
        side=None,
        find=None,
        find_accumulator=None,
    ):
        self.p, self.lr, self.beta, self.wd = p.clone(), lr, beta, weight_decay
        self.window, self.mean, self.base, self.current = window, mean, base, current
        self.decay_rate, self.square_eps, self.clip, self.relative = decay_rate, square_eps, clip, relative
        self.side = Side(p.shape, side)
        self.refresh_at = refresh_at or every(1000)
        self.find = find or gaussian(self.side.size, rank, p.dtype)
        self.find_accumulator = find_accumulator or gaussian(self.side.size, rank, p.dtype, seed=1)
        self.m = torch.zeros(self.side.core(rank), dtype=p.dtype)
        self.row, self.column = real_zeros((p.shape[0], 1)), real_zeros((1, p.shape[1]))
        self.u, self.accumulator_u, self.c, self.count, self.t = None, None, None, 0, 0

    def accumulated(self, g):
        """Return h at the end of a window, else None."""
        if self.window is None:
            return g
        if self.count == 0:
            self.accumulator_u, self.c = self.find_accumulator(g, self.accumulator_u), 0.0
        self.c = self.c + self.side.project(self.accumulator_u, g)
        self.count += 1
        if self.count < self.window:
            return None
        self.count = 0
        return self.side.lift(self.accumulator_u, self.c) / (self.window if self.mean else 1)

    def preconditioned(self, h):
        if self.base == "sgd":
            return h
        b = 1 - (self.t + 1) ** self.decay_rate
        q = square(h) + self.square_eps
        self.row = b * self.row + (1 - b) * q.mean(1, keepdim=True)
        self.column = b * self.column + (1 - b) * q.mean(0, keepdim=True)
        return h / torch.sqrt(self.row * self.column / self.row.mean())

    def momentum(self, w):
        if self.beta is None:
            return w
        before = None if self.u is None else self.side.lift(self.u, self.m)
        if self.refresh_at(self.t):
            self.u = self.find(w, self.u)
            if before is not None:
                self.m = self.side.project(self.u, before)
        self.m = self.beta * self.m + (1 - self.beta) * self.side.project(self.u, w)
        if self.current == "compressed":
            return self.side.lift(self.u, self.m)
        return (1 - self.beta) * w + (0.0 if before is None else self.beta * before)

    def step(self, g):
        h = self.accumulated(g)
        if h is None:
            return self.p
        u = self.momentum(self.preconditioned(h))
        lr = self.lr
        if self.base == "adafactor":
            u = u / max(1.0, rms(u) / self.clip)
            lr = lr * max(1e-3, rms(self.p)) if self.relative else lr
        self.t += 1
        self.p = self.p * (1 - lr * self.wd) - lr * u
        return self.p
