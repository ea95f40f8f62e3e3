"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon; scaling of 2502.16982), real or complex.

    m = b m + g               x = m, or with nesterov  x = g + b m
    m = b m + (1-b) g         x = m, or with nesterov  x = (1-b) g + b m          (ema=True: (1-b) times the above)
    o = orth(x)
    p = p (1 - lr wd) - lr scale o

orth = "polar":  U_r V_r^H over the nonzero singular values of x (orth(0) = 0), the limit of any odd matrix iteration;
orth = "ns":     X = x / max(|x|_F, eps), then `steps` times  A = X X^H,  X = a X + (b A + c A^2) X.
scale:           "match" 0.2 sqrt(max(m, n)),  "spectral" sqrt(max(1, m/n)),  or a number; x is m x n.

A tensor of order > 2 is the matrix of its first mode against all the others (flatten=True).
"""

import math

import torch

from references.algebra import unfold

QUINTIC = (3.4445, -4.7750, 2.0315)


def polar(x):
    """The partial isometry U_r V_r^H; singular values under the usual numerical-rank threshold count as zero."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s > max(x.shape) * torch.finfo(s.dtype).eps * s[0]
    return u[:, kept] @ vh[kept]


def newton_schulz(x, steps=5, coefficients=QUINTIC, eps=1e-7):
    a, b, c = coefficients
    x = x / max(float(torch.linalg.norm(x)), eps)
    for _ in range(steps):
        gram = x @ x.mH
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def scale_of(scale, rows, columns):
    if scale == "match":
        return 0.2 * math.sqrt(max(rows, columns))
    if scale == "spectral":
        return math.sqrt(max(1.0, rows / columns))
    return float(scale)


class Muon:
    """step(grad) -> parameter; attributes p, m, t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        *,
        momentum=0.95,
        nesterov=True,
        ema=False,
        orth="ns",
        ns_steps=5,
        ns_coefficients=QUINTIC,
        eps=1e-7,
        scale="match",
        weight_decay=0.0,
        flatten=False,
    ):
        if p.ndim != 2 and not (flatten and p.ndim > 2):
            raise ValueError("Muon is for matrices; flatten=True makes a matrix of a tensor")
        self.p, self.lr, self.b, self.nesterov, self.ema = p.clone(), lr, momentum, nesterov, ema
        self.orth, self.ns_steps, self.ns_coefficients, self.eps = orth, ns_steps, ns_coefficients, eps
        self.scale, self.wd = scale, weight_decay
        self.m, self.t = torch.zeros_like(p), 0

    def step(self, g):
        weight = 1 - self.b if self.ema else 1.0
        self.m = self.b * self.m + weight * g
        x = weight * g + self.b * self.m if self.nesterov else self.m
        x = unfold(x, 0)
        o = polar(x) if self.orth == "polar" else newton_schulz(x, self.ns_steps, self.ns_coefficients, self.eps)
        size = scale_of(self.scale, *x.shape)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * size * o.reshape(self.p.shape)
        self.t += 1
        return self.p
