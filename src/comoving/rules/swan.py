"""Gradients with standardized rows, whitened."""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import abs_squared, pairs
from ..slots import Slot
from ..validate import check_choice, check_float, check_int
from .adam import FIRST
from .cut import Over, cut
from .normalized import normalized
from .orthogonalize import newton_schulz
from .passing import hand_over, taken


@dataclass(frozen=True)
class SWAN:
    """SWAN (arXiv 2412.13148, Algorithms 1 to 3), real or complex, without state.

    g <- (z_i - mean of z_i) / (their standard deviation)      for each row z_i
    x <- g / |g|,  ``steps`` times  x <- beta (3 x - x x^H x)   which brings (g g^H)^(-1/2) g about
    d = s x |g| / |x|                                           of RMS s, unless there are rows of zeros

    The iteration is the paper's for (g g^H)^(-1/2), times g. With beta = 1/2 singular values come to 1; with 0.8 small
    ones grow by 2.4 instead of 1.5 a step, and large ones end between 0.56 and 1.6. Rows that are constant have no
    direction but rounding, and get no update. eps does not count. A matrix of one row, and what is no matrix, is not
    centred: d = s z / RMS.

    Args:
        steps: >= 1.
        beta: in (0, sqrt(3)/2): beyond, singular values would change their sign.
        scale: s > 0. The experiments of SinkGD (arXiv 2502.06742) have 0.05, times a rate of 0.02.
        over: the matrix of a tensor, as for :class:`Muon`: one per frequency of complex ones for "auto".
    """

    steps: int = 10
    beta: float = 0.8
    scale: float = 1.0
    over: Over = "auto"

    momentum = FIRST
    definite = False
    corrected = True
    linear = True
    elementwise: ClassVar[bool] = False
    timeless: ClassVar[bool] = True
    replays = True
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)
        check_float("beta", self.beta, 0.0, sqrt(3) / 2, open_low=True, open_high=True)
        check_float("scale", self.scale, 0.0, open_low=True)
        check_choice("over", self.over, ("auto", "flat", "each"))

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """None."""
        return ()

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(0, 1)."""
        return 0.0, 1.0

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """Nothing is kept."""
        hand_over(state, z)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor."""
        x, back = cut(taken(state), clock.rows, self.over)
        if x.shape[-2] == 1:
            return back(normalized(x, "rows").mul_(self.scale)).contiguous()
        g = standardized(x)
        x = newton_schulz(g, [(3 * self.beta, -self.beta, 0.0)] * self.steps, 0.0, x.dtype)
        flat = normalized(x.reshape(*x.shape[:-2], 1, -1), "rows").reshape(x.shape)
        size = abs_squared(g).mean((-2, -1), keepdim=True).sqrt_()
        return back(flat.mul_(size.mul_(self.scale))).contiguous()


def standardized(x: Tensor) -> Tensor:
    """The matrices x (*batch, m, n) with rows of mean 0 and variance 1, a new tensor; rows that are constant vanish."""
    x = x / _largest(x).clamp_min_(torch.finfo(x.dtype).tiny)
    x = x - x.mean(-1, keepdim=True)
    # What rounding leaves of a row without variance is no direction.
    return normalized(x * (_largest(x) > 8 * torch.finfo(x.dtype).eps), "rows")


def _largest(x: Tensor) -> Tensor:
    """The largest entry of each row, or part of a complex one, (*batch, m, 1)."""
    sizes = pairs(x).abs()
    return (sizes.amax(-1) if x.is_complex() else sizes).amax(-1, keepdim=True)
