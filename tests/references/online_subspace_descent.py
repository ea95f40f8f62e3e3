"""Online Subspace Descent (2408.12857, Algorithm 1), for a real or complex m x n matrix; U is d x r, left or right.

    step 0:  U = leading singular vectors of g
    z = U^H g   (or g U)
    m = b1 m + (1-b1) z,  v = b2 v + (1-b2) |z|^2,  d = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    p = p (1 - lr wd) - lr scale U d
    then, with x = g / |g| when left, g^H / |g| when right:
    L(U) = |U U^H x - x|^2 + penalty |U^H U - I|^2
    grad = -4 x x^H U + 2 x x^H U U^H U + 2 U U^H x x^H U + 4 penalty U (U^H U - I)
    U = U (1 - u_lr u_wd) - u_lr adam(grad)          Adam with its own m, v and t; or plain gradient descent

The moments stay as they are while U moves, and U is kept orthonormal by nothing but the loss. A complex grad is the
direction of steepest ascent, dL/dRe U + i dL/dIm U. `advance(g, U) -> U` replaces the last lines (`oja` below returns
an orthonormal U), and `before` moves U before it is used. The first move is at step 0 in the paper (`from_start`); the
published code has none there, no penalty, u_lr = 1/200 following the schedule of lr, u_wd = 0.01 and scale 0.25; the
paper recommends u_lr = 5 lr and u_wd = wd. A gradient of 0 moves U by the penalty and Adam's momentum only.
"""

import torch

from references.algebra import real_zeros
from references.side import Side, averages, direction


def pca_gradient(u, x, penalty=0.0):
    """Gradient of |U U^H x - x|^2 + penalty |U^H U - I|^2."""
    c, overlap = x @ x.mH, u.mH @ u
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    return -4 * c @ u + 2 * c @ u @ overlap + 2 * u @ (u.mH @ c @ u) + 4 * penalty * u @ (overlap - eye)


def unit(x):
    """x / |x|, or 0."""
    norm = torch.linalg.norm(x)
    return x / norm if norm > 0 else x


def oja(shape, step, side=None):
    """Mover: U = the Q of (I + step x x^H) U, x as above."""
    left = Side(shape, side).left

    def advance(g, u):
        x = unit(g if left else g.mH)
        return torch.linalg.qr(u + step * x @ (x.mH @ u))[0]

    return advance


class OnlineSubspaceDescent:
    """step(grad) -> parameter; attributes p, u, m, v, u_m, u_v, t (finished steps), u_t (moves of Adam on U)."""

    def __init__(
        self,
        p,
        lr,
        rank,
        *,
        scale=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        u_lr=None,
        u_betas=(0.9, 0.999),
        u_eps=1e-8,
        u_weight_decay=0.0,
        u_optimizer="adam",
        penalty=0.0,
        from_start=True,
        before=False,
        side=None,
        find=None,
        advance=None,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd, self.scale = p.clone(), lr, betas, eps, weight_decay, scale
        self.u_lr, self.u_betas, self.u_eps, self.u_wd = (
            5 * lr if u_lr is None else u_lr,
            u_betas,
            u_eps,
            u_weight_decay,
        )
        self.u_optimizer, self.penalty, self.from_start, self.before = u_optimizer, penalty, from_start, before
        self.side = Side(p.shape, side)
        rank = min(rank, *p.shape)
        self.find = find or (lambda operand, old: self.side.leading(operand, rank))
        self.advance = advance or self.descend
        shape = self.side.core(rank)
        self.m, self.v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)
        shape = (self.side.size, rank)
        self.u_m, self.u_v = torch.zeros(shape, dtype=p.dtype), real_zeros(shape)
        self.u, self.t, self.u_t = None, 0, 0

    def descend(self, g, u):
        grad = pca_gradient(u, unit(g if self.side.left else g.mH), self.penalty)
        if self.u_optimizer == "adam":
            self.u_t += 1
            self.u_m, self.u_v = averages(self.u_m, self.u_v, grad, self.u_betas)
            grad = direction(self.u_m, self.u_v, self.u_t, self.u_betas, self.u_eps)
        return u * (1 - self.u_lr * self.u_wd) - self.u_lr * grad

    def step(self, g):
        moves = self.from_start or self.t > 0
        if self.t == 0:
            self.u = self.find(g, None)
        if moves and self.before:
            self.u = self.advance(g, self.u)
        self.t += 1
        z = self.side.project(self.u, g)
        self.m, self.v = averages(self.m, self.v, z, self.betas)
        d = direction(self.m, self.v, self.t, self.betas, self.eps)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.scale * self.side.lift(self.u, d)
        if moves and not self.before:
            self.u = self.advance(g, self.u)
        return self.p
