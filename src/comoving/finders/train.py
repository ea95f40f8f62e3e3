"""Finders of tensor-train frames: TT-SVD, randomized, and by increments."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decompositions import Method
from ..frames.bond import BondFrame
from ..frames.interface import Interface, identity
from ..validate import check_choice, check_float, check_int
from .base import Memory, Memoryless
from .bonds import decompose, energy_of, extend, found, prune, scaled, sketch
from .operand import Operand


@dataclass(frozen=True)
class TrainSVD(Memoryless):
    """TT-SVD of each interface (Oseledets, 2011), the second one on what the first leaves.

    The first is the side that shrinks the data more; from its outer end to the bond each basis holds the leading left
    singular vectors of the unfolding, projected on all bases before. Then comes the other side, from its outer end.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1).
        method: "gram" takes eigenvectors of the Gram matrix of the smaller side of each unfolding, accurate for
            singular values above about sqrt(machine epsilon) of the largest; "svd" takes the small SVD after QR,
            accurate for all and slower.
    """

    fills = (BondFrame,)
    batched = False
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.0
    method: Method = "gram"

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        check_choice("method", self.method, ("gram", "svd"))

    def find(self, operand: Operand, start: BondFrame, warm: bool, memory: Memory) -> BondFrame:
        """Decompose anew; ``start`` only serves where the operand is zero."""
        x, nonzero = scaled(operand.full())
        if start.left_first:
            left, y = decompose(start.left, x.reshape(1, start.left.size, -1), self.method)
            right, _ = decompose(start.right, y.reshape(left.rank, -1, 1), self.method)
        else:
            right, y = decompose(start.right, x.reshape(-1, start.right.size, 1), self.method)
            left, _ = decompose(start.left, y.reshape(1, -1, right.rank), self.method)
        return found(left, right, start, nonzero)


@dataclass(frozen=True)
class TrainRandomized(Memoryless):
    """TT-SVD of Gaussian sketches of the operand (Halko, Martinsson and Tropp, 2011; Huber, Schneider and Wolf, 2017).

    With two reads the first interface comes from a sketch of r + oversampling columns and the second one exactly from
    what it leaves. With one read each comes from a sketch of its own, so that the data can stream past: the captured
    energy is lower where the spectrum decays slowly. Unlike :func:`comoving.decompositions.tt_randomized`, which keeps
    all bonds and sketches each of them, it needs the two interfaces of one bond, and a single sketch for each.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1).
        oversampling: columns of the sketch beyond the interface's largest rank, >= 0.
        reads: how often the data are read, 1 or 2.
        seed: of the sketch, >= 0; the same at every refresh and on all ranks.
    """

    fills = (BondFrame,)
    batched = False
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.0
    oversampling: int = 8
    reads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        check_int("oversampling", self.oversampling, 0)
        check_choice("reads", self.reads, (1, 2))
        check_int("seed", self.seed, 0)

    def find(self, operand: Operand, start: BondFrame, warm: bool, memory: Memory) -> BondFrame:
        """Sketch and decompose anew; ``start`` only serves where the operand is zero."""
        x, nonzero = scaled(operand.full())
        x = x.reshape(start.left.size, start.right.size)
        generator = torch.Generator().manual_seed(self.seed)
        if start.left_first or self.reads == 1:
            left, _ = decompose(start.left, self._columns(x, start.left, generator).unsqueeze(0))
            rows = left.down(x) if self.reads == 2 else self._columns(x.mT, start.right, generator).mT
            right, _ = decompose(start.right, rows.unsqueeze(-1))
        else:
            right, _ = decompose(start.right, self._columns(x.mT, start.right, generator).mT.unsqueeze(-1))
            left, _ = decompose(start.left, right.down(x.unsqueeze(-1)).movedim(-1, 0))
        return found(left, right, start, nonzero)

    def _columns(self, x: Tensor, side: Interface, generator: torch.Generator) -> Tensor:
        """x Omega, or x itself if that is no larger."""
        count = max(edge.rank for edge in side.edges()) + self.oversampling
        return x if count >= x.shape[1] else x @ sketch(x.shape[1], count, x, generator)


@dataclass(frozen=True)
class TrainIncrement(Memoryless):
    """Extends the last interfaces by what the operand adds and prunes them back (TT-ICE, arXiv 2211.12487).

    The side that shrinks the data more comes first. Written for the left, with the last frame's B_L and B_R:

    1. Y = X [conj(B_R), Omega], Omega some random directions of the right, for what is new on both sides;
    2. every edge of the left takes in leading directions of the residual of Y, from the leaves to the root;
    3. Z = (extended B_L)^H X tells the energy of every direction; those of least are dropped, from the root down;
    4. the right does the same with what is left of Z, exactly and without a sketch.

    The data are read twice, in one product with r + columns vectors and one with up to 2 r. No unfolding of them is
    decomposed, and what the operand does not reach stays as it was.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1).
        columns: of the Gaussian sketch, >= 1, of about unit norm like those of B.
        add: directions by which each edge grows before pruning, >= 1; None for as many as it has.
        seed: of the sketch, >= 0; the same at every refresh and on all ranks.
    """

    fills = (BondFrame,)
    batched = False
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.0
    columns: int = 8
    add: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        check_int("columns", self.columns, 1)
        if self.add is not None:
            check_int("add", self.add, 1)
        check_int("seed", self.seed, 0)

    def find(self, operand: Operand, start: BondFrame, warm: bool, memory: Memory) -> BondFrame:
        """One increment from ``start``; the very first frame is found by two reads of :class:`TrainRandomized`."""
        if not warm:
            return TrainRandomized(seed=self.seed).find(operand, start, warm, memory)
        left, right = start.left, start.right
        x = operand.full().reshape(left.size, right.size)
        if start.left_first:
            seen = x if right.basis is None else (self._with_sketch(right).mH @ x.mT).mT
            wider, _ = extend(left, scaled(seen)[0].unsqueeze(0), self.add)
            z, nonzero = scaled(x if wider.basis is None else _formed(wider).mH @ x)
            left, turn = prune(wider, _ranks(left), z @ z.mH)
            right = self._increment(right, (z if turn is None else turn @ z).unsqueeze(-1), mirrored=True)
        else:
            seen = x if left.basis is None else self._with_sketch(left).mH @ x
            wider, _ = extend(right, scaled(seen)[0].unsqueeze(-1), self.add)
            z, nonzero = scaled(x if wider.basis is None else (_formed(wider).mH @ x.mT).mT)
            right, turn = prune(wider, _ranks(right, True), z.mT @ z.conj(), mirrored=True)
            left = self._increment(left, (z if turn is None else z @ turn.mT).unsqueeze(0))
        return found(left, right, start, nonzero)

    def _increment(self, side: Interface, x: Tensor, mirrored: bool = False) -> Interface:
        wider, y = extend(side, x, self.add)
        return prune(wider, _ranks(side, mirrored), energy_of(y), mirrored)[0]

    def _with_sketch(self, side: Interface) -> Tensor:
        """[B, Omega] for an interface that is not whole."""
        columns = min(self.columns, side.size - side.rank)
        omega = sketch(side.size, columns, side.matrix, torch.Generator().manual_seed(self.seed))
        return torch.cat([_formed(side), omega], dim=1)


def _formed(side: Interface) -> Tensor:
    """B at full size, no larger than what :class:`TrainIncrement` sees: one plain product is faster than many."""
    return side.up(identity(side.rank, side.matrix))


def _ranks(side: Interface, mirrored: bool = False) -> tuple[int, ...]:
    return tuple(edge.rank for edge in side.edges(mirrored))
