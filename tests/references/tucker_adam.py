"""Update-aware Adam in a mode-wise frame (design.md; LDAdam, 2410.16103, taken to tensors), on flattened vectors.

With the explicit basis B = U_1 (x) ... (x) U_N (a whole mode is the identity), B' the new one, R = B'^H B, t = finished
steps (those since the last reset), c1 = 1-b1^t, c2 = 1-b2^t:

    g~ = g + e
    refresh:  operand = g~ at the first, else rho B m/c1 + (1-rho) g~
    m' = R m
    rotate:   s = v/c2 - |m|^2/c1^2,     v' = c2 | |R|^2 s + |m'|^2/c1^2 |
    carry:    s = v/kappa - |m|^2/c1^2,  kappa' = |R|^2 kappa
              v' = kappa' max( |R|^2 (kappa s) / kappa' + |m'|^2/c1^2 , |m'|^2/(K c2) )   (v' = 0 where kappa' = 0)
    raw_floor (not in design.md): v' = max( kappa' (...) , |m'|^2/K ), which keeps |m|^2 <= K v at every later step
    keep:     m' = m, v' = v             reset: m' = 0, v' = 0, t = 0
    z  = B'^H g~
    e  = g~ - B' z + b1/(1-b1) (B m - B' m')
    m  = b1 m' + (1-b1) z,   v = b2 v' + (1-b2) |z|^2
    kappa = b2 kappa' + (1-b2),   K = (b1^2/b2) K + (1-b1)^2/(1-b2)
    v^ = v/kappa for carry, else v/(1-b2^(t+1))
    p  = p (1 - lr wd) - lr scale B' (m/(1-b1^(t+1))) / (sqrt(v^) + eps)

Telescoping:  sum over steps of B m  +  the last b1/(1-b1) B m  +  e  =  sum of all g.
"""

import torch

from references.algebra import basis, core_shape, every, real_zeros, update_scale


def square(x):
    """|x|^2, real."""
    return (x * x.conj()).real


class TuckerAdam:
    """step(grad) -> parameter.

    Attributes: p, e (full shape); factors (None = whole); m, v, kappa (core shape); K; t (steps since the last reset);
    steps (all steps); sum_lifted, sum_gradients (full shape, for the telescoping identity).
    """

    def __init__(
        self,
        p,
        lr,
        find,
        *,
        transport="carry",
        refresh_at=None,
        period=1,
        rho=0.0,
        error_feedback=True,
        scale="match",
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        raw_floor=True,
    ):
        if transport not in ("keep", "reset", "rotate", "carry"):
            raise ValueError(transport)
        self.p, self.lr, self.find, self.transport = p.clone(), lr, find, transport
        self.refresh_at = refresh_at or every(period)
        self.rho, self.error_feedback, self.scale = rho, error_feedback, scale
        self.betas, self.eps, self.wd, self.raw_floor = betas, eps, weight_decay, raw_floor
        self.factors, self.basis = None, None
        self.m = self.v = self.kappa = None
        self.K, self.t, self.steps = 0.0, 0, 0
        self.e, self.sum_lifted, self.sum_gradients = (torch.zeros_like(p) for _ in range(3))

    @property
    def core(self):
        return core_shape(self.factors, self.p.shape)

    def lifted_momentum(self):
        """B m at full shape."""
        return (self.basis @ self.m.flatten()).reshape(self.p.shape)

    def telescoping_gap(self):
        """Return sum B m + b1/(1-b1) B m + e - sum g, zero up to rounding where error feedback is on."""
        b1 = self.betas[0]
        return self.sum_lifted + b1 / (1 - b1) * self.lifted_momentum() + self.e - self.sum_gradients

    def carried(self, r):
        """(m', v', kappa') as flat vectors, by the transport's formula."""
        b1, b2 = self.betas
        m, v, kappa = self.m.flatten(), self.v.flatten(), self.kappa.flatten()
        if self.transport == "keep":
            return m, v, kappa
        if self.transport == "reset":
            size = r.shape[0]
            return torch.zeros(size, dtype=m.dtype), real_zeros(size), real_zeros(size)
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        r2 = square(r)
        m_new = r @ m
        kappa_new = r2 @ kappa
        mean2 = square(m_new) / c1**2
        if self.transport == "rotate":
            s = v / c2 - square(m) / c1**2
            return m_new, c2 * torch.abs(r2 @ s + mean2), kappa_new
        s = v / kappa - square(m) / c1**2
        moved = r2 @ (kappa * s)
        v_new = torch.zeros_like(kappa_new)
        for i in range(len(v_new)):
            variance = moved[i] / kappa_new[i] if kappa_new[i] > 0 else 0.0
            if self.raw_floor:
                v_new[i] = max(kappa_new[i] * (variance + mean2[i]), square(m_new[i]) / self.K)
            else:
                v_new[i] = kappa_new[i] * max(variance + mean2[i], square(m_new[i]) / (self.K * c2))
        return m_new, v_new, kappa_new

    def first_frame(self, g):
        self.factors = self.find(g, None)
        self.basis = basis(self.factors, g.shape, g.dtype)
        self.m = torch.zeros(self.core, dtype=g.dtype)
        self.v, self.kappa = real_zeros(self.core), real_zeros(self.core)

    def refresh(self, g):
        """Find a new frame, carry the moments over, and return B m - B' m', the momentum that was lost."""
        b1 = self.betas[0]
        before = self.lifted_momentum()
        operand = self.rho * before / (1 - b1**self.t) + (1 - self.rho) * g
        self.factors = self.find(operand, self.factors)
        new = basis(self.factors, g.shape, g.dtype)
        moments = self.carried(new.mH @ self.basis)
        self.basis = new
        self.m, self.v, self.kappa = (x.reshape(self.core) for x in moments)
        if self.transport == "reset":
            self.t = 0
        return before - self.lifted_momentum()

    def step(self, gradient):
        b1, b2 = self.betas
        g = gradient + self.e
        lost = torch.zeros_like(g)
        if self.factors is None:
            self.first_frame(g)
        elif self.refresh_at(self.steps):
            lost = self.refresh(g)
        z = self.basis.mH @ g.flatten()
        if self.error_feedback:
            self.e = g - (self.basis @ z).reshape(g.shape) + b1 / (1 - b1) * lost
        z = z.reshape(self.core)
        self.m = b1 * self.m + (1 - b1) * z
        self.v = b2 * self.v + (1 - b2) * square(z)
        self.kappa = b2 * self.kappa + (1 - b2)
        self.K = b1**2 / b2 * self.K + (1 - b1) ** 2 / (1 - b2)
        self.t += 1
        self.steps += 1
        v_hat = self.v / self.kappa if self.transport == "carry" else self.v / (1 - b2**self.t)
        d = (self.m / (1 - b1**self.t)) / (torch.sqrt(v_hat) + self.eps)
        scale = update_scale(self.scale, self.p.numel(), d.numel())
        lifted = (self.basis @ d.flatten()).reshape(self.p.shape)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * scale * lifted
        self.sum_lifted = self.sum_lifted + self.lifted_momentum()
        self.sum_gradients = self.sum_gradients + gradient
        return self.p
