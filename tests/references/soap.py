"""SOAP (2409.11321, Algorithms 3 and 4), for a real or complex tensor of any order.

State: m (original space), v (in the eigenbases), and for every rotated mode n: L_n and a unitary Q_n.
With x -> x' = x x_1 Q_1^H ... x_N Q_N^H and its inverse x' -> x; t counts the Adam steps:

    first gradient: L_n = (1-bs) G_(n) G_(n)^H,  Q_n = eigenvectors of L_n, largest eigenvalue first;
                    that gradient makes no update (skip_first=True, t stays 0), or its update follows at once, t = 1
    m = b1 m + (1-b1) g
    v = b2 v + (1-b2) |g'|^2
    u' = (m'/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)
    p = p (1 - lr wd) - lr u
    L_n = bs L_n + (1-bs) G_(n) G_(n)^H          (after the update; not again for the first gradient; bs = b2 or given)
    every `frequency` Adam steps, after that:
        e = Re diag(Q_n^H L_n Q_n),  j = the order that sorts e downwards
        Q_n = QR(L_n Q_n[:, j]),     v permuted by j along mode n

eps_on="raw" has the authors' code's m'/(1-b1^t) sqrt(1-b2^t) / (sqrt(v) + eps), i.e. an eps larger by 1/sqrt(1-b2^t).
bias_correction=False drops both corrections. Modes longer than max_size have Q_n = I and no L_n, and so has a vector
without precondition_1d. The refresh after the first step (frequency=1, skip_first=False) is none: Q_n is fresh.

bounded=True is comoving's, not the paper's: entries of u' are brought down to Adam's own bound (adams_bound), which
they exceed only because v does not turn with the bases.

v turns with the permutation only. L_n without full rank leaves QR to invent the other columns: compare full-rank runs.
"""

import math

import torch

from references.algebra import mode_product, real_zeros, unfold


def adams_bound(t, b1, b2):
    """max |m/(1-b1^t)| / sqrt(v/(1-b2^t)) over all series of t gradients, by Cauchy-Schwarz, summed term by term."""
    k = sum(((1 - b1) * b1**i) ** 2 / ((1 - b2) * b2**i) for i in range(t))
    return math.sqrt(k * (1 - b2**t)) / (1 - b1**t)


def cut(x, bound):
    """Entries brought down to this size."""
    return x * torch.where(x.abs() > bound, bound / x.abs(), 1.0)


class SOAP:
    """step(grad) -> parameter; attributes p, m, v, stats (L_n or None), q (Q_n or None), t (Adam steps done)."""

    def __init__(
        self,
        p,
        lr,
        *,
        betas=(0.95, 0.95),
        shampoo_beta=None,
        eps=1e-8,
        weight_decay=0.0,
        frequency=10,
        max_size=10000,
        precondition_1d=False,
        skip_first=True,
        bias_correction=True,
        eps_on="corrected",
        bounded=False,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd = p.clone(), lr, betas, eps, weight_decay
        self.bs = betas[1] if shampoo_beta is None else shampoo_beta
        self.frequency, self.skip_first = frequency, skip_first
        self.bias_correction, self.eps_on, self.bounded = bias_correction, eps_on, bounded
        self.rotated = [size <= max_size and (p.ndim > 1 or precondition_1d) for size in p.shape]
        self.stats = [
            torch.zeros(size, size, dtype=p.dtype) if r else None for size, r in zip(p.shape, self.rotated, strict=True)
        ]
        self.q = None
        self.m, self.v, self.t = torch.zeros_like(p), real_zeros(p.shape), 0

    def inward(self, x):
        for n, q in enumerate(self.q):
            x = x if q is None else mode_product(x, q.mH, n)
        return x

    def outward(self, x):
        for n, q in enumerate(self.q):
            x = x if q is None else mode_product(x, q, n)
        return x

    def gather(self, g):
        for n, stat in enumerate(self.stats):
            if stat is not None:
                self.stats[n] = self.bs * stat + (1 - self.bs) * unfold(g, n) @ unfold(g, n).mH

    def refresh(self):
        for n, (stat, q) in enumerate(zip(self.stats, self.q, strict=True)):
            if stat is None:
                continue
            estimate = (q.conj() * (stat @ q)).sum(dim=0).real
            order = torch.argsort(estimate, descending=True)
            self.v = self.v.index_select(n, order)
            self.q[n] = torch.linalg.qr(stat @ q[:, order])[0]

    def step(self, g):
        first = self.q is None
        if first:
            self.gather(g)
            self.q = [None if stat is None else torch.linalg.eigh(stat)[1].flip(1) for stat in self.stats]
            if self.skip_first:
                return self.p

        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        turned = self.inward(g)
        self.v = b2 * self.v + (1 - b2) * (turned * turned.conj()).real
        c1, c2 = (1 - b1**self.t, 1 - b2**self.t) if self.bias_correction else (1.0, 1.0)
        eps = self.eps / math.sqrt(c2) if self.eps_on == "raw" else self.eps
        d = self.inward(self.m) / c1 / (torch.sqrt(self.v / c2) + eps)
        d = cut(d, adams_bound(self.t, b1, b2)) if self.bounded else d
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.outward(d)

        if not first:
            self.gather(g)
            if self.t % self.frequency == 0:
                self.refresh()
        return self.p
