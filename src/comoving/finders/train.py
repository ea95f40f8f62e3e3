"""Finders of tensor-train frames: TT-SVD, randomized, and by increments."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..frames.bond import BondFrame
from ..frames.interface import Interface
from ..validate import check_choice, check_float, check_int
from .bonds import Method, decompose, energy_of, extend, found, prune, scaled, sketch
from .operand import Operand


@dataclass(frozen=True)
class TrainSVD:
    """TT-SVD of each interface (Oseledets, 2011), the second one on what the first leaves.

    The first is the side that shrinks the data more; from its outer end to the bond each basis holds the leading left
    singular vectors of the unfolding, projected on all bases before. Then comes the other side, from its outer end.

    Args:
        momentum: rho of the operand, in [0, 1).
        method: "gram" takes eigenvectors of the Gram matrix of the smaller side of each unfolding, accurate for
            singular values above about sqrt(machine epsilon) of the largest; "svd" takes the small SVD after QR,
            accurate for all and slower.
    """

    momentum: float = 0.0
    method: Method = "gram"

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        check_choice("method", self.method, ("gram", "svd"))

    def find(self, operand: Operand, start: BondFrame, warm: bool) -> BondFrame:
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
class TrainRandomized:
    """TT-SVD of Gaussian sketches of the operand (Halko, Martinsson and Tropp, 2011; Huber, Schneider and Wolf, 2017).

    With two reads the first interface comes from a sketch of r + oversampling columns and the second one exactly from
    what it leaves. With one read each comes from a sketch of its own, so that the data can stream past: the captured
    energy is lower where the spectrum decays slowly.

    Args:
        momentum: rho of the operand, in [0, 1).
        oversampling: columns of the sketch beyond the interface's largest rank, >= 0.
        reads: how often the data are read, 1 or 2.
        seed: of the sketch, >= 0; the same at every refresh and on all ranks.
    """

    momentum: float = 0.0
    oversampling: int = 8
    reads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        check_int("oversampling", self.oversampling, 0)
        check_choice("reads", self.reads, (1, 2))
        check_int("seed", self.seed, 0)

    def find(self, operand: Operand, start: BondFrame, warm: bool) -> BondFrame:
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
class TrainIncrement:
    """Extends the last interfaces by what the operand adds and prunes them back (TT-ICE, arXiv 2211.12487).

    The first interface looks at X through the other one and a few random directions besides,

        Y = [X conj(B), X (I - conj(B) B^T) Omega],      E[Y Y^H] = X X^H   (and likewise for the right)

    takes in the leading directions of the residual of Y at every edge, from the leaves to the root, and drops those of
    least energy from the root to the leaves. The second one does the same with X projected on the new first one. That
    is two reads of the data for the projections and one, thinner, for the sketch; unfoldings are never decomposed.

    Args:
        momentum: rho of the operand, in [0, 1).
        columns: random directions in which the other side's complement is looked at, >= 1.
        add: directions by which each edge grows before pruning, >= 1; None for as many as it has.
        seed: of the random directions, >= 0; the same at every refresh and on all ranks.
    """

    momentum: float = 0.0
    columns: int = 8
    add: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        check_int("columns", self.columns, 1)
        if self.add is not None:
            check_int("add", self.add, 1)
        check_int("seed", self.seed, 0)

    def find(self, operand: Operand, start: BondFrame, warm: bool) -> BondFrame:
        """One increment from ``start``; the very first frame is found by two reads of :class:`TrainRandomized`."""
        if not warm:
            return TrainRandomized(seed=self.seed).find(operand, start, warm)
        x, nonzero = scaled(operand.full())
        x = x.reshape(start.left.size, start.right.size)
        if start.left_first:
            left = self._grown(start.left, self._seen(x, start.right).unsqueeze(0))
            right = self._grown(start.right, left.down(x).unsqueeze(-1), mirrored=True)
        else:
            right = self._grown(start.right, self._seen(x, start.left, mirrored=True).unsqueeze(-1), mirrored=True)
            left = self._grown(start.left, right.down(x.unsqueeze(-1)).movedim(-1, 0))
        return found(left, right, start, nonzero)

    def _grown(self, side: Interface, x: Tensor, mirrored: bool = False) -> Interface:
        if side.basis is None:
            return side
        wider, y = extend(side, x, self.add)
        return prune(wider, tuple(edge.rank for edge in side.edges(mirrored)), energy_of(y), mirrored)

    def _seen(self, x: Tensor, other: Interface, mirrored: bool = False) -> Tensor:
        """[X conj(B), X (I - conj(B) B^T) Omega], or mirrored the same of the transposed, transposed back."""
        if other.basis is None:
            return x
        generator = torch.Generator().manual_seed(self.seed)
        omega = sketch(other.size, min(self.columns, other.size), x, generator)
        inside = other.down(omega)
        if mirrored:
            own = other.down(x)
            return torch.cat([own, omega.mT @ x - inside.mH @ own])
        own = other.down(x.unsqueeze(-1)).squeeze(-1)
        return torch.cat([own, x @ omega - own @ inside.conj()], dim=1)
