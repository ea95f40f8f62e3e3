"""SUMO: what lies outside the frame as it is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec, Spec
from ..validate import check_float
from .base import HELD, Holding, Update


@dataclass(frozen=True)
class Raw(Holding):
    """The rest of the gradient is stepped by SGD, without momentum (SUMO, arXiv 2505.24749). No state.

    w <- shrink w - lr (scale F d + rate (g - F z))

    The rest has the size of the gradients, where d has entries of about unit size: which of them leads is up to the
    loss, and to ``rate``. Several gradients of one step add up.

    Args:
        rate: relative to lr, > 0.
    """

    batched: ClassVar[bool] = True

    rate: float = 1.0

    def __post_init__(self) -> None:
        check_float("rate", self.rate, 0.0, open_low=True)

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """None."""
        return {}

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """w <- shrink w + factor F d - lr rate (g - F z)."""
        gradient = state.pop(HELD)
        rest = update.frame.add_lift(gradient.clone(memory_format=torch.contiguous_format), update.core, -1.0)
        update.write(weights)
        update.add(weights, rest, self.rate)
