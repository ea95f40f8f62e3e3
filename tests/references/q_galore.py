"""Q-GaLore (2407.08296) for a real m x n matrix: GaLore whose moments and weights are stored in 8 bits, and whose
subspace is found anew less and less often where it has settled.

    a refresh at step t, from step 0:  P = U[:, :r] of G = U S V^T when m <= n,  else  Q = V[:, :r]
        c = |<p_1', p_1>| of the new and the last leading direction; the last k of them are kept
        with k of them, and their mean >= threshold:  the interval T becomes growth T
        next refresh at t + T   (the second one at a phase of 0 ... T - 1, or at T where the phase is 0)
    R = P^T G, or G Q
    M = b1 M~ + (1-b1) R,  V = b2 V~ + (1-b2) R^2,  N = (M/(1-b1^t)) / (sqrt(V/(1-b2^t)) + eps)
    W = q( W~ (1 - lr wd) - lr alpha P N )   (or N Q^T)

X~ is what is read of what was stored. In blocks of b consecutive numbers of a row, as equal as can be:

    M, W    step = max|x| / 127,  code = round(x / step), for W floor(x / step) + (u < x / step - floor(x / step)) with
            u uniform in [0, 1) where rounding is stochastic,  read as step code
    V       step = max sqrt(x) / 255,  code = round(sqrt(x) / step) but at least 1,  read as (step code)^2

with steps kept in float32. The paper's codes of M and V are those of bitsandbytes, its codes of W have a zero point,
its projections 4 bits. `find(grad) -> P or Q` lets a test hand in what an implementation reads of them.
"""

import math

import torch

from references.galore import GaLore


def in_blocks(x, block, codes):
    """codes(values of one block) for each block of each row, put together again."""
    rows = []
    for row in x:
        pieces = math.ceil(len(row) / block)
        width = math.ceil(len(row) / pieces)
        rows.append(torch.cat([codes(row[k : k + width]) for k in range(0, len(row), width)]))
    return torch.stack(rows)


def single(x):
    """A number as float32 holds it."""
    return float(torch.tensor(x, dtype=torch.float32))


def signed(values, draw=None):
    step = single(float(values.abs().max()) / 127)
    if step == 0:
        return torch.zeros_like(values)
    scaled = values / step
    if draw is None:
        return step * scaled.round()
    low = scaled.floor()
    return step * (low + (draw(len(values)) < (scaled - low).float()).double()).clamp(-127, 127)


def squares(values):
    step = single(math.sqrt(float(values.max())) / 255)
    return torch.zeros_like(values) if step == 0 else (step * (values.sqrt() / step).round().clamp(1, 255)) ** 2


class QGaLore(GaLore):
    """step(grad) -> parameter as it is read; beside GaLore's attributes: interval, refreshes (the steps of them)."""

    def __init__(self, p, lr, rank, *, every=200, phase=0, threshold=0.4, patience=5, growth=2, block=256,
                 weight_block=None, draw=None, **options):  # fmt: skip
        super().__init__(p, lr, rank, refresh_at=self.due, **options)
        self.search, self.find = self.find, self.timed
        self.interval, self.phase, self.threshold, self.growth = every, phase, threshold, growth
        self.patience, self.block, self.weight_block, self.draw = patience, block, weight_block, draw
        self.queue, self.next, self.refreshes, self.last = [], 0, [], None

    def due(self, t):
        return t == self.next

    def timed(self, g):
        frame = self.search(g)
        leading = frame[:, 0]
        if self.last is not None:
            self.queue = [*self.queue, abs(float(leading @ self.last))][-self.patience :]
            if len(self.queue) == self.patience and sum(self.queue) / self.patience >= self.threshold:
                self.interval *= self.growth
        self.last = leading
        self.refreshes.append(self.t)
        self.next = self.t + self.interval if self.t else self.phase or self.interval
        return frame

    def step(self, g):
        super().step(g)
        self.m, self.v = in_blocks(self.m, self.block, signed), in_blocks(self.v, self.block, squares)
        if self.weight_block is not None:
            self.p = in_blocks(self.p, self.weight_block, lambda values: signed(values, self.draw))
        return self.p
