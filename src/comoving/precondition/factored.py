"""Adafactor's second moment, factored over the modes."""

from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Spec
from ..linalg import abs_squared, bounded, norm, over
from ..validate import check_float


@dataclass(frozen=True)
class Factored:
    """g / sqrt(V), V a product of the mean squares of slices (Adafactor, arXiv 1804.04235), for any order N.

    b_t <- 1 - t^-decay                                   (b_1 = 0: no bias to correct)
    v_n <- b_t v_n + (1 - b_t) mean of |g|^2 + floor over every mode but n,       (d_n,), real, for each mode n
    V    = v_1 (x) ... (x) v_N / mean^(N-1),              mean = that of any v_n, they agree
    w    = g / sqrt(V),  then  w / max(1, RMS(w) / clip)

    For a matrix V is the paper's R C / 1^T R; a vector keeps the whole V. w has entries of about unit size. Several
    gradients that are absorbed for one step are preconditioned one by one. |g|^2 counts as at most so large that its
    means stay finite; without a clip, a g for which they would not is scaled down first.

    Args:
        decay: in (0, 1].
        floor: added to the squares, > 0.
        clip: largest root mean square of w, > 0; None for no limit.
    """

    batched: ClassVar[bool] = True
    replays: ClassVar[bool] = False

    decay: float = 0.8
    floor: float = 1e-30
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_float("decay", self.decay, 0.0, 1.0, open_low=True)
        check_float("floor", self.floor, 0.0, open_low=True)
        if self.clip is not None:
            check_float("clip", self.clip, 0.0, open_low=True)

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """The v_n."""
        return {f"precondition.{n}": Spec((d,), dtype.to_real()) for n, d in enumerate(shape)}

    def apply(self, gradient: Tensor, state: dict[str, Tensor], step: int, rows: int = 0) -> Tensor:
        """w, a new tensor."""
        order = gradient.ndim - rows
        size = prod(gradient.shape[rows:])
        gradient = gradient if self.clip is not None else bounded(gradient, rows)
        fresh = max(1, step) ** -self.decay  # 0 where an empty first gradient has set the count back
        most = torch.finfo(gradient.dtype).max / (2 * size)
        squares = abs_squared(gradient).add_(self.floor)
        w = gradient
        for n in range(order):
            others = [m - order for m in range(order) if m != n]
            # An infinite mean would stay for ever; half of the largest number, because sums round.
            mean = (squares.mean(others) if others else squares).clamp_max_(most)
            v = state[f"precondition.{n}"] = state[f"precondition.{n}"].lerp(mean, fresh)
            # V mode by mode, the mean once: the product of all v_n would leave the range of float32.
            share = v if n == 0 else v / v.mean(-1, keepdim=True)
            w = w * share.rsqrt().reshape(*v.shape[:rows], *(1,) * n, -1, *(1,) * (order - 1 - n))
        if self.clip is None:
            return w
        return w / over((norm(w, rows) / (sqrt(size) * self.clip)).clamp_min(1.0), w)
