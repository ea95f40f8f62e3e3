"""A common budget of state bytes for all projected parameters: how rank moves between them at refreshes.

What they begin with is chosen in :mod:`comoving.ranks.assignment`. Later growth that does not fit is refused. But where
another mode's last notch holds less than half as much energy per byte as the refused growth would at least bring, that
mode gives the notch up, at its next step; the growth is tried again at the parameter's next refresh. Energies are
shares of each parameter's own gradient, whatever its size. The least that a growth from r to r' brings is
(r' - r) / (d - r) of what is outside, since the best directions hold no less than the average; so whoever has lost a
notch cannot claim it back by the same rule.
"""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import state as slots
from ..frames.base import Ranks
from ..sites import Site
from .base import Reading


class Claim(NamedTuple):
    """A projected parameter with its current site, its group and its state, which may be empty."""

    site: Site
    group: Mapping[str, Any]
    state: dict[str, Any]

    def bytes_at(self, ranks: Ranks) -> int:
        """Bytes of its state at these ranks."""
        site = slots.resized(self.site, self.group, ranks)
        return sum(map(slots.spec_bytes, slots.layout(site, self.group).values()))

    def bytes_now(self) -> int:
        """The bytes that its state has, or will have once it is at its ranks, whichever is more."""
        tensors = [x for name, x in self.state.items() if isinstance(x, Tensor) and name not in slots.UNFINISHED]
        return max(sum(x.nbytes for x in tensors), self.bytes_at(self.site.ranks))

    def lower(self, mode: int) -> Ranks | None:
        """Its ranks with one mode a notch lower, None at the limit."""
        rank = self.site.ranks[mode]
        less = None if rank is None else self.group["ranks"].below(self.site.view.shape[mode], rank)
        return None if less is None else _with(self.site.ranks, mode, less)


def prices(claim: Claim, reading: Reading, wanted: Ranks) -> list[float]:
    """The energy per byte that each mode would lose with its last notch, once at these ranks; inf where it cannot."""
    shape, had = claim.site.view.shape, claim.site.ranks
    claim = claim._replace(site=slots.resized(claim.site, claim.group, wanted))
    result: list[float] = []
    for n, (rank, before) in enumerate(zip(wanted, had, strict=True)):
        lower = claim.lower(n)
        if lower is None or rank is None or before is None:
            result.append(inf)
            continue
        share = sum((reading.spectra[n] or ())[lower[n] : rank])
        if rank > before:
            share += reading.outside(n) * (rank - before) / max(shape[n] - before, 1)
        result.append(share / max(claim.bytes_at(wanted) - claim.bytes_at(lower), 1))
    return result


def grant(claim: Claim, wanted: Ranks, reading: Reading, room: int) -> tuple[Ranks, float]:
    """What of the wanted ranks fits, and the least energy per byte that what does not fit would bring; 0 if all fits.

    Args:
        claim: at the ranks of the frame in use.
        wanted: by its policy.
        reading: of the frame in use.
        room: bytes, those that the claim has now among them.
    """
    had, shape, ranks, gain = claim.site.ranks, claim.site.view.shape, wanted, 0.0
    growing = [n for n, (r, old) in enumerate(zip(wanted, had, strict=True)) if (r or 0) > (old or 0)]
    for n in sorted(growing, key=reading.outside):  # the mode with most outside is the last to be refused
        if claim.bytes_at(ranks) <= room:
            break
        less = _with(ranks, n, had[n])
        share = reading.outside(n) * ((ranks[n] or 0) - (had[n] or 0)) / max(shape[n] - (had[n] or 0), 1)
        ranks, gain = less, share / max(claim.bytes_at(ranks) - claim.bytes_at(less), 1)
    return ranks, gain


def release(gain: float, states: Mapping[Tensor, Mapping[str, Any]], claim_of: Callable[[Tensor], Claim]) -> None:
    """Let the mode with the least energy per byte, if less than half of this, give up a notch.

    Args:
        gain: energy per byte.
        states: of the parameters that may be asked.
        claim_of: the claim of each.
    """
    offers = [
        (price, i, mode, p)
        for i, (p, state) in enumerate(states.items())
        if slots.VALUE in state
        for mode, price in enumerate(state[slots.VALUE].tolist())
        if 2 * price < gain
    ]
    for _, _, mode, p in sorted(offers, key=lambda offer: offer[:3]):
        claim = claim_of(p)
        lower = claim.lower(mode)
        if lower is not None and slots.at_its_ranks(claim.site, claim.group, claim.state):
            slots.set_ranks(claim.state, lower)
            claim.state[slots.VALUE] = torch.full_like(claim.state[slots.VALUE], inf)  # until the next reading
            return


def _with(ranks: Ranks, mode: int, rank: int | None) -> Ranks:
    return (*ranks[:mode], rank, *ranks[mode + 1 :])
