"""SubTrack++ (2502.01586) and GrassWalk, GrassJump (2510.01878), of a real or complex m x n matrix, m <= n.

S is m x r, orthonormal; a matrix with m > n is stepped as its conjugate transpose. Every k steps, t finished ones:

    S' = leading left singular vectors of g                                             (t = 0)
    A = S^H g,  -F/2 = (g - S A) A^H = U Sigma V^H;  of that u, sigma, v of the largest sigma, theta = 2 eta sigma
    S' = [S v, u] [cos theta; sin theta] v^H + S (I - v v^H)                            (SubTrack++)
    X random, (I - S S^H) X = U Sigma V^H;  S' = S V cos(eta Sigma) V^H + U sin(eta Sigma) V^H      (GrassWalk)
    S' random                                                                           (GrassJump)
    R = S'^H S,  m' = R m,  v' = (1 - b2^t) | |R|^2 (v/c2 - |m|^2/c1^2) + |m'|^2/c1^2 |

and at all: z = S^H g, Adam's m, v and d from z, phi_j = |d_j| / (|z_j| + 1e-8) of each column,
s = phi (g - S z), no longer than zeta (|s_last| + 1e-8); p = p (1 - lr wd) - lr (alpha S d + s).

The projection of the moments is LDAdam's, as the papers say. The authors' code of SubTrack++ is another: it compares
the frame with the very first one, and multiplies the projected variance by 1 - b2 (after the step, which uses neither).
`first_bounded` is comoving's: the first s is brought down to |s| <= |d| sqrt((m n - core) / core).
"""

import torch

from references.algebra import every, real_zeros
from references.side import averages, direction, limited, square


def tracked(s, g, eta):
    """S' of SubTrack++."""
    a = s.mH @ g
    u, sigma, vh = torch.linalg.svd((g - s @ a) @ a.mH, full_matrices=False)
    u, v, theta = u[:, :1], vh.mH[:, :1], 2 * eta * sigma[0]
    columns, turn = torch.cat([s @ v, u], 1), torch.stack([torch.cos(theta), torch.sin(theta)])[:, None]
    return columns @ turn.to(s.dtype) @ v.mH + s @ (torch.eye(s.shape[1], dtype=s.dtype) - v @ v.mH)


def walked(s, x, eta):
    """S' of GrassWalk."""
    u, sigma, vh = torch.linalg.svd(x - s @ (s.mH @ x), full_matrices=False)
    cos, sin = (torch.diag(f(eta * sigma)).to(s.dtype) for f in (torch.cos, torch.sin))
    return (s @ vh.mH @ cos + u @ sin) @ vh


class SubTrack:
    """step(grad) -> parameter; attributes s (the frame), m, v, last; turn(s, g) -> S', s None at first."""

    def __init__(
        self, p, lr, rank, turn, *, alpha=0.25, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, zeta=1.01,
        first_bounded=False, refresh_at=None,
    ):  # fmt: skip
        self.flipped = p.shape[0] > p.shape[1]
        self.p = (p.mH if self.flipped else p).clone()
        self.lr, self.alpha, self.betas, self.eps, self.wd, self.zeta = lr, alpha, betas, eps, weight_decay, zeta
        self.turn, self.refresh_at, self.first_bounded = turn, refresh_at or every(200), first_bounded
        shape = (rank, self.p.shape[1])
        self.m, self.v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)
        self.s, self.last, self.t = None, None, 0

    def project_moments(self, new):
        b1, b2 = self.betas
        c1, c2, r = 1 - b1**self.t, 1 - b2**self.t, new.mH @ self.s
        spread = self.v / c2 - square(self.m) / c1**2
        self.m = r @ self.m
        self.v = c2 * torch.abs(square(r) @ spread + square(self.m) / c1**2)

    def step(self, g):
        g = g.mH if self.flipped else g
        if self.refresh_at(self.t):
            new = self.turn(self.s, g)
            if self.s is not None:
                self.project_moments(new)
            self.s = new
        self.t += 1
        z = self.s.mH @ g
        self.m, self.v = averages(self.m, self.v, z, self.betas)
        d = direction(self.m, self.v, self.t, self.betas, self.eps)
        phi = torch.linalg.norm(d, dim=0) / (torch.linalg.norm(z, dim=0) + 1e-8)
        first = torch.linalg.norm(d) * (g.numel() / d.numel() - 1) ** 0.5 if self.first_bounded else None
        rest = limited(phi * (g - self.s @ z), self.last, self.zeta, 1e-8, first)
        self.last = float(torch.linalg.norm(rest))
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * (self.alpha * self.s @ d + rest)
        return self.p.mH if self.flipped else self.p
