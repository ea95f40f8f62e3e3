"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon; scaling of 2502.16982), real or complex.

    m = b m + g               x = m, or with nesterov  x = g + b m
    m = b m + (1-b) g         x = m, or with nesterov  x = (1-b) g + b m          (ema=True: (1-b) times the above)
    o = orth(x)
    p = p (1 - lr wd) - lr scale o

orth = "polar":  U_r V_r^H over the nonzero singular values of x (orth(0) = 0), the limit of any odd matrix iteration;
orth = "ns":     X = x / max(|x|_F, eps), then `steps` times  A = X X^H,  X = a X + (b A + c A^2) X.
scale:           "match" 0.2 sqrt(max(m, n)),  "spectral" sqrt(max(1, m/n)),  or a number; x is m x n.

A tensor of order > 2 is the matrix of its first mode against all the others (flatten=True).

Between the momentum and the weights, each of these alone in its paper:

MuonEq (2603.28254, row normalization R)   x_i / |x_i| for each row before orth; unlike the paper's sqrt(|x_i|^2 + eps)
                                           with max(|x_i|, eps)
Muon+ (2602.21545, Norm after Ortho)       rows, columns, or columns and then rows ("ColRow") of o divided by their
                                           norms; "match" then counts what has unit length, where the paper's rate is
                                           times sqrt(m/n)
RMNP (2603.20527)                          o_i = x_i / |x_i| for each row
Polar Express (2505.16932)                 orth="pe", ns_steps of the polynomials of :func:`polar_express`
NorMuon (2510.05491)                       v_i = b2 v_i + (1-b2) mean_j |o_ij|^2,  o_ij / (sqrt(v_i) + eps), and that
                                           0.2 sqrt(mn) long ("match", as the paper) or |o| (as the authors' code)
"""

import math
from functools import cache

import numpy as np
import torch

from references.algebra import unfold

QUINTIC = (3.4445, -4.7750, 2.0315)


def polar(x):
    """The partial isometry U_r V_r^H; singular values under the usual numerical-rank threshold count as zero."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s > max(x.shape) * torch.finfo(s.dtype).eps * s[0]
    return u[:, kept] @ vh[kept]


def newton_schulz(x, steps=5, coefficients=QUINTIC, eps=1e-7, safety=1.0):
    """One triple for all steps, or one for each."""
    each = coefficients if isinstance(coefficients, list) else [coefficients] * steps
    x = x / max(float(torch.linalg.norm(x)), eps) / safety
    for a, b, c in each:
        gram = x @ x.mH
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def equioscillating(low, high):
    """The odd quintic whose largest |p(x) - 1| on [low, high] is least: it is reached four times, by Remez exchange."""
    x = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high])
    if low / high > 1 - 1e-5:  # the limit, which has p(u) = 1 and p'(u) = p''(u) = 0
        return np.array([15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5])
    for _ in range(100):
        *p, _ = np.linalg.solve(np.stack([x, x**3, x**5, np.array([1, -1, 1, -1])], 1), np.ones(4))
        x[1:3] = np.sort(np.sqrt(np.roots([5 * p[2], 3 * p[1], p[0]]).real))
    return np.array(p)


@cache
def polar_express(count, low=1e-3, cushion=0.02407327424182761, safety=1.01):
    """Algorithm 2: greedily the best quintic for what is left; for [max(low, cushion high), high], recentred on 1."""
    found, high, powers = [], 1.0, np.array([1, 3, 5])
    for _ in range(8):
        p = equioscillating(max(low, cushion * high), high)
        p = 2 * p / sum(float((p * x**powers).sum()) for x in (low, high))
        low = float((p * low**powers).sum())
        high = 2 - low
        found.append(p)
    found = [p / safety**powers for p in found[:-1]] + [found[-1]]
    return [found[min(i, 7)].tolist() for i in range(count)]


def unit(x, dim, floor):
    return x / torch.linalg.norm(x, dim=dim, keepdim=True).clamp_min(floor)


def scale_of(scale, rows, columns, unit="none"):
    if scale == "match":
        return 0.2 * math.sqrt({"none": max(rows, columns), "rows": columns, "both": columns, "columns": rows}[unit])
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
        before="none",
        after="none",
        decay2=None,
    ):
        if p.ndim != 2 and not (flatten and p.ndim > 2):
            raise ValueError("Muon is for matrices; flatten=True makes a matrix of a tensor")
        self.p, self.lr, self.b, self.nesterov, self.ema = p.clone(), lr, momentum, nesterov, ema
        self.orth, self.ns_steps, self.ns_coefficients, self.eps = orth, ns_steps, ns_coefficients, eps
        self.scale, self.wd, self.before, self.after, self.b2 = scale, weight_decay, before, after, decay2
        self.m, self.v, self.t = torch.zeros_like(p), torch.zeros(p.shape[0], 1, dtype=torch.float64), 0

    def step(self, g):
        weight = 1 - self.b if self.ema else 1.0
        self.m = self.b * self.m + weight * g
        x = weight * g + self.b * self.m if self.nesterov else self.m
        x = unfold(x, 0)
        x = unit(x, 1, self.eps) if self.before == "rows" else x
        if self.orth == "rows":
            o = unit(x, 1, self.eps)
        elif self.orth == "pe":
            o = newton_schulz(x, coefficients=polar_express(self.ns_steps), eps=self.eps, safety=1.01)
        else:
            o = polar(x) if self.orth == "polar" else newton_schulz(x, self.ns_steps, self.ns_coefficients, self.eps)
        o = unit(o, 0, 1e-300) if self.after in ("columns", "both") else o
        o = unit(o, 1, 1e-300) if self.after in ("rows", "both") else o
        size = scale_of(self.scale, *x.shape, "rows" if self.orth == "rows" and self.after == "none" else self.after)
        if self.b2 is not None:
            self.v = self.b2 * self.v + (1 - self.b2) * o.abs().square().mean(1, keepdim=True)
            length = torch.linalg.norm(o)
            o = o / (self.v.sqrt() + self.eps)
            o = o / torch.linalg.norm(o).clamp_min(1e-300)
            size = 0.2 * math.sqrt(x.numel()) if self.scale == "match" else size * length
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * size * o.reshape(self.p.shape)
        self.t += 1
        return self.p
