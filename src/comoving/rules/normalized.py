"""Rows and columns of unit size."""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import abs_squared, lerp, pairs, unit_size
from ..slots import Kind, Slot
from ..validate import check_choice, check_float, check_int
from .adam import FIRST
from .cut import cut
from .passing import hand_over, taken

_Along = Literal["rows", "columns"]
_LEAST = 1e-20
"""Below the length of all that is not zero and was divided by its largest entry, be that no normal number."""


@dataclass(frozen=True)
class Normalized:
    """Rows and columns brought to unit root mean square in turn, of the gradient or of its momentum; real or complex.

    m <- b m + (1 - b) z                    x = m, with nesterov  b m + (1 - b) z;  x = z and no slot at all for b = 0
    x_i <- 0                                for rows with |x_i| <= threshold mean_j |x_j|
    x <- diag(1 / RMS of the rows) x        and  x <- x diag(1 / RMS of the columns), in turn, ``passes`` of them
    d = s x

    What is zero stays zero, and eps does not count. A tensor is the matrix of its first mode longer than 1 against all
    others; where no other is longer than 1 it is a single row, which no threshold leaves out. m has z's dtype.

    With other fields this is

    - SinkGD (arXiv 2502.06742, Algorithms 3 and 4): L = 5 times rows, then columns, ``passes=10``; the default. Its
      experiments step by 0.05 times a rate of 0.02.
    - SCALE (arXiv 2506.16659): one pass, over rows for weights (out, in), which it calls columns; over columns for an
      embedding (tokens, width); momentum of 0.9 for the head alone. The paper's formula has norms of 1, its code RMS.
    - the rule for embeddings and heads of DeepSeek-V4.1-Flash (arXiv 2609.19969, Algorithm 1, as others report it, but
      for its eps of 1e-20): ``decay=0.95, nesterov=True, passes=11, threshold=1e-3, scale=0.18``.

    Args:
        decay: b in [0, 1); the group's betas do not count.
        nesterov: look one step ahead.
        passes: >= 1.
        first: which of "rows" and "columns" the first pass is of.
        threshold: rows of a norm of at most this share of the mean norm get no update, >= 0.
        scale: s > 0.
    """

    decay: float = 0.0
    nesterov: bool = False
    passes: int = 10
    first: _Along = "rows"
    threshold: float = 0.0
    scale: float = 1.0

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
        check_float("decay", self.decay, 0.0, 1.0, open_high=True)
        check_choice("nesterov", self.nesterov, (True, False))
        check_int("passes", self.passes, 1)
        check_choice("first", self.first, ("rows", "columns"))
        check_float("threshold", self.threshold, 0.0)
        check_float("scale", self.scale, 0.0, open_low=True)

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m; none without decay."""
        return (Slot(FIRST, Kind.LINEAR),) if self.decay else ()

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b, 1 - b)."""
        return self.decay, 1 - self.decay

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """m."""
        if not self.decay:
            hand_over(state, z)
            return
        m = state[FIRST] = lerp(state[FIRST], z, 1 - self.decay)
        hand_over(state, lerp(m, z, 1 - self.decay) if self.nesterov else m)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor."""
        x, back = cut(taken(state), clock.rows, "flat")
        if x.shape[-2] == 1:
            return back(normalized(x, "rows").mul_(self.scale))
        if self.threshold:
            x = unit_size(x, clock.rows)
            x = x * _kept(x, self.threshold)
        return back(in_turn(x, self.first, self.passes).mul_(self.scale))


def in_turn(x: Tensor, first: _Along, passes: int) -> Tensor:
    """The matrices x (*batch, m, n) with rows and columns of unit root mean square, one after the other.

    Passes after the second are over |x|^2 alone, as products with vectors: diag(r) x diag(c) is made at the end. Two
    passes leave each row that is not zero with some entry above 1/n, and each column with one above 1, so that no
    square which counts leaves the range.
    """
    second: _Along = "columns" if first == "rows" else "rows"
    x = normalized(x, first)
    if passes > 1:
        x = normalized(x, second)
    if passes <= 2:
        return x
    squares, (m, n), tiny = abs_squared(x), x.shape[-2:], torch.finfo(x.dtype).tiny ** 0.8
    r, c = squares.new_ones(*squares.shape[:-1], 1), squares.new_ones(*squares.shape[:-2], n, 1)  # squares of both
    turned = squares.mT
    for k in range(2, passes):
        if (first if k % 2 == 0 else second) == "rows":
            r = n / (squares @ c).clamp_min_(tiny)
        else:
            c = m / (turned @ r).clamp_min_(tiny)
    return (x * r.sqrt_()).mul_(c.sqrt_().mT)


def normalized(x: Tensor, along: _Along) -> Tensor:
    """The matrices x (*batch, m, n) with rows or columns of unit root mean square, a new tensor; zeros stay zeros."""
    if not x.numel():
        return x.clone()
    real = pairs(x)
    count = x.shape[-1] if along == "rows" else x.shape[-2]
    axis = x.ndim - (1 if along == "rows" else 2)
    axes = (axis, x.ndim) if x.is_complex() else (axis,)
    # Squares of the entries may leave the range; those of entries of at most 1 do not.
    unit = real.abs().amax(axes, keepdim=True)
    scaled = real / unit.clamp_min_(torch.finfo(real.dtype).tiny)
    length = torch.linalg.vector_norm(scaled, dim=axes, keepdim=True)
    scaled.mul_(sqrt(count) / length.clamp_min_(_LEAST))
    return torch.view_as_complex(scaled) if x.is_complex() else scaled


def _kept(x: Tensor, threshold: float) -> Tensor:
    """Which rows of the matrices x (*batch, m, n) are longer than the threshold, as numbers (*batch, m, 1)."""
    length = abs_squared(x).sum(-1, keepdim=True).sqrt_()
    return length > threshold * length.mean(-2, keepdim=True)
