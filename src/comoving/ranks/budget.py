"""A common budget of state bytes for all projected parameters.

Growth that does not fit is refused. But where another mode's last notch holds less than half as much energy per byte
as the refused growth would at least bring, that mode gives the notch up, at its next step; the growth is tried again at
the parameter's next refresh. Energies are shares of each parameter's own gradient. The least that a growth from r to r'
brings is (r' - r) / (d - r) of what is outside, since the best directions hold no less than the average; so whoever has
lost a notch cannot claim it back by the same rule.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

from torch import Tensor

from .. import state as slots
from ..frames.base import Ranks
from ..sites import Site
from .base import Reading


class Claim(NamedTuple):
    """A projected parameter with its current site, its group and its state, which may be empty."""

    site: Site
    group: Mapping[str, Any]
    state: Mapping[str, Any]

    def bytes_at(self, ranks: Ranks) -> int:
        """Bytes of its state at these ranks."""
        site = slots.resized(self.site, self.group, ranks)
        return sum(map(slots.part_bytes, slots.layout(site, self.group).values()))

    def held(self) -> int:
        """The bytes that its state has, or will have once it is at its ranks, whichever is more."""
        tensors = [x for name, x in self.state.items() if isinstance(x, Tensor) and name != "core"]
        return max(sum(x.untyped_storage().nbytes() for x in tensors), self.bytes_at(self.site.ranks))

    def lower(self, mode: int) -> Ranks | None:
        """Its ranks with one mode a notch lower, None at the limit."""
        rank = self.site.ranks[mode]
        less = None if rank is None else self.group["ranks"].below(self.site.view.shape[mode], rank)
        return None if less is None else _with(self.site.ranks, mode, less)


def fit(claims: Sequence[Claim], budget: int) -> list[Ranks]:
    """Ranks that fit the budget: notch by notch, the mode with the largest share of its directions is cut.

    Raises:
        ValueError: even the lowest ranks need more.
    """
    claims = list(claims)
    sizes = [claim.bytes_at(claim.site.ranks) for claim in claims]
    while sum(sizes) > budget:
        cuts = [
            (-(rank or 0) / claim.site.view.shape[n], i, n)
            for i, claim in enumerate(claims)
            for n, rank in enumerate(claim.site.ranks)
            if claim.lower(n) is not None
        ]
        if not cuts:
            raise ValueError(
                f"budget must be at least {sum(sizes)} bytes, what the lowest ranks of the projected parameters need, "
                f"got {budget}"
            )
        _, i, n = min(cuts)
        ranks = claims[i].lower(n)
        assert ranks is not None
        claims[i] = claims[i]._replace(site=slots.resized(claims[i].site, claims[i].group, ranks))
        sizes[i] = claims[i].bytes_at(ranks)
    return [claim.site.ranks for claim in claims]


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


def grant(
    key: Tensor,
    wanted: Ranks,
    reading: Reading,
    claims: Mapping[Tensor, Claim],
    held: dict[Tensor, int],
    budget: int,
) -> Ranks:
    """What of the wanted ranks fits into the budget; see above. A notch that another mode gives up is noted there.

    Args:
        key: the parameter.
        wanted: by its policy.
        reading: of its frame in use.
        claims: of all projected parameters.
        held: bytes of each; what is missing is added.
        budget: bytes.
    """
    claim, shape = claims[key], claims[key].site.view.shape
    for other, theirs in claims.items():
        if other not in held:
            held[other] = theirs.held()
    room = budget - sum(size for other, size in held.items() if other is not key)
    ranks, refused = wanted, list[int]()
    growing = [n for n, (r, old) in enumerate(zip(wanted, claim.site.ranks, strict=True)) if (r or 0) > (old or 0)]
    for n in sorted(growing, key=reading.outside):
        if claim.bytes_at(ranks) <= room:
            break
        ranks, refused = _with(ranks, n, claim.site.ranks[n]), [*refused, n]
    if refused:
        n = refused[-1]  # the one with most outside
        more, had = wanted[n] or 0, claim.site.ranks[n] or 0
        gain = reading.outside(n) * (more - had) / max(shape[n] - had, 1)
        _release(key, gain / (claim.bytes_at(_with(ranks, n, more)) - claim.bytes_at(ranks)), claims)
    return ranks


def _release(key: Tensor, gain: float, claims: Mapping[Tensor, Claim]) -> None:
    """Let the other mode with the least energy per byte, if less than half of this, give up a notch."""
    offers = [
        (price, i, n, claim)
        for i, (other, claim) in enumerate(claims.items())
        if other is not key and slots.VALUE in claim.state and slots.at_its_ranks(claim.site, claim.group, claim.state)
        for n, price in enumerate(claim.state[slots.VALUE].tolist())
        if claim.lower(n) is not None
    ]
    if offers:
        price, _, n, claim = min(offers, key=lambda offer: offer[:3])
        lower = claim.lower(n)
        if lower is not None and 2 * price < gain:
            slots.set_ranks(claim.state, lower)


def _with(ranks: Ranks, mode: int, rank: int | None) -> Ranks:
    return (*ranks[:mode], rank, *ranks[mode + 1 :])
