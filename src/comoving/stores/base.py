"""What the engine asks of a store."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Store(Protocol):
    """The weights of one parameter, as they are seen, for one step."""

    weights: Tensor
    """In the view's shape and working precision: what steps 5-7 change."""
    shares: bool
    """Whether they are the parameter's own storage, so that a change is there at once, block by block."""

    def prepared(self, weights: Tensor, seeds: Sequence[int]) -> Tensor:
        """Changed weights as they are written, which nothing can fail in but the writing itself.

        Args:
            weights: those of ``weights``, changed, or others of their shape.
            seeds: of random bits, where a store draws any: that of a parameter, or those of its blocks.
        """
        ...

    def write(self, prepared: Tensor) -> None:
        """Store what :meth:`prepared` returned; nothing where that is the parameter's own storage."""
        ...
