"""Nothing is kept."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Codec, Part
from ..frames import ModeFrame
from .base import Loss


@dataclass(frozen=True)
class Discard:
    """What lies outside the frame is lost (GaLore, arXiv 2403.03507). No state."""

    def parts(self, codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """None."""
        return {}

    def add_to(self, gradient: Tensor, state: dict[str, Tensor], codec: Codec) -> Tensor:
        """The gradient itself."""
        return gradient

    def keep(
        self,
        gradient: Tensor,
        core: Tensor,
        frame: ModeFrame,
        loss: Loss | None,
        state: dict[str, Tensor],
        codec: Codec,
    ) -> None:
        """Nothing."""

    def error(self, state: dict[str, Tensor], codec: Codec) -> Tensor:
        """Zero: nothing is encoded."""
        return torch.zeros(())
