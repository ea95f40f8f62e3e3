"""What the one-sided optimizers of matrices share: U (d x r) on the rows or the columns, Adam's moments, a limiter.

left:   z = U^H x,  lift(z) = U z    (U of C^m; the default when m <= n)
right:  z = x U,    lift(z) = z U^H  (U of C^n)
"""

import torch


def square(x):
    """|x|^2, real."""
    return (x * x.conj()).real


class Side:
    """Which side of an m x n matrix U acts on; U may be any d x r matrix."""

    def __init__(self, shape, side=None):
        self.shape = tuple(shape)
        self.left = shape[0] <= shape[1] if side is None else side == "left"
        self.size = shape[0] if self.left else shape[1]
        self.across = 0 if self.left else 1  # the dimension of z that has r entries

    def core(self, rank):
        return (rank, self.shape[1]) if self.left else (self.shape[0], rank)

    def project(self, u, x):
        return u.mH @ x if self.left else x @ u

    def lift(self, u, z):
        return u @ z if self.left else z @ u.mH

    def leading(self, x, rank):
        """Leading singular vectors of that side."""
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return u[:, :rank] if self.left else vh.mH[:, :rank]


def averages(m, v, z, betas):
    """Return m = b1 m + (1-b1) z and v = b2 v + (1-b2) |z|^2."""
    b1, b2 = betas
    return b1 * m + (1 - b1) * z, b2 * v + (1 - b2) * square(z)


def direction(m, v, t, betas, eps):
    """Return d = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps), t counting the current step."""
    b1, b2 = betas
    return (m / (1 - b1**t)) / (torch.sqrt(v / (1 - b2**t)) + eps)


def uncorrected(m, v, t, betas, eps):
    """Return m / (sqrt(v) + eps) and the factor sqrt(1-b2^t) / (1-b1^t) that the first AdamW of transformers adds."""
    b1, b2 = betas
    return m / (torch.sqrt(v) + eps), (1 - b2**t) ** 0.5 / (1 - b1**t)


def limited(s, last, gamma, eps, first=None):
    """Norm-growth limiter: s / (max(|s| / (last + eps), gamma) / gamma); the first s (last is None) passes.

    Ours, not the papers': with ``first`` the first s is brought down to that norm.
    """
    if gamma is None:
        return s
    if last is None:
        return s if first is None else s * min(1.0, float(first) / float(torch.linalg.norm(s)))
    return s / (max(float(torch.linalg.norm(s)) / (last + eps), gamma) / gamma)
