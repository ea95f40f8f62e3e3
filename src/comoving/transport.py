"""Transports: what happens to the moments when their frame changes.

A transport dispatches on the kind of a slot and knows no rule. Notation: R_n = U'_n^H U_n is the overlap of the new and
the old frame in mode n (None where both are whole), |R|^2 is taken entry by entry, and c1, c2 are the total weights
1 - b1^t and 1 - b2^t that the moments have given to past gradients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .frames.base import Overlap
from .linalg import abs_squared, multilinear
from .slots import Kind, Slot

State = dict[str, Tensor]

_TINY = 1e-15  # its square is still a normal float32


@dataclass(frozen=True)
class Clock:
    """Where Adam's averages stand: the decay rates and the number t of finished steps, a 0-dimensional tensor.

    A reading, not a running clock: make a new one when t has moved.
    """

    t: Tensor
    beta1: float
    beta2: float

    @cached_property
    def weight1(self) -> Tensor:
        """c1 = 1 - b1^t, float64: 1 - 0.999 in float32 is off by 5e-5. Positive also before the first step."""
        return (1 - self.beta1 ** self.t.double()).clamp_min(_TINY)

    @cached_property
    def weight2(self) -> Tensor:
        """c2 = 1 - b2^t, float64. Positive also before the first step."""
        return (1 - self.beta2 ** self.t.double()).clamp_min(_TINY)


class Transport(Protocol):
    """Moves the slots of a rule from one frame to the next; a frozen dataclass without tensors."""

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
        """The slots in the new frame, as new tensors; the given ones stay as they are."""
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

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """The same tensors."""
        return {slot.name: state[slot.name] for slot in rule}


@dataclass(frozen=True)
class Reset(_Slotless):
    """All moments start again at zero, and so does the step count of the bias correction."""

    resizes, projects = True, False

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """Zeros in the new shape, and t = 0 in place."""
        clock.t.zero_()
        return {slot.name: state[slot.name].new_zeros(_moved_shape(state[slot.name], overlap)) for slot in rule}


@dataclass(frozen=True)
class Rotate(_Slotless):
    """LDAdam's projection-aware change of frame (arXiv 2410.16103), mode by mode.

    m' = m x_n R_n
    s  = v/c2 - |m|^2/c1^2
    v' = c2 | s x_n |R_n|^2 + |m'|^2/c1^2 |

    Since |R_1 (x) R_2|^2 = |R_1|^2 (x) |R_2|^2, the modes separate for the variance too.
    """

    resizes = projects = True

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """The formula above for each slot by its kind."""
        moved = _move_linear(state, rule, overlap)
        squared = _squared(overlap)
        c1_squared, c2 = clock.weight1.square(), clock.weight2
        for slot in rule:
            if slot.kind is Kind.VARIANCE:
                # All of it times c2, which saves a pass over the core and changes nothing.
                ratio = c2 / c1_squared
                spread = state[slot.name] - abs_squared(state[slot.mean]).mul_(ratio)
                moved[slot.name] = multilinear(spread, squared).add_(abs_squared(moved[slot.mean]).mul_(ratio)).abs_()
        return moved


@dataclass(frozen=True)
class Carry:
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
    |m|^2.) kappa is real, core-sized but of length 1 along whole modes, where it is constant. K is one number.
    """

    resizes = projects = True

    def slots(self, rule: Sequence[Slot]) -> tuple[Slot, ...]:
        """kappa as "<v>.mass" and K as "<v>.bound" for every variance v."""
        own: list[Slot] = []
        for slot in rule:
            if slot.kind is Kind.VARIANCE:
                own += [Slot(mass_of(slot.name), Kind.MASS), Slot(_bound_of(slot.name), Kind.SCALAR)]
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
        ratio = clock.beta1**2 / clock.beta2
        for slot in rule:
            if slot.kind is Kind.VARIANCE:
                v = state[slot.name]
                state[mass_of(slot.name)] = torch.ones_like(v[(slice(1),) * v.ndim]) * clock.weight2
                terms = clock.t.double() if ratio == 1 else (1 - ratio ** clock.t.double()) / (1 - ratio)
                state[_bound_of(slot.name)] = (terms * ((1 - clock.beta1) ** 2 / (1 - clock.beta2))).to(clock.t.dtype)

    def move(self, state: State, rule: Sequence[Slot], overlap: Overlap, clock: Clock) -> State:
        """The formula above for each slot by its kind."""
        moved = _move_linear(state, rule, overlap)
        squared = _squared(overlap)
        c1_squared = clock.weight1.square()
        for slot in rule:
            if slot.kind is Kind.VARIANCE:
                v, mass, bound = state[slot.name], state[mass_of(slot.name)], state[_bound_of(slot.name)]
                mean, mean_moved = abs_squared(state[slot.mean]), abs_squared(moved[slot.mean])
                spread = v - mass * mean / c1_squared  # kappa s
                mass_moved = multilinear(_expand(mass, overlap), squared)
                present = mass_moved > 0
                variance = torch.where(present, multilinear(spread, squared) / mass_moved, 0)
                estimate = mass_moved * (variance + mean_moved / c1_squared)
                moved[slot.name] = torch.maximum(estimate, mean_moved / bound.clamp_min(_TINY))
                moved[mass_of(slot.name)] = mass_moved.contiguous()
                moved[_bound_of(slot.name)] = bound.clone()
        return moved


def mass_of(variance: str) -> str:
    """The slot in which :class:`Carry` keeps the mass kappa of a variance slot."""
    return f"{variance}.mass"


def _bound_of(variance: str) -> str:
    return f"{variance}.bound"


def _move_linear(state: Mapping[str, Tensor], rule: Sequence[Slot], overlap: Overlap) -> State:
    return {slot.name: multilinear(state[slot.name], overlap) for slot in rule if slot.kind is Kind.LINEAR}


def _squared(overlap: Overlap) -> list[Tensor | None]:
    return [None if r is None else abs_squared(r) for r in overlap]


def _expand(mass: Tensor, overlap: Overlap) -> Tensor:
    """Repeat kappa along modes that were whole, hence of length 1, and are compressed now."""
    return mass.expand([d if r is None else r.shape[-1] for d, r in zip(mass.shape, overlap, strict=True)])


def _moved_shape(x: Tensor, overlap: Overlap) -> list[int]:
    return [d if r is None else r.shape[-2] for d, r in zip(x.shape, overlap, strict=True)]
