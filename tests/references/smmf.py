"""SMMF (2412.08894): Adam moments stored as rank-one non-negative factors of a nearly square matrix.

The tensor, row-major, is read as an a x b matrix: ab = its size, a >= b, b the largest divisor up to the square root.
At step t = 1, 2, ...:

    M  = S * (r_m c_m^T),   V = r_v c_v^T                        (decompress; 0 at t = 1)
    b1 = beta growth^(t-1), b2 = 1 - t^decay                     (decay < 0, so b2 = 0 at t = 1)
    M  = b1 M + (1-b1) g,   V = b2 V + (1-b2) |g|^2              (no bias correction)
    p  = p (1 - lr wd) - lr M / (sqrt(V) + eps)                  (the moments before their compression)
    S  = sign of M,  (r_m, c_m) = nnmf(|M|),  (r_v, c_v) = nnmf(V)

nnmf(X): r = row sums, c = column sums, the shorter of the two divided by the sum of X (columns when a = b), so that
r c^T = (X 1)(1^T X) / (1^T X 1). The sign of 0 is -1 (one bit: "M > 0"). A complex S, which the paper does not have,
is the phase of M (again -1 at 0). beta=None: no first moment, M = g.
"""

import torch

from references.algebra import real_zeros


def square_shape(size):
    """(a, b): ab = size, a >= b, a - b minimal."""
    b = max(k for k in range(1, size + 1) if size % k == 0 and k * k <= size)
    return size // b, b


def nnmf(x):
    rows, columns = x.sum(dim=1), x.sum(dim=0)
    total = x.sum()
    if total == 0:
        return rows, columns
    if x.shape[0] < x.shape[1]:
        return rows / total, columns
    return rows, columns / total


def sign(x):
    """x/|x|, and -1 at 0."""
    size = x.abs()
    return torch.where(size > 0, x / torch.where(size > 0, size, torch.ones_like(size)), -torch.ones_like(x))


class SMMF:
    """step(grad) -> parameter; attributes p, shape (a, b), s, r_m, c_m, r_v, c_v, t (finished steps)."""

    def __init__(self, p, lr=1e-3, *, beta=0.9, growth=0.999, decay=-0.5, eps=1e-8, weight_decay=0.0):
        self.p, self.lr, self.beta, self.growth, self.decay = p.clone(), lr, beta, growth, decay
        self.eps, self.wd = eps, weight_decay
        self.shape = a, b = square_shape(p.numel())
        self.r_m, self.c_m, self.r_v, self.c_v = real_zeros((a,)), real_zeros((b,)), real_zeros((a,)), real_zeros((b,))
        self.s, self.t = -torch.ones(a, b, dtype=p.dtype), 0

    def step(self, g):
        self.t += 1
        x = g.reshape(self.shape)
        b2 = 1 - self.t**self.decay
        v = b2 * torch.outer(self.r_v, self.c_v) + (1 - b2) * (x * x.conj()).real
        m = x
        if self.beta is not None:
            b1 = self.beta * self.growth ** (self.t - 1)
            m = b1 * self.s * torch.outer(self.r_m, self.c_m) + (1 - b1) * x
            self.s = sign(m)
            self.r_m, self.c_m = nnmf(m.abs())
        self.r_v, self.c_v = nnmf(v)
        update = m / (torch.sqrt(v) + self.eps)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * update.reshape(self.p.shape)
        return self.p
