"""The overlap of two frames: how coordinates in the one become coordinates in the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..linalg import abs_squared, multilinear


@dataclass(frozen=True)
class Overlap:
    """F'^H F of a new frame F' and an old one F, whose cores have the same modes.

    Args:
        matrices: one R_n of shape (*rows, r'_n, r_n) per mode of the core, None for the identity. Coordinates move as
            m' = m x_n R_n, independent variances as v' = v x_n |R_n|^2 entry by entry, since
            |R_1 (x) R_2|^2 = |R_1|^2 (x) |R_2|^2.
    """

    matrices: Sequence[Tensor | None]

    @cached_property
    def squares(self) -> tuple[Tensor | None, ...]:
        """|R_n|^2 entry by entry."""
        return tuple(None if r is None else abs_squared(r) for r in self.matrices)

    def move(self, x: Tensor) -> Tensor:
        """F'^H F x: coordinates of F x in the new frame."""
        return multilinear(x, self.matrices)

    def move_squares(self, x: Tensor) -> Tensor:
        """|F'^H F|^2 x, entry by entry: for independent entries of variance x, the variances in the new frame."""
        return multilinear(x, self.squares)

    def moved_shape(self, x: Tensor) -> list[int]:
        """The new core's shape, for x of the old one's, (*rows, r_1, ..., r_N)."""
        return _resized(x, self.matrices, -2)

    def spread(self, mass: Tensor) -> Tensor:
        """A mass repeated along modes that were whole, hence of length 1, and are compressed now."""
        return mass.expand(_resized(mass, self.matrices, -1))


def _resized(x: Tensor, matrices: Sequence[Tensor | None], side: int) -> list[int]:
    """The shape of x, with the length of that side of R_n along each mode that has one."""
    lead = x.ndim - len(matrices)
    modes = [d if r is None else r.shape[side] for d, r in zip(x.shape[lead:], matrices, strict=True)]
    return [*x.shape[:lead], *modes]
