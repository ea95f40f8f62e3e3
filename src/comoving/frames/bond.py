"""Frames by two interfaces at a bond, and what trains and trees have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Spec
from ..validate import check_choice
from .base import SIDES, Rank, Ranks, Side
from .interface import Interface, fill
from .modes import check_rank
from .overlap import Overlap


@dataclass(frozen=True)
class BondFrame:
    """A tensor cut at a bond into a matrix X of (d_1 ... d_k) x (d_{k+1} ... d_N), seen from orthonormal interfaces.

    project  z = B_L^H X conj(B_R)     (d_1, ..., d_N) -> (r_L, r_R)
    lift     F z = B_L z B_R^T         (r_L, r_R) -> (d_1, ..., d_N)

    As a matrix on row-major tensors F = B_L (x) B_R: a two-sided matrix frame whose sides are stored edge by edge.
    """

    left: Interface
    right: Interface

    @property
    def bond(self) -> int:
        """k, the number of modes on the left."""
        return len(self.left.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_1, ..., d_N)."""
        return self.left.sizes + self.right.sizes

    @property
    def ranks(self) -> Ranks:
        """One rank per edge: the left interface's from its outer end to the bond, then the right one's from there on.

        For a train r_1, ..., r_{N-1}. The bond is one edge and counted once.
        """
        right = [edge.rank for edge in self.right.edges(mirrored=True)]
        return (*(edge.rank for edge in self.left.edges()), *right[-2::-1])

    def project(self, x: Tensor) -> Tensor:
        """The coordinates F^H x, from the side first that leaves less."""
        left, right = self.left, self.right
        if self.left_first:
            half = left.down(x.reshape(left.size, right.size))
            return right.down(half.unsqueeze(-1)).squeeze(-1)
        half = right.down(x.reshape(left.size, right.size, 1)).squeeze(-1)
        return left.down(half)

    def lift(self, z: Tensor) -> Tensor:
        """The tensor F z."""
        if self.left_first:
            return self.left.up(self.right.up(z.unsqueeze(-1)).squeeze(-1)).reshape(self.shape)
        return self.right.up(self.left.up(z).unsqueeze(-1)).reshape(self.shape)

    def add_lift(self, out: Tensor, z: Tensor, alpha: float, beta: float = 1.0) -> Tensor:
        """out <- beta out + alpha F z, in place, and without a temporary of out's size if out is contiguous."""
        if not out.is_contiguous() or out.dtype != z.dtype:
            if beta != 1.0:
                out.mul_(beta)
            return out.add_(self.lift(z), alpha=alpha)
        left, right = self.left, self.right
        if self.left_first:
            half = right.up(z.unsqueeze(-1)).reshape(1, left.rank, right.size)
            left.add_up(out.view(1, left.size, right.size), half, alpha, beta)
        else:
            half = left.up(z).unsqueeze(-1)
            right.add_up(out.view(left.size, right.size, 1), half, alpha, beta)
        return out

    def overlap(self, older: "BondFrame") -> Overlap:
        """R_1 = B_L'^H B_L and R_2 = B_R'^H B_R, this frame's bases against the older one's, contracted edge by edge.

        None where both are whole. F'^H F = R_1 (x) R_2, so that moments move as m' = m x_1 R_1 x_2 R_2.
        """
        return Overlap((self.left.overlap(older.left), self.right.overlap(older.right)))

    def defect(self) -> Tensor:
        """The larger max |B^H B - I| of the two interfaces, a real scalar."""
        defects = [side.defect() for side in (self.left, self.right) if side.basis is not None]
        return torch.stack(defects).amax() if defects else torch.zeros(())

    def tensors(self) -> dict[str, Tensor]:
        """What the optimizer's state stores: "frame.left.i" and "frame.right.i", numbered from the outer ends."""
        return self.left.tensors("frame.left.") | self.right.tensors("frame.right.", mirrored=True)

    @property
    def left_first(self) -> bool:
        """Whether the left interface shrinks a tensor more than the right one does."""
        return self.left.rank * self.right.size <= self.left.size * self.right.rank


class Bonded(ABC):
    """What the specifications of bond frames share; a subclass says where a shape is cut and which tree each side has.

    Frozen dataclasses derive from it. Ranks are given one per edge in the order of :attr:`BondFrame.ranks`.
    """

    makes = BondFrame
    batched: ClassVar[bool] = False
    modal = True

    @abstractmethod
    def template(self, shape: tuple[int, ...]) -> BondFrame:
        """The whole frame of this shape: its two trees, without tensors."""

    def ranks(self, shape: tuple[int, ...], rank: Rank, side: Side = "auto") -> Ranks:
        """One rank per edge for a tensor of this shape; the bond's is r in the core (r, r).

        The limit of an edge is the smaller side of its unfolding; of a tuple, also the product of the ranks of the two
        edges (or the rank and the mode) that it meets at either end: more directions than that would be redundant.

        Args:
            shape: (d_1, ..., d_N).
            rank: an int, that many directions for every edge, or its limit if that is less; a float in (0, 1], that
                fraction of the entries in the core, at one rank for all edges; or a tuple with one entry per edge, None
                for as many as the others allow.
            side: only for matrices in mode-wise frames; checked and otherwise without effect.

        Raises:
            ValueError: a rank outside these intervals, a tuple of the wrong length or with an entry above its limit, a
                shape without the bond.
            TypeError: a rank of another type.
        """
        check_rank(rank)
        check_choice("side", side, SIDES)
        frame = self.template(shape)
        limits = [min(edge.size, prod(shape) // edge.size) for edge in _edges(frame)]
        if isinstance(rank, tuple):
            return _checked_tuple(frame, rank, limits)
        if isinstance(rank, float):
            root = sqrt(rank * prod(shape))
            rank = max(1, min((int(root), int(root) + 1), key=lambda r: abs(r * r - root * root)))
        return tuple(min(rank, limit) for limit in limits)

    def core_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """(r, r), r the rank at the bond."""
        left, right = _split(self.template(shape), ranks)
        return left[-1], right[-1]

    def mass_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """The core's: a change of frame turns both of its modes."""
        return self.core_shape(shape, ranks)

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """What a frame of these ranks stores."""
        frame = self.template(shape)
        left, right = _split(frame, ranks)
        found = _schema("frame.left.", frame.left, left, dtype)
        return found | _schema("frame.right.", frame.right, right, dtype, True)

    def load(self, state: Mapping[str, Tensor], shape: tuple[int, ...], like: Tensor | None = None) -> BondFrame:
        """The frame whose tensors are in the state; edges without one are whole."""
        frame = self.template(shape)
        left = (state.get(f"frame.left.{i}") for i, _ in enumerate(frame.left.edges()))
        right = (state.get(f"frame.right.{i}") for i, _ in enumerate(frame.right.edges()))
        return BondFrame(frame.left.rebuild(left), frame.right.rebuild(right, mirrored=True))

    def start(self, like: Tensor, ranks: Ranks, older: BondFrame | None, seed: int) -> BondFrame:
        """An orthonormal frame of these ranks to search from.

        Args:
            like: a tensor of the shape, dtype and device to be framed.
            ranks: one per edge.
            older: the frame so far, whose leading directions are kept, or None.
            seed: of the Gaussian directions that fill up; drawn on the CPU, hence equal on all devices and ranks.
        """
        frame = self.template(tuple(like.shape))
        left, right = _split(frame, ranks)
        generator = torch.Generator().manual_seed(seed)
        old_left, old_right = (None, None) if older is None else (older.left, older.right)
        return BondFrame(
            fill(frame.left, left, old_left, like, generator),
            fill(frame.right, right, old_right, like, generator, mirrored=True),
        )


def balanced_bond(shape: tuple[int, ...]) -> int:
    """The bond whose longer side is shortest, the first of those."""
    return min(range(1, len(shape)), key=lambda k: max(prod(shape[:k]), prod(shape[k:])))


def check_bond(bond: int, shape: tuple[int, ...]) -> None:
    """Raise unless 1 <= bond < N."""
    if not 1 <= bond < len(shape):
        raise ValueError(f"bond must lie in [1, N - 1], got {bond} for the {len(shape)} modes of shape {shape}")


def _edges(frame: BondFrame) -> list[Interface]:
    """The edges in the order of the ranks."""
    return [*frame.left.edges(), *list(frame.right.edges(mirrored=True))[-2::-1]]


def _split(frame: BondFrame, given: Ranks) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ranks of each interface, both in its own order from the outer end to the bond."""
    k = sum(1 for _ in frame.left.edges())
    ranks = tuple(r for r in given if r is not None)  # an edge is whole by its number
    if len(ranks) != len(_edges(frame)):
        raise ValueError(f"ranks {ranks} has {len(ranks)} entries, shape {frame.shape} needs {len(_edges(frame))}")
    return ranks[:k], (*ranks[: k - 1 : -1], ranks[k - 1])


def _schema(
    prefix: str, side: Interface, ranks: tuple[int, ...], dtype: torch.dtype, mirrored: bool = False
) -> dict[str, Spec]:
    rank_of = {id(edge): r for edge, r in zip(side.edges(mirrored), ranks, strict=True)}
    return {
        f"{prefix}{i}": Spec((*(rank_of.get(id(c), c.size) for c in edge.children), r), dtype)
        if edge.children
        else Spec((edge.size, r), dtype)
        for i, (edge, r) in enumerate(zip(side.edges(mirrored), ranks, strict=True))
        if r < edge.size
    }


def _checked_tuple(frame: BondFrame, rank: tuple[int | None, ...], limits: list[int]) -> tuple[int, ...]:
    if len(rank) != len(limits):
        raise ValueError(f"rank {rank} has {len(rank)} entries, shape {frame.shape} needs {len(limits)}, one per edge")
    position = {id(edge): i for i, edge in enumerate(_edges(frame))}
    position[id(frame.right)] = position[id(frame.left)]
    meetings = [*_meetings(frame.left, position), *_meetings(frame.right, position)]
    ranks = [limit if r is None else r for r, limit in zip(rank, limits, strict=True)]

    def allowed(i: int) -> int:
        others = [prod(ranks[j] for j in edges if j != i) * fixed for edges, fixed in meetings if i in edges]
        return min([limits[i], *others])

    for _ in ranks:  # each sweep settles at least one
        ranks = [allowed(i) if r is None else ranks[i] for i, r in enumerate(rank)]
    for i, r in enumerate(ranks):
        if r > allowed(i):
            raise ValueError(
                f"rank {rank} asks for {r} directions at edge {i} of shape {frame.shape}, where its unfolding and its "
                f"neighbours allow {allowed(i)}: use 1..{allowed(i)} or None"
            )
    return tuple(ranks)


def _meetings(edge: Interface, position: Mapping[int, int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """For each branching the positions of the edges that meet there, and the size of the bare mode that does, or 1."""
    if edge.children:
        ends = (*edge.children, edge)
        yield tuple(position[id(e)] for e in ends if not e.bare), prod(e.size for e in ends if e.bare)
        for child in edge.children:
            yield from _meetings(child, position)
