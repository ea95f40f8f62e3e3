"""What the engine asks of a residual."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..codecs import Codec, Part
from ..frames import ModeFrame


class Loss(NamedTuple):
    """Momentum that a change of frame loses: factor * (F m - F' m'), old frame and moment, new frame and moment."""

    factor: float
    old_frame: ModeFrame
    old_momentum: Tensor
    new_frame: ModeFrame
    new_momentum: Tensor


class Residual(Protocol):
    """Keeps, or does not keep, what the frame cannot hold; a frozen dataclass without tensors."""

    def parts(self, codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """The slots of the residual for a tensor of this shape, stored by the codec."""
        ...

    def add_to(self, gradient: Tensor, state: dict[str, Tensor], codec: Codec) -> Tensor:
        """g~ = the gradient and what was kept. The gradient is not changed; without anything kept it is returned."""
        ...

    def keep(
        self,
        gradient: Tensor,
        core: Tensor,
        frame: ModeFrame,
        loss: Loss | None,
        state: dict[str, Tensor],
        codec: Codec,
    ) -> Tensor | None:
        """Keep what g~ - F z and the lost momentum leave, with z = ``core``; g~ may be overwritten.

        Returns:
            The Frobenius norm of what is kept, before encoding; None where nothing is.
        """
        ...

    def error(self, state: dict[str, Tensor], codec: Codec) -> Tensor:
        """An upper bound on the norm of what encoding lost, a real scalar."""
        ...
