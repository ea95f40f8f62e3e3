"""Interfaces: orthonormal matrices over several modes, stored as a binary tree of small tensors.

A tensor train and a hierarchical Tucker tree are one thing here. Each edge t of a binary tree over neighbouring modes
has an orthonormal basis B_t of (product of its mode sizes) x r_t, kept as

    a leaf          B_t = U_t                        U_t of (d, r_t)
    an inner edge   B_t = (B_left (x) B_right) T_t   T_t of (r_left, r_right, r_t), orthonormal as (r_left r_right, r_t)

A train is the tree that takes in one mode after the other, from the outer end to the bond. All its leaves but the
outer one are bare: identities without a rank of their own. So T_t is a left-orthogonal core (r_{j-1}, d_j, r_j), or, in
a train that comes from the last mode, a right-orthogonal core with its indices in the order of the data,
(d_j, r_j, r_{j-1}). An edge of full rank is whole: an identity, of which nothing is stored. No basis is formed at full
size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from math import prod
from typing import Self

import torch
from torch import Tensor

from ..draws import sent
from ..linalg import orthonormalize


@dataclass(frozen=True)
class Interface:
    """One edge of the tree with all below it. Tensors are real or complex and have no batch dimensions.

    Args:
        sizes: the sizes of the modes below, in the order of the data.
        basis: U of a leaf or T of an inner edge; None for a whole edge, below which all edges are whole.
        children: (left, right), or () for a leaf.
        bare: a leaf that is always whole and counts as no edge.
    """

    sizes: tuple[int, ...]
    basis: Tensor | None = None
    children: "tuple[Interface, ...]" = ()
    bare: bool = False

    @classmethod
    def train(cls, sizes: tuple[int, ...], mirrored: bool = False) -> Self:
        """A whole train over these modes, the outer end first; ``mirrored`` puts the outer end at the last mode."""
        outer, *others = sizes[::-1] if mirrored else sizes
        train = cls((outer,))
        for d in others:
            leaf = cls((d,), bare=True)
            both = (leaf, train) if mirrored else (train, leaf)
            train = cls(both[0].sizes + both[1].sizes, children=both)
        return train

    @property
    def size(self) -> int:
        """n, the number of rows of B."""
        return prod(self.sizes)

    @property
    def rank(self) -> int:
        """r, the number of columns of B."""
        return self.size if self.basis is None else self.basis.shape[-1]

    @property
    def matrix(self) -> Tensor:
        """U, or T as a matrix (r_left r_right, r): what has orthonormal columns. Not for a whole edge."""
        assert self.basis is not None
        return self.basis.flatten(0, -2)

    def stored(self, like: Tensor) -> Tensor:
        """The basis, an explicit identity of like's dtype and device for a whole edge."""
        if self.basis is not None:
            return self.basis
        rows = tuple(child.size for child in self.children) or self.sizes
        return identity(self.size, like).reshape(*rows, -1)

    def edges(self, mirrored: bool = False) -> Iterator["Interface"]:
        """All edges but the bare leaves, from the outer end to the bond: the left child's, the right child's, this.

        ``mirrored`` takes the right child first, for interfaces whose outer end is the last mode.
        """
        for child in self.children[::-1] if mirrored else self.children:
            yield from child.edges(mirrored)
        if not self.bare:
            yield self

    def rebuild(self, bases: Iterable[Tensor | None], mirrored: bool = False) -> "Interface":
        """The same tree with these bases, in the order of :meth:`edges`."""
        if self.bare:
            return self
        bases = iter(bases)
        children = self.children
        if children:
            left, right = children
            if mirrored:
                right = right.rebuild(bases, mirrored)
                left = left.rebuild(bases, mirrored)
            else:
                left = left.rebuild(bases, mirrored)
                right = right.rebuild(bases, mirrored)
            children = (left, right)
        return Interface(self.sizes, next(bases), children)

    def whole(self) -> "Interface":
        """The same tree with every edge whole."""
        return self.rebuild(repeat(None))

    def tensors(self, prefix: str, mirrored: bool = False) -> dict[str, Tensor]:
        """{prefix + number: basis}, numbered in the order of :meth:`edges`; whole edges leave gaps."""
        return {f"{prefix}{i}": e.basis for i, e in enumerate(self.edges(mirrored)) if e.basis is not None}

    def down(self, x: Tensor) -> Tensor:
        """B^H x: (..., n, c) -> (..., r, c), edge by edge from the leaves, as plain matrix products without copies."""
        return self._down(x.reshape(-1, *x.shape[-2:])).reshape(*x.shape[:-2], self.rank, x.shape[-1])

    def up(self, z: Tensor) -> Tensor:
        """B z: (..., r, c) -> (..., n, c)."""
        return self._up(z.reshape(-1, *z.shape[-2:])).reshape(*z.shape[:-2], self.size, z.shape[-1])

    def add_up(self, out: Tensor, z: Tensor, alpha: float, beta: float = 1.0) -> Tensor:
        """out <- beta out + alpha B z, in place, for a contiguous out of (p, n, c), without a temporary of its size."""
        if self.basis is None:
            return out.mul_(beta).add_(z, alpha=alpha)
        if all(child.basis is None for child in self.children):
            _add_product(out, self.matrix, z, alpha, beta)
            return out
        left, right = self.children
        p, _, c = out.shape
        y = product(self.matrix, z)
        if left.basis is None or (c == 1 and right.basis is not None):
            y = left._up(y.reshape(p, left.rank, right.rank * c))
            right.add_up(out.view(p * left.size, right.size, c), y.reshape(-1, right.rank, c), alpha, beta)
        else:
            y = right._up(y.reshape(p * left.rank, right.rank, c))
            left.add_up(out.view(p, left.size, right.size * c), y.reshape(p, left.rank, -1), alpha, beta)
        return out

    def overlap(self, older: "Interface") -> Tensor | None:
        """B'^H B of (r', r), B' this one's and B the older one's over the same tree, edge by edge from the leaves.

        None, the identity, where both are whole.

        Raises:
            ValueError: the trees differ.
        """
        if self.sizes != older.sizes or len(self.children) != len(older.children):
            raise ValueError(f"no overlap between an interface over {self.sizes} and one over {older.sizes}")
        if self.basis is None:
            return None if older.basis is None else older.up(identity(older.rank, older.basis))
        if older.basis is None:
            return self.down(identity(self.size, self.basis))
        old = older.basis
        if self.children:
            left, right = (a.overlap(b) for a, b in zip(self.children, older.children, strict=True))
            old = change(old, left, right)
        return self.matrix.mH @ old.flatten(0, -2)

    def defect(self) -> Tensor:
        """max |B^H B - I|, a real scalar."""
        r = self.overlap(self)
        return torch.zeros(()) if r is None else (r - identity(len(r), r)).abs().amax()

    def _down(self, x: Tensor) -> Tensor:
        """B^H x for x of (p, n, c)."""
        if self.basis is None:
            return x
        if self.children:
            left, right = self.children
            p, _, c = x.shape
            if c == 1:  # the last mode first: one product, not p of them
                x = right._down(x.reshape(p * left.size, right.size, 1)).reshape(p, left.size, right.rank)
                x = left._down(x)
            else:
                x = left._down(x.reshape(p, left.size, right.size * c)).reshape(p * left.rank, right.size, c)
                x = right._down(x)
            x = x.reshape(p, left.rank * right.rank, c)
        return product(self.matrix.mH, x)

    def _up(self, z: Tensor) -> Tensor:
        """B z for z of (p, r, c)."""
        if self.basis is None:
            return z
        z = product(self.matrix, z)
        if self.children:
            left, right = self.children
            p, _, c = z.shape
            if c == 1:
                z = left._up(z.reshape(p, left.rank, right.rank)).reshape(p * left.size, right.rank, 1)
                z = right._up(z)
            else:
                z = right._up(z.reshape(p * left.rank, right.rank, c)).reshape(p, left.rank, right.size * c)
                z = left._up(z)
            z = z.reshape(p, self.size, c)
        return z


def product(a: Tensor, x: Tensor) -> Tensor:
    """a x of (p, k, c) for a of (k, n) and x of (p, n, c), as one product where p or c is 1."""
    if x.shape[0] == 1:
        return (a @ x[0]).unsqueeze(0)
    if x.shape[2] == 1:
        rows = x[..., 0]
        # To few columns BLAS is up to four times faster on the transposes.
        return ((a @ rows.mT).mT if len(a) < min(16, a.shape[1]) else rows @ a.mT).unsqueeze(-1)
    return a.unsqueeze(0) @ x


def _add_product(out: Tensor, a: Tensor, x: Tensor, alpha: float, beta: float) -> None:
    if out.shape[0] == 1:
        out[0].addmm_(a, x[0], alpha=alpha, beta=beta)
    elif out.shape[2] == 1:
        out[..., 0].addmm_(x[..., 0], a.mT, alpha=alpha, beta=beta)
    else:
        out.baddbmm_(a.expand(out.shape[0], *a.shape), x, alpha=alpha, beta=beta)


def change(transfer: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """(left (x) right) T: a transfer tensor in other bases of its children, (r_left, r_right, r) -> (k, l, r)."""
    if left is not None:
        transfer = (left @ transfer.flatten(1)).unflatten(1, transfer.shape[1:])
    return transfer if right is None else right @ transfer


def fill(
    template: Interface,
    ranks: Iterable[int],
    older: Interface | None,
    like: Tensor,
    generator: torch.Generator,
    mirrored: bool = False,
) -> Interface:
    """An orthonormal interface of these ranks: the older one's leading directions, then Gaussian ones.

    Args:
        template: the tree.
        ranks: per edge, in the order of :meth:`Interface.edges`; a full rank makes the edge whole.
        older: over the same tree, or None. It is returned itself if no rank changes, and all its directions are kept
            if none shrinks.
        like: gives dtype and device.
        generator: of the directions that fill up; on the CPU, hence the same on all devices.
        mirrored: see :meth:`Interface.edges`.
    """
    ranks = iter(ranks)
    if template.bare:
        return template if older is None else older
    children = template.children
    if children:
        built: list[Interface] = []
        olds = (None, None) if older is None else older.children
        for child, old in list(zip(children, olds, strict=True))[:: -1 if mirrored else 1]:
            built.append(fill(child, ranks, old, like, generator, mirrored))
        children = (built[1], built[0]) if mirrored else (built[0], built[1])
    rank = next(ranks)
    if older is not None and older.rank == rank and all(a is b for a, b in zip(children, older.children, strict=True)):
        return older
    if rank == template.size:
        return Interface(template.sizes, None, children)
    rows = tuple(child.rank for child in children) or template.sizes
    fresh = sent(torch.randn((*rows, rank), generator=generator, dtype=torch.float64), like)
    if older is not None:
        known = older.stored(like)
        if children:  # in the new bases of the children
            left, right = (None if a is b else a.overlap(b) for a, b in zip(children, older.children, strict=True))
            known = change(known, left, right)
        fresh = torch.cat([known, fresh], dim=-1)[..., :rank]
    return Interface(template.sizes, orthonormalize(fresh.flatten(0, -2)).reshape(fresh.shape), children)


def identity(size: int, like: Tensor) -> Tensor:
    """I of (size, size) with like's dtype and device."""
    return torch.eye(size, dtype=like.dtype, device=like.device)
