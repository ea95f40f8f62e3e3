"""Orthogonalized momentum with a second moment for each row."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import abs_squared
from ..slots import Kind, Slot
from ..validate import check_float
from .muon import Muon

ROWS = "moment.rows"


@dataclass(frozen=True)
class NorMuon(Muon):
    """NorMuon (arXiv 2510.05491): Muon whose rows have step sizes of their own, real or complex.

    O   = after(orth(before(x))) as in :class:`comoving.rules.Muon`
    v_i <- b2 v_i + (1 - b2) mean of |O_ij|^2 over j
    P   = O_ij / (sqrt(v_i) + eps)
    d   = s |O| P / |P|,   for "match"  0.2 sqrt(m n) P / |P|,  an update of RMS 0.2

    |.| is the norm of each matrix. v has an entry for each index of the first mode, real, in the slot "moment.rows";
    where a tensor is cut into several matrices it is the mean over them, and where its first mode has length 1 the
    direction is Muon's. v needs no bias correction: |P| takes it away. The update of a frame's core has the rows of the
    core.

    Args:
        decay2: b2 in [0, 1).
        decay, nesterov, ema, method, steps, coefficients, scale, over, bf16, before, after: of
            :class:`comoving.rules.Muon`.
    """

    decay2: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("decay2", self.decay2, 0.0, 1.0, open_high=True)

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m, and v of the first mode."""
        return (*super().slots(shape), Slot(ROWS, Kind.FACTORED, mode=0)) if shape else super().slots(shape)

    def _directed(self, x: Tensor, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        o, rows = self.orthogonal(x, eps), clock.rows
        if ROWS not in state:  # a number by itself
            return o.mul_(self.size(1, 1))
        before = state[ROWS]
        squares = abs_squared(o)
        # (*rows, [other modes,] m): of the first mode, unless that has length 1 and the rows are another one's.
        mean = squares.mean([n for n in range(rows, squares.ndim) if n != squares.ndim - 2])
        mean = mean if before.shape[-1] == mean.shape[-1] else mean.mean(-1, keepdim=True)
        v = state[ROWS] = before.lerp(mean, 1 - self.decay2)
        divisor = v.sqrt().add_(eps).clamp_min_(torch.finfo(v.dtype).tiny)
        p = o / divisor.reshape(*v.shape[:rows], *[1] * (o.ndim - rows - 2), -1, 1)
        m, n = o.shape[-2:]
        size, own = (torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True) for y in (o, p))
        # |P| is of the size of sqrt(m n), or zero with all of P.
        wanted = torch.full_like(size, 0.2 * sqrt(m * n)) if self.scale == "match" else size.mul_(self.size(m, n))
        return p.mul_(torch.where(own > 0, wanted / own, 0))
