"""Transports: what happens to the moments when their frame changes.

A transport dispatches on the kind of a slot and knows no rule. Notation: R_n = U'_n^H U_n is the overlap of the new and
the old frame in mode n (None where both are whole), |R|^2 is taken entry by entry, and c1, c2 are the total weights
1 - b1^t and 1 - b2^t that the moments have given to past gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .clock import TINY, Clock
from .frames import Overlap
from .linalg import abs_squared, multilinear, orthonormalize, over
from .slots import Kind, Slot
from .validate import check_choice

State = dict[str, Tensor]


class Transport(Protocol):
    """Moves the slots of a rule from one frame to the next; a frozen dataclass without tensors."""

    batched: ClassVar[bool]
    """Whether it serves the rows of a batch (``Clock.rows``), every one as if it were alone."""

    @property
    def resizes(self) -> bool:
        """Whether moments can go between frames of different ranks."""
        ...

    @property
    def projects(self) -> bool:
        """Whether a LINEAR slot becomes m' = R m."""
        ...

    def slots(self, rule: Sequence[Slot]) -> tuple[Slot, ...]:
        """Slots of the transport's own, beside the rule's."""
        ...

    def age(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """Bring those slots up to date, in place, after the rule has taken in one more gradient."""
        ...

    def adopt(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """Add the transport's own slots to moments that were made without it, such as those of torch's AdamW."""
        ...

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """The slots in the new frame, the given ones staying as they are; without CACHEs that are out of date."""
        ...


class _Slotless:
    """What transports without slots of their own share."""

    def slots(self, rule: Sequence[Slot]) -> tuple[Slot, ...]:
        """None."""
        return ()

    def age(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """Nothing to do."""

    def adopt(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """Nothing to add."""


@dataclass(frozen=True)
class Keep(_Slotless):
    """The numbers stay where they are, in coordinates that have changed (GaLore, arXiv 2403.03507)."""

    resizes = projects = False
    batched: ClassVar[bool] = True

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """The same tensors."""
        return {slot.name: state[slot.name] for slot in rule if slot.name in state}


@dataclass(frozen=True)
class Reset(_Slotless):
    """All moments start again at zero, bases at the identity, and the step count of the bias correction at zero."""

    resizes, projects = True, False
    batched: ClassVar[bool] = True

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """Zeros in the new shape, and t = 0 in place."""
        clock.t.zero_()
        kept = [slot for slot in rule if slot.kind is not Kind.CACHE]
        return {slot.name: _anew(slot, state[slot.name], overlap, clock.rows) for slot in kept}


@dataclass(frozen=True)
class _Following:
    """What transports share that move linear slots, and statistics of single modes, along with the frame.

    Args:
        statistics: of COVARIANCE, BASIS and FACTORED slots: "carry" moves them by R_n, "keep" leaves their numbers in
            coordinates that have changed, "reset" forgets the directions alone: bases become the identity, the
            others their mean in every direction, which keeps the weight that bias correction counts on.
    """

    statistics: str = "carry"

    projects = True
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


@dataclass(frozen=True)
class Rotate(_Following, _Slotless):
    """LDAdam's projection-aware change of frame (arXiv 2410.16103), mode by mode.

    m' = m x_n R_n
    s  = v/c2 - |m|^2/c1^2
    v' = c2 | s x_n |R_n|^2 + |m'|^2/c1^2 |

    Since |R_1 (x) R_2|^2 = |R_1|^2 (x) |R_2|^2, the modes separate for the variance too. Statistics of single modes
    follow as their kinds say (:class:`comoving.slots.Kind`); variances in a basis Q move by Q'^H R Q.
    """

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """The formula above for each slot by its kind."""
        moved = self._move_most(state, rule, overlap, clock.rows)
        c1_squared, c2 = clock.weight1**2, clock.weight2
        for slot in rule:
            if slot.kind is Kind.VARIANCE:
                turn, mean, mean_moved = _in_bases(slot, state, moved, overlap, clock.rows)
                # All of it times c2, which saves a pass over the core and changes nothing.
                ratio = c2 / c1_squared
                spread = state[slot.name] - mean.mul_(ratio)
                moved[slot.name] = _known(turn.move_squares(spread).add_(mean_moved.mul_(ratio)).abs_())
        return moved


@dataclass(frozen=True)
class Carry(_Following):
    """Carries the mass of v beside it, so that v loses none where the new frame leaves the old one; ours.

    Every step  kappa <- b2 kappa + (1 - b2)  and  K <- (b1^2/b2) K + (1 - b1)^2/(1 - b2);  the rule divides v by
    kappa instead of c2. At a change of frame

    m'     = m x_n R_n
    s      = v/kappa - |m|^2/c1^2
    kappa' = kappa x_n |R_n|^2
    v'     = max( kappa' (((kappa s) x_n |R_n|^2) / kappa' + |m'|^2/c1^2),  |m'|^2/K )    (fraction 0 where kappa' = 0)

    K is Adam's own bound on |m|^2/v (Cauchy-Schwarz over the two averages). The floor puts the moments back within it,
    and both recursions then keep |m|^2 <= K v; since kappa <= c2, every later direction obeys Adam's bound too. (A
    floor on v'/kappa' instead of v' would hold at the refresh only: where kappa' is small, v/kappa can fall faster than
    |m|^2.) kappa is real, core-sized but of length 1 along whole modes, where it is constant; core-sized in every mode
    for variances in a basis. K is one number, of each row of a batch (*rows).
    """

    def slots(self, rule: Sequence[Slot]) -> tuple[Slot, ...]:
        """kappa as "<v>.mass" and K as "<v>.bound" for every variance v."""
        own: list[Slot] = []
        for slot in rule:
            if slot.kind is Kind.VARIANCE:
                mass = Slot(mass_of(slot.name), Kind.MASS, turned_by=slot.turned_by)
                own += [mass, Slot(_bound_of(slot.name), Kind.SCALAR)]
        return tuple(own)

    def age(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """Both recursions, in place."""
        b1, b2 = clock.beta1, clock.beta2
        for slot in rule:
            if slot.kind is Kind.VARIANCE:
                state[mass_of(slot.name)].mul_(b2).add_(1 - b2)
                state[_bound_of(slot.name)].mul_(b1 * b1 / b2).add_((1 - b1) ** 2 / (1 - b2))

    def adopt(self, state: State, rule: Sequence[Slot], clock: Clock) -> None:
        """kappa = c2 everywhere, and K summed up for constant decay rates."""
        for slot in rule:
            if slot.kind is Kind.VARIANCE:
                v = state[slot.name]
                one = v[(slice(None),) * clock.rows + (slice(1),) * (v.ndim - clock.rows)]
                state[mass_of(slot.name)] = torch.ones_like(one) * clock.weight2
                bound = clock.ratio.to(clock.t.dtype)
                state[_bound_of(slot.name)] = bound.expand(v.shape[:1]).clone() if clock.rows else bound

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """The formula above for each slot by its kind."""
        moved = self._move_most(state, rule, overlap, clock.rows)
        c1_squared = clock.weight1**2
        for slot in rule:
            if slot.kind is Kind.VARIANCE:
                v, mass, bound = state[slot.name], state[mass_of(slot.name)], state[_bound_of(slot.name)]
                turn, mean, mean_moved = _in_bases(slot, state, moved, overlap, clock.rows)
                spread = v - mass * mean / c1_squared  # kappa s
                mass_moved = turn.move_squares(turn.spread(mass))
                present = mass_moved > 0
                variance = torch.where(present, turn.move_squares(spread) / mass_moved, 0)
                estimate = mass_moved * (variance + mean_moved / c1_squared)
                most = bound.clamp_min(TINY)
                if clock.rows:  # it lies beside the step count, and only one number may be of another device
                    most = over(most.to(v.device, v.dtype, non_blocking=True), v)
                moved[slot.name] = _known(torch.maximum(estimate, mean_moved / most))
                moved[mass_of(slot.name)] = mass_moved.contiguous()
                moved[_bound_of(slot.name)] = bound.clone()
        return moved


def mass_of(variance: str) -> str:
    """The slot in which :class:`Carry` keeps the mass kappa of a variance slot."""
    return f"{variance}.mass"


def _bound_of(variance: str) -> str:
    return f"{variance}.bound"


def initial(slot: Slot, x: Tensor) -> Tensor:
    """What a slot starts from, in place: the identity for a basis, else zero."""
    return x.copy_(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)) if slot.kind is Kind.BASIS else x.zero_()


def _anew(slot: Slot, x: Tensor, overlap: Overlap, rows: int) -> Tensor:
    """The slot's first value in the new core's shape."""
    if slot.kind is Kind.SCALAR:
        return torch.zeros_like(x)
    if slot.mode < 0:
        return x.new_zeros(overlap.moved_shape(x))
    r = overlap.matrices[slot.mode]
    size = x.shape[-1] if r is None else r.shape[-2]
    return initial(slot, x.new_empty((*x.shape[:rows], *(size,) * (x.ndim - rows))))


def _levelled(slot: Slot, x: Tensor, overlap: Overlap, rows: int) -> Tensor:
    """A statistic that has forgotten all directions, but not its weight: its mean in each of them."""
    fresh = _anew(slot, x, overlap, rows)
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


def _known(variance: Tensor) -> Tensor:
    """A variance, in place: infinite where squares overflowed and their difference is no number; d becomes 0 there."""
    return variance.nan_to_num_(inf, posinf=inf)


def _in_bases(slot: Slot, state: State, moved: State, overlap: Overlap, rows: int) -> tuple[Overlap, Tensor, Tensor]:
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
