"""What moves along with the frame in any transport that follows it: linear slots, and statistics of single modes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from ..frames import Overlap
from ..linalg import abs_squared, multilinear, orthonormalize
from ..slots import Kind, Slot
from ..validate import check_choice
from .base import State, anew


@dataclass(frozen=True)
class Following:
    """What transports share that move linear slots, and statistics of single modes, along with the frame.

    Args:
        statistics: of COVARIANCE, BASIS and FACTORED slots: "carry" moves them by R_n, "keep" leaves their numbers in
            coordinates that have changed, "reset" forgets the directions alone: bases become the identity, the
            others their mean in every direction, which keeps the weight that bias correction counts on.
    """

    statistics: str = "carry"

    projects = True
    restarts = False
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("statistics", self.statistics, ("carry", "keep", "reset"))

    @property
    def resizes(self) -> bool:
        """Unless statistics keep their numbers, and with them their shape."""
        return self.statistics != "keep"

    def _move_most(self, state: State, rule: Sequence[Slot], overlap: Overlap, rows: int) -> State:
        """Every slot but variances, and caches of what moves."""
        moved: State = {}
        for slot in rule:
            if slot.kind is Kind.CACHE and (self.statistics != "keep" or slot.name not in state):
                continue
            x = state[slot.name]
            if slot.kind is Kind.LINEAR:
                moved[slot.name] = overlap.move(x)
            elif slot.kind is Kind.SCALAR:
                moved[slot.name] = x.clone()
            elif slot.kind is not Kind.VARIANCE and self.statistics == "carry":
                moved[slot.name] = _carried(slot, x, overlap, rows)
            elif slot.kind is not Kind.VARIANCE:
                moved[slot.name] = x if self.statistics == "keep" else _levelled(slot, x, overlap, rows)
        return moved


def known(variance: Tensor) -> Tensor:
    """A variance, in place: infinite where squares overflowed and their difference is no number; d becomes 0 there."""
    return variance.nan_to_num_(inf, posinf=inf)


def as_turned(slot: Slot, state: State, moved: State, overlap: Overlap, rows: int) -> tuple[Overlap, Tensor, Tensor]:
    """The overlap that a variance moves by, and |m|^2 and |m'|^2 in its coordinates."""
    mean, mean_moved = state[slot.mean], moved[slot.mean]
    if not slot.turned_by:
        return overlap, abs_squared(mean), abs_squared(mean_moved)
    order = mean.ndim - rows
    old, new = list[Tensor | None]([None] * order), list[Tensor | None]([None] * order)
    turns = list(overlap.matrices)
    for mode, name in slot.turned_by:
        q, q_moved, r = state[name], moved[name], turns[mode]
        old[mode], new[mode] = q.mH, q_moved.mH
        turns[mode] = None if q is q_moved and r is None else q_moved.mH @ (q if r is None else r @ q)
    turn = Overlap(tuple(turns))
    return turn, abs_squared(multilinear(mean, old)), abs_squared(multilinear(mean_moved, new))


def _levelled(slot: Slot, x: Tensor, overlap: Overlap, rows: int) -> Tensor:
    """A statistic that has forgotten all directions, but not its weight: its mean in each of them."""
    fresh = anew(slot, x, overlap, rows)
    if slot.kind is Kind.FACTORED:
        return fresh.add_(x.mean(-1, keepdim=True))
    if slot.kind is Kind.COVARIANCE:
        mean = x.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        return fresh.add_(torch.diag_embed(mean.expand(fresh.shape[:-1])))
    return fresh


def _carried(slot: Slot, x: Tensor, overlap: Overlap, rows: int) -> Tensor:
    """A statistic of one mode in the new frame."""
    r = overlap.matrices[slot.mode]
    if r is None:
        return x
    if slot.kind is Kind.FACTORED:
        squares = abs_squared(r)
        return (squares @ x.unsqueeze(-1)).squeeze(-1) if rows else squares @ x
    if slot.kind is Kind.COVARIANCE:
        return r @ x @ r.mH
    return _aligned(r @ x)


def _aligned(turned: Tensor) -> Tensor:
    """An orthonormal (*rows, r', r') basis that begins with the columns of R Q, of shape (*rows, r', r)."""
    size, columns = turned.shape[-2:]
    if columns < size:
        eye = torch.eye(size, dtype=turned.dtype, device=turned.device)
        turned = torch.cat([turned, eye.expand(*turned.shape[:-2], -1, -1)], dim=-1)
    # QR keeps every column as near to the span of those before it as it can; columns beyond the square are dropped.
    return orthonormalize(turned[..., :size])
