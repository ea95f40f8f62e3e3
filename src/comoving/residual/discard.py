"""Nothing is kept."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec, Spec
from ..finders import Operand
from .base import Cores, Inside, Passage


@dataclass(frozen=True)
class Discard(Inside):
    """What lies outside the frame is lost (GaLore, arXiv 2403.03507). No state."""

    batched: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """None."""
        return {}

    def restore(
        self, gradient: Tensor, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Operand:
        """The gradient itself."""
        return Operand(gradient, rows=passage.rows)

    def keep(
        self, dense: Tensor, cores: Cores, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> None:
        """Nothing."""

    def error(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> Tensor:
        """Zero: nothing is encoded."""
        return torch.zeros(())
