"""Hierarchical Tucker frames: each interface a binary tree of transfer tensors over leaf bases."""

from dataclasses import dataclass
from typing import Any

from ..validate import check_int
from .bond import Bonded, BondFrame, balanced_bond, check_bond
from .interface import Interface


@dataclass(frozen=True)
class Trees(Bonded):
    """Two dimension trees that meet at a bond: hierarchical Tucker (Hackbusch and Kuehn, 2009; Grasedyck, 2010).

    Ranks one per edge: on the left children before parents and left before right, the bond last; on the right, from
    there on, parents before children and left before right. For four modes cut in the middle r_1, r_2, r_12, r_3, r_4.

    Args:
        bond: k, the number of modes on the left, >= 1; None for the one that balances the entries best.
        tree: nested pairs of the modes 0, 1, ..., N - 1 in this order, such as ((0, 1), (2, (3, 4))), whose outermost
            pair is the bond; None for trees that halve the entries at each branching.
    """

    bond: int | None = None
    tree: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        if self.bond is not None:
            check_int("bond", self.bond, 1)
        if self.tree is not None:
            modes = _modes(self.tree)
            if modes != list(range(len(modes))) or len(modes) < 2:
                raise ValueError(f"tree must be nested pairs of the modes 0..N-1 in this order, got {self.tree}")
            if self.bond not in (None, len(_modes(self.tree[0]))):
                raise ValueError(
                    f"bond must be {len(_modes(self.tree[0]))} as in the tree {self.tree}, got {self.bond}"
                )

    def template(self, shape: tuple[int, ...]) -> BondFrame:
        """The whole frame of this shape: its two trees, without tensors."""
        if self.tree is not None:
            if len(shape) != len(_modes(self.tree)):
                raise ValueError(f"tree {self.tree} has {len(_modes(self.tree))} modes, shape {shape} has {len(shape)}")
            return BondFrame(_grown(self.tree[0], shape), _grown(self.tree[1], shape))
        if self.bond is not None or len(shape) < 2:
            check_bond(self.bond or 1, shape)
        k = balanced_bond(shape) if self.bond is None else self.bond
        return BondFrame(_halved(shape[:k]), _halved(shape[k:]))


def _modes(tree: object) -> list[int]:
    """The leaves in order."""
    if isinstance(tree, int) and not isinstance(tree, bool):
        return [tree]
    if isinstance(tree, tuple) and len(tree) == 2:  # pyright: ignore[reportUnknownArgumentType]
        return _modes(tree[0]) + _modes(tree[1])
    raise TypeError(f"tree must be made of pairs and ints, got {tree!r}")


def _grown(tree: Any, shape: tuple[int, ...]) -> Interface:
    if isinstance(tree, int):
        return Interface((shape[tree],))
    left, right = (_grown(child, shape) for child in tree)
    return Interface(left.sizes + right.sizes, children=(left, right))


def _halved(sizes: tuple[int, ...]) -> Interface:
    if len(sizes) == 1:
        return Interface(sizes)
    k = balanced_bond(sizes)
    return Interface(sizes, children=(_halved(sizes[:k]), _halved(sizes[k:])))
