"""Fira with AdamW (2410.01623), for a real or complex m x n matrix; U is d x r, of the rows when left, else of columns.

    every T steps, from step 0:  U = leading singular vectors of g
    z = U^H g   (or g U)
    m = b1 m + (1-b1) z,  v = b2 v + (1-b2) |z|^2,  d = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    phi_j = |d_j| / (|z_j| + 1e-8)          column j of z when left, row j when right; or one phi of the whole matrix
    s = phi (g - U z)                       column by column (row by row)
    s = s / (max(|s| / (|s_last| + 1e-8), gamma) / gamma)   so that |s| <= gamma (|s_last| + 1e-8); not at step 0
    p = p (1 - lr wd) - lr (alpha U d + s)

s_last is s after its limiting. The moments stay as they are at a refresh. alpha is GaLore's scale and multiplies the
low-rank part alone; the published code lets it into the residual too, s = phi (g - alpha U z) (`alpha_in_residual`),
which is no residual unless alpha is 1. The published code also measures d without the bias correction, in phi and in
the limiter alike, and corrects the whole update at the end, p = p - lr c (alpha U d + s) with
c = sqrt(1-b2^t) / (1-b1^t) and d = m / (sqrt(v) + eps) (`corrected=False`): the same without a limiter, and but for
eps, and another limiter since c changes with t.

`first_bounded` is comoving's, not the paper's: the first s is brought down to |s| <= |d| sqrt((m n - core) / core).
"""

import torch

from references.algebra import every, real_zeros
from references.side import Side, averages, direction, limited, uncorrected


class Fira:
    """step(grad) -> parameter; attributes p, u, m, v, last (|s| or None), t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        refresh_at=None,
        alpha=0.25,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        gamma=1.01,
        phi_eps=1e-8,
        limiter_eps=1e-8,
        columnwise=True,
        alpha_in_residual=False,
        corrected=True,
        first_bounded=False,
        side=None,
        find=None,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd, self.alpha = p.clone(), lr, betas, eps, weight_decay, alpha
        self.gamma, self.phi_eps, self.limiter_eps, self.columnwise = gamma, phi_eps, limiter_eps, columnwise
        self.alpha_in_residual, self.corrected, self.first_bounded = alpha_in_residual, corrected, first_bounded
        self.side = Side(p.shape, side)
        rank = min(rank, *p.shape)
        self.refresh_at = refresh_at or every(200)
        self.find = find or (lambda operand, old: self.side.leading(operand, rank))
        shape = self.side.core(rank)
        self.m, self.v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)
        self.u, self.last, self.t = None, None, 0

    def phi(self, d, z):
        if self.columnwise:
            across = self.side.across
            return torch.linalg.norm(d, dim=across, keepdim=True) / (
                torch.linalg.norm(z, dim=across, keepdim=True) + self.phi_eps
            )
        return torch.linalg.norm(d) / (torch.linalg.norm(z) + self.phi_eps)

    def step(self, g):
        if self.refresh_at(self.t):
            self.u = self.find(g, self.u)
        self.t += 1
        z = self.side.project(self.u, g)
        self.m, self.v = averages(self.m, self.v, z, self.betas)
        if self.corrected:
            d, c = direction(self.m, self.v, self.t, self.betas, self.eps), 1.0
        else:
            d, c = uncorrected(self.m, self.v, self.t, self.betas, self.eps)
        inside = self.side.lift(self.u, z) * (self.alpha if self.alpha_in_residual else 1.0)
        first = torch.linalg.norm(d) * (g.numel() / d.numel() - 1) ** 0.5 if self.first_bounded else None
        s = limited(self.phi(d, z) * (g - inside), self.last, self.gamma, self.limiter_eps, first)
        self.last = float(torch.linalg.norm(s))
        self.p = self.p * (1 - self.lr * self.wd)
        self.p = self.p - self.lr * c * (self.alpha * self.side.lift(self.u, d) + s)
        return self.p
