"""Tensor-train frames: each interface a train of cores from its outer end to the bond."""

from dataclasses import dataclass

from ..validate import check_int
from .bond import Bonded, BondFrame, balanced_bond, check_bond
from .interface import Interface


@dataclass(frozen=True)
class Trains(Bonded):
    """Two tensor trains that meet at a bond (Oseledets, 2011): numbers linear in the order of the tensor.

    Ranks r_1, ..., r_{N-1}, one per bond. With mode size d and rank r < d everywhere, 2 d r + (N - 2) d r^2 numbers.

    Args:
        bond: k, the number of modes on the left, >= 1; None for the one that balances the entries best.
    """

    bond: int | None = None

    def __post_init__(self) -> None:
        if self.bond is not None:
            check_int("bond", self.bond, 1)

    def template(self, shape: tuple[int, ...]) -> BondFrame:
        """The whole frame of this shape: its two trees, without tensors."""
        if self.bond is not None or len(shape) < 2:
            check_bond(self.bond or 1, shape)
        k = balanced_bond(shape) if self.bond is None else self.bond
        return BondFrame(Interface.train(shape[:k]), Interface.train(shape[k:], mirrored=True))
