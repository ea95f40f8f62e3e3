"""FOAM (arXiv 2512.07112): Adam's moments of block means, corrected by the rest of the newest gradient.

g~ = A g, the mean of each run of neighbours along the last mode;   R = g - E g~, E repeats a mean over its run
m~ = b1 m~ + (1-b1) g~
v~ = b2 v~ + (1-b2) |g~|^2
W  = W (1 - lr wd) - lr alpha sqrt(1-b2^t) / (1-b1^t) (E m~ + R) / (sqrt(E v~ + |R|^2) + eps')

The bias corrections are those of the authors' code, a factor of the step. eps' = sqrt(1-b2^t) eps is comoving's, which
corrects v before eps is added. The authors' code folds |g|^2 into v~, not |g~|^2 (square="entries"). Runs of 2^l
entries are the paper's; where they do not fill the mode comoving makes runs whose lengths differ by one.
"""

import torch

from references.algebra import real_zeros


class Foam:
    """step(grad) -> parameter; attributes p, m, v, t (finished steps)."""

    def __init__(
        self,
        p,
        lr,
        blocks,
        *,
        scale=0.25,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        square="means",
        raw_eps=False,
    ):
        self.p, self.lr, self.betas, self.eps, self.wd, self.scale = p.clone(), lr, betas, eps, weight_decay, scale
        self.square, self.raw_eps, self.t = square, raw_eps, 0
        length = p.shape[-1]
        self.run = [i * blocks // length for i in range(length)]
        self.m = torch.zeros((*p.shape[:-1], blocks), dtype=p.dtype)
        self.v = real_zeros(self.m.shape)

    def fold(self, x):
        means = []
        for j in range(self.m.shape[-1]):
            members = [x[..., i] for i in range(x.shape[-1]) if self.run[i] == j]
            means.append(sum(members) / len(members))
        return torch.stack(means, -1)

    def unfold(self, x):
        return torch.stack([x[..., j] for j in self.run], -1)

    def step(self, g):
        b1, b2 = self.betas
        self.t += 1
        mean = self.fold(g)
        rest = g - self.unfold(mean)
        squares = mean.abs() ** 2 if self.square == "means" else self.fold(g.abs() ** 2)
        self.m = b1 * self.m + (1 - b1) * mean
        self.v = b2 * self.v + (1 - b2) * squares
        root = (1 - b2**self.t) ** 0.5
        denominator = torch.sqrt(self.unfold(self.v) + rest.abs() ** 2) + self.eps * (1 if self.raw_eps else root)
        update = root / (1 - b1**self.t) * (self.unfold(self.m) + rest) / denominator
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * self.scale * update
        return self.p
