"""Variances that are carried with their mass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..clock import TINY, Clock
from ..frames import Overlap
from ..linalg import over
from ..slots import Kind, Slot
from .base import State
from .following import Following, as_turned, known


@dataclass(frozen=True)
class Carry(Following):
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
                turn, mean, mean_moved = as_turned(slot, state, moved, overlap, clock.rows)
                spread = v - mass * mean / c1_squared  # kappa s
                mass_moved = turn.move_squares(turn.spread(mass))
                present = mass_moved > 0
                variance = torch.where(present, turn.move_squares(spread) / mass_moved, 0)
                estimate = mass_moved * (variance + mean_moved / c1_squared)
                most = bound.clamp_min(TINY)
                if clock.rows:  # it lies beside the step count, and only one number may be of another device
                    most = over(most.to(v.device, v.dtype, non_blocking=True), v)
                moved[slot.name] = known(torch.maximum(estimate, mean_moved / most))
                moved[mass_of(slot.name)] = mass_moved.contiguous()
                moved[_bound_of(slot.name)] = bound.clone()
        return moved


def mass_of(variance: str) -> str:
    """The slot in which :class:`Carry` keeps the mass kappa of a variance slot."""
    return f"{variance}.mass"


def _bound_of(variance: str) -> str:
    return f"{variance}.bound"
