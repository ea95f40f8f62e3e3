"""COAP with AdamW (2412.00071), for a real or complex m x n matrix; U is d x r (the paper's P), left or right.

    step 0 and every T_u factor steps:  U = V[:, :r] of the SVD W S V^H of Q^H x, Q = the Q of x U
                                        (x = g when right, g^H when left; at step 0 of a random U, or the exact SVD)
    every other T_u steps:              one step of gradient descent on L, from U, with m of the last step,
        g^ = U U^H g  (or g U U^H),  m^ = U m  (or m U^H)
        L(U) = mean |g^ - g|^2 (1 - mean_i Re <m^_i, g_i> / (|m^_i| |g_i|))     i: rows when right, columns when left
        U = U - u_lr grad / max(1, |grad|)                                      u_lr = 0.1
    z = U^H g   (or g U)
    m = b1 m + (1-b1) z,  v = b2 v + (1-b2) |z|^2,  d = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    p = p (1 - lr wd) - lr scale U d

The recalibrated U is orthonormal, the descended one is not: nothing brings it back before the next recalibration. The
moments stay as they are at a change of U, or (`restore`, an option of the published code) m = m U_old^H U and
sqrt(v) = sqrt(v) U_old^H U, which may not be positive and is squared. The paper has m >= n and U on the right; the
published code takes the cosine of rows on either side (`rows=True`), where the transposed algorithm takes columns. The
norms under the cosine are at least 1e-8, and the clip is 1 / max(1, |grad| + 1e-6), both as in torch.
"""

import torch

from references.algebra import real_zeros
from references.side import Side, averages, direction, square


def calibrated(g, old, left):
    """The sketched singular vectors: Q = qr(x U), V of Q^H x."""
    x = g.mH if left else g
    q = torch.linalg.qr(x @ old)[0]
    return torch.linalg.svd(q.mH @ x, full_matrices=False)[2].mH


class Coap:
    """step(grad) -> parameter; attributes p, u, m, v, t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        period=32,
        factor=5,
        u_lr=0.1,
        scale=1.0,
        restore=False,
        rows=None,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        side=None,
        find=None,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd, self.scale = p.clone(), lr, betas, eps, weight_decay, scale
        self.period, self.factor, self.u_lr, self.restore = period, factor, u_lr, restore
        self.side = Side(p.shape, side)
        self.along = 1 if (not self.side.left if rows is None else rows) else 0
        self.rank = min(rank, *p.shape)
        self.find = find or self.recalibrated
        shape = self.side.core(self.rank)
        self.m, self.v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)
        self.u, self.t = None, 0

    def recalibrated(self, g, old):
        return self.side.leading(g, self.rank) if old is None else calibrated(g, old, self.side.left)

    def loss(self, u, g):
        error = square(self.side.lift(u, self.side.project(u, g)) - g).mean()
        m = self.side.lift(u, self.m)
        norm_m = torch.linalg.norm(m, dim=self.along).clamp(min=1e-8)
        norm_g = torch.linalg.norm(g, dim=self.along).clamp(min=1e-8)
        cosine = (m * g.conj()).real.sum(self.along) / (norm_m * norm_g)
        return error * (1 - cosine.mean())

    def descended(self, g):
        u = self.u.clone().requires_grad_()
        (grad,) = torch.autograd.grad(self.loss(u, g), u)
        norm = float(torch.linalg.norm(grad))
        return self.u - self.u_lr * grad / max(1.0, norm + 1e-6)

    def step(self, g):
        if self.t == 0:
            self.u = self.find(g, None)
        elif self.t % self.period == 0:
            old = self.u
            recalibrate = self.t % (self.period * self.factor) == 0
            self.u = self.find(g, old) if recalibrate else self.descended(g)
            if self.restore:
                self.m = self.side.project(self.u, self.side.lift(old, self.m))
                root = torch.sqrt(self.v).to(g.dtype)
                self.v = square(self.side.project(self.u, self.side.lift(old, root)))
        self.t += 1
        z = self.side.project(self.u, g)
        self.m, self.v = averages(self.m, self.v, z, self.betas)
        d = direction(self.m, self.v, self.t, self.betas, self.eps)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.scale * self.side.lift(self.u, d)
        return self.p
