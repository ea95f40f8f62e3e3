"""APOLLO and APOLLO-Mini (2412.05270), for a real or complex m x n matrix; U is any d x r matrix, left or right.

    every T steps, from step 0:  U = a new draw, Gaussian of variance 1/r
    z = U^H g   (or g U)
    m = b1 m + (1-b1) z,  v = b2 v + (1-b2) |z|^2,  d = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    phi_j = |d_j| / (|z_j| + 1e-8)     APOLLO: a channel is column j when left, row j when right
    phi   = |d| / (|z| + 1e-8)         APOLLO-Mini: the whole matrix, with r = 1
    s = phi g                          the whole gradient: U serves phi only, and nothing is lifted
    s = s / (max(|s| / (|s_last| + 1e-8), gamma) / gamma)          not at step 0
    p = p (1 - lr wd) - lr scale s     scale = 1, for APOLLO-Mini sqrt(128)

The moments stay as they are when U is drawn anew. In the published code `scale` is the square of this one, the limiter
sees d without the bias correction, which multiplies the update at the end (`corrected=False`, as in Fira), and a square
matrix is projected on the right. `scale_first` applies the scale before the limiter, a difference by its 1e-8 only.
phi is invariant under U -> c U but for eps and 1e-8, so the variance of U hardly matters; d and z are both random.

`first_bounded` is comoving's, not the paper's: the first s is brought down to |s| <= |d|.
"""

import math

import torch

from references.algebra import every, real_zeros
from references.side import Side, averages, direction, limited, uncorrected


def gaussian(size, rank, dtype, seed=0):
    """Finder: a d x r Gaussian matrix of variance 1/r."""
    generator = torch.Generator().manual_seed(seed)
    return lambda operand, old: torch.randn(size, rank, dtype=dtype, generator=generator) / math.sqrt(rank)


class Apollo:
    """step(grad) -> parameter; attributes p, u, m, v, last (|s| or None), t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        refresh_at=None,
        scale=1.0,
        channelwise=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        gamma=1.01,
        phi_eps=1e-8,
        limiter_eps=1e-8,
        scale_first=False,
        corrected=True,
        first_bounded=False,
        side=None,
        find=None,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd, self.scale = p.clone(), lr, betas, eps, weight_decay, scale
        self.gamma, self.phi_eps, self.limiter_eps = gamma, phi_eps, limiter_eps
        self.channelwise, self.scale_first, self.corrected = channelwise, scale_first, corrected
        self.first_bounded = first_bounded
        self.side = Side(p.shape, side)
        self.refresh_at = refresh_at or every(200)
        self.find = find or gaussian(self.side.size, rank, p.dtype)
        shape = self.side.core(rank)
        self.m, self.v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)
        self.u, self.last, self.t = None, None, 0

    def phi(self, d, z):
        if self.channelwise:
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
        s = self.phi(d, z) * g * (self.scale if self.scale_first else 1.0)
        first = torch.linalg.norm(d) if self.first_bounded else None
        s = limited(s, self.last, self.gamma, self.limiter_eps, first)
        self.last = float(torch.linalg.norm(s))
        self.p = self.p * (1 - self.lr * self.wd)
        self.p = self.p - self.lr * c * s * (1.0 if self.scale_first else self.scale)
        return self.p


def apollo_mini(p, lr, **options):
    """APOLLO-Mini: rank 1, one phi of the whole matrix, scale sqrt(128)."""
    return Apollo(p, lr, 1, channelwise=False, scale=options.pop("scale", math.sqrt(128)), **options)
