"""LDAdam (2410.16103), for a real or complex m x n matrix; U has orthonormal columns (of C^m when m <= n, else of C^n).

Left side; t = finished steps, c1 = 1-b1^t, c2 = 1-b2^t (the right side is the same for G^H, with U of C^n):

    a  = g + e                                              (e = 0 without error feedback)
    U' = leading left singular vectors of a                 (t = 0)
    U' = QR(b b^H U),  b = rho U m/c1 + (1-rho) a           (t > 0, every k steps)
    R  = U'^H U,  m' = R m
    v' = c2 | |R|^2 (v/c2 - |m|^2/c1^2) + |m'|^2/c1^2 |
    z  = U'^H a
    e  = a - U' z + b1/(1-b1) (U m - U' m')
    m  = b1 m' + (1-b1) z,  v = b2 v' + (1-b2) |z|^2
    p  = p (1 - lr wd) - lr U' (m/(1-b1^(t+1))) / (sqrt(v/(1-b2^(t+1))) + eps)
"""

import torch

from references.algebra import every, real_zeros


def square(x):
    """|x|^2, real."""
    return (x * x.conj()).real


class LDAdam:
    """step(grad) -> parameter; attributes p, u, left, m, v, e, t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        betas=(0.908, 0.99),
        eps=1e-8,
        weight_decay=0.0,
        rho=0.908,
        error_feedback=True,
        period=1,
        refresh_at=None,
        side=None,
    ):
        rows, columns = p.shape
        self.p, self.lr, self.betas, self.eps, self.wd, self.rho = p.clone(), lr, betas, eps, weight_decay, rho
        self.left = rows <= columns if side is None else side == "left"
        self.rank, self.error_feedback = rank, error_feedback
        self.refresh_at = refresh_at or every(period)
        shape = (rank, columns) if self.left else (rows, rank)
        self.u, self.m, self.v = None, torch.zeros(shape, dtype=p.dtype), real_zeros(shape)
        self.e, self.t = torch.zeros_like(p), 0

    def lift(self, u, z):
        return u @ z if self.left else z @ u.mH

    def project(self, u, x):
        return u.mH @ x if self.left else x @ u

    def first_frame(self, a):
        u, _, vh = torch.linalg.svd(a, full_matrices=False)
        return u[:, : self.rank] if self.left else vh.mH[:, : self.rank]

    def power_iteration(self, b):
        if self.left:
            return torch.linalg.qr(b @ (b.mH @ self.u))[0]
        return torch.linalg.qr(b.mH @ (b @ self.u))[0]

    def transport(self, new):
        b1, b2 = self.betas
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        s = self.v / c2 - square(self.m) / c1**2
        r = new.mH @ self.u
        if self.left:
            m, s = r @ self.m, square(r) @ s
        else:
            m, s = self.m @ r.mH, s @ square(r).T
        return m, c2 * torch.abs(s + square(m) / c1**2)

    def step(self, g):
        b1, b2 = self.betas
        a = g + self.e
        m, v, lost = self.m, self.v, torch.zeros_like(g)
        if self.t == 0:
            self.u = self.first_frame(a)
        elif self.refresh_at(self.t):
            b = self.rho * self.lift(self.u, self.m / (1 - b1**self.t)) + (1 - self.rho) * a
            new = self.power_iteration(b)
            m, v = self.transport(new)
            lost = self.lift(self.u, self.m) - self.lift(new, m)
            self.u = new
        z = self.project(self.u, a)
        if self.error_feedback:
            self.e = a - self.lift(self.u, z) + b1 / (1 - b1) * lost
        self.m = b1 * m + (1 - b1) * z
        self.v = b2 * v + (1 - b2) * square(z)
        self.t += 1
        d = (self.m / (1 - b1**self.t)) / (torch.sqrt(self.v / (1 - b2**self.t)) + self.eps)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.lift(self.u, d)
        return self.p
