"""FRUGAL: the sign of what lies outside the frame."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec, Spec
from ..linalg import each_row, over
from ..validate import check_float
from .base import HELD, Holding, Update


@dataclass(frozen=True)
class Sign(Holding):
    """The rest of the gradient is stepped by signSGD, which has no state (FRUGAL, arXiv 2411.07837).

    w <- shrink w - lr (scale F d + rate sgn(g - F z))

    sgn(x) = x / |x|, the phase of a complex x, and 0 at 0. What is below ``floor`` of the gradient's largest entry
    counts as 0 too: it may be the rounding of g - F z, which would move weights without a gradient at full speed. So
    does what is no normal number, whose last digits are all that there is.

    Args:
        rate: relative to lr, > 0.
        floor: in [0, 1).
    """

    batched: ClassVar[bool] = True

    rate: float = 1.0
    floor: float = 1e-6

    def __post_init__(self) -> None:
        check_float("rate", self.rate, 0.0, open_low=True)
        check_float("floor", self.floor, 0.0, 1.0, open_high=True)

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """None."""
        return {}

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """w <- shrink w + factor F d + rate sgn(g - F z)."""
        gradient = state.pop(HELD)
        sizes = gradient.abs()
        most = each_row(sizes, update.rows).amax(-1) if update.rows else sizes.amax()
        least = over((most * self.floor).clamp_min(torch.finfo(gradient.dtype).tiny), gradient)
        rest = update.frame.add_lift(gradient.clone(memory_format=torch.contiguous_format), update.core, -1.0)
        rest = torch.where(rest.abs() > least, rest.sgn(), 0)
        update.write(weights)
        update.add(weights, rest, self.rate)
