"""Which parameters are alike, so that they can be stepped together and refreshed at the same step."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from . import state as slots
from .schedule import SMALL, at_once
from .sites import Site

_ROLES = ("rule", "precondition", "moments", "residual")
_OF_FRAMES = ("frame", "finder", "cadence", "transport", "codec", "bases")


def likeness(site: Site, group: Mapping[str, Any], number: int) -> Hashable:
    """What rows must have in common to be stepped together; None of one that is always stepped alone.

    Args:
        site: of the row.
        group: its hyper-parameters as they hold for it; see :func:`comoving.state.parts_of`.
        number: that of its group.
    """
    empty = 0 in site.view.shape and site.shard is None  # processes with no entry take part in what the others do
    if site.plain or site.blocks or site.coded or empty:
        return None
    roles = (*_ROLES, *_OF_FRAMES) if site.projected else _ROLES
    if (site.projected and group["ranks"].adaptive) or not all(group[role].batched for role in roles):
        return None
    phase = 0 if site.projected and one_by_one(group) else site.phase % group["refresh_every"]
    return number, replace(site, name="", reason="", role="hidden", index=0, phase=phase, base=())


def one_by_one(group: Mapping[str, Any]) -> bool:
    """Whether the parts of a group want frames refreshed one by one."""
    return any(group[role].alone for role in ("finder", "cadence", "residual"))


def pieces(sites: Sequence[Site], group: Mapping[str, Any], number: int) -> list[list[int]]:
    """Which parameters of a group, by their places, refresh at the same step: small alike ones, some at a time.

    Those whose frames are refreshed one by one do so at a step of their own.

    Args:
        sites: of all of them, still without phases.
        group: its hyper-parameters.
        number: that of the group.
    """
    alike: dict[Hashable, list[int]] = {}
    for place, site in enumerate(sites):
        own = slots.parts_of(site, group)
        whole = replace(site, shard=None, owner=None)  # a refresh is at the same step however many processes share it
        key, entries = likeness(whole, own, number), prod(site.view.shape)
        small = key is not None and entries <= SMALL and not (site.projected and one_by_one(own))
        alike.setdefault(key if small else place, []).append(place)
    cut: list[list[int]] = []
    for places in alike.values():
        most = at_once(prod(sites[places[0]].view.shape))
        count = -(-len(places) // -(-len(places) // most))  # as even as they can be
        cut += [places[i : i + count] for i in range(0, len(places), count)]
    return cut
