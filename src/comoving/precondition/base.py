"""What the engine asks of a preconditioner."""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..codecs import Spec


class Precondition(Protocol):
    """Step 2b: turns a gradient into another of its shape; a frozen dataclass of hyper-parameters, without tensors.

    Everything after it, error feedback included, lives in its coordinates.
    """

    batched: ClassVar[bool]
    """Whether it serves the rows of a batch, every one as if it were alone."""

    replays: ClassVar[bool]
    """Whether it calls the same operations with the same numbers at every step; see :class:`comoving.rules.Rule`."""

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """Its slots for a tensor of this shape, by names that begin with "precondition."; all start at zero.

        Raises:
            ValueError: a tensor that it cannot serve.
        """
        ...

    def apply(self, gradient: Tensor, state: dict[str, Tensor], step: int, rows: int = 0) -> Tensor:
        """The preconditioned gradient, which may be the given one, which stays as it is.

        Args:
            gradient: of the view's shape and dtype, the rows of a batch in front: (*rows, d_1, ..., d_N).
            state: of the parameter; slots are replaced, and their tensors left as they are: a step that fails later
                goes back to them.
            step: the number of this step, from 1.
            rows: number of leading dimensions that count rows, 0 or 1; the slots have the rows in front.
        """
        ...
