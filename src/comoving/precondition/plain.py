"""No preconditioner."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Spec


@dataclass(frozen=True)
class Plain:
    """The gradient as it is. No state."""

    batched: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """None."""
        return {}

    def apply(self, gradient: Tensor, state: dict[str, Tensor], step: int, rows: int = 0) -> Tensor:
        """The gradient itself."""
        return gradient
