"""What the engine asks of a preconditioner."""

from typing import Protocol

import torch
from torch import Tensor

from ..codecs import Part


class Precondition(Protocol):
    """Step 2b: turns a gradient into another of its shape; a frozen dataclass of hyper-parameters, without tensors.

    Everything after it, error feedback included, lives in its coordinates.
    """

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """Its slots for a tensor of this shape, by names that begin with "precondition."; all start at zero.

        Raises:
            ValueError: a tensor that it cannot serve.
        """
        ...

    def apply(self, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The preconditioned gradient, which may be the given one, which stays as it is.

        Args:
            gradient: of the view's shape and dtype.
            state: of the parameter; the slots are updated in place.
            step: the number of this step, from 1.
        """
        ...


def bounded(gradient: Tensor) -> Tensor:
    """The gradient, at most so large that sums of its squares stay finite: an infinite one would stay in means."""
    most = torch.finfo(gradient.dtype).max ** 0.5 / gradient.numel()
    size = gradient.abs().amax()
    return gradient * torch.where(size > most, most / size, 1).to(gradient.dtype)
