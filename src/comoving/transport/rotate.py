"""Variances that turn as projections would have them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..clock import Clock
from ..frames import Overlap
from ..slots import Kind, Slot
from .base import Slotless, State
from .following import Following, as_turned, known


@dataclass(frozen=True)
class Rotate(Following, Slotless):
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
                turn, mean, mean_moved = as_turned(slot, state, moved, overlap, clock.rows)
                # All of it times c2, which saves a pass over the core and changes nothing.
                ratio = c2 / c1_squared
                spread = state[slot.name] - mean.mul_(ratio)
                moved[slot.name] = known(turn.move_squares(spread).add_(mean_moved.mul_(ratio)).abs_())
        return moved
