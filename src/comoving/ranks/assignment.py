"""Ranks and codecs that fit a budget, chosen once, before any gradient was seen.

Every projected parameter starts at the rank that was asked for, with its state in full precision. What does not fit is
given up where it costs least captured energy per byte saved. The energies come from a prior, as no spectrum is known
yet: the j-th direction of a mode holds 1/j of the first one's energy, and modes do not depend on one another.

    E_n = H(r_n) / H(d_n),   H(r) = sum_{j <= r} 1/j
    E   = prod_n E_n                                      the share of the energy that the frame captures
    loss = entries * ( 1 - E  +  E rho_m  +  (1 - E)/E rho_c )

``entries`` is the number of the parameter's entries: Adam's update has about the same size in each of them. A frame
that is not mode-wise is taken as prod(core) of prod(shape) directions. rho is the energy that one rounding adds,
relative to what is rounded (:func:`comoving.codecs.noise.noise`):

    rho_m = sum over the stored moments of rho, times 1/(1 - a^2) for a first moment with m <- a m + b z, in which the
            errors of earlier roundings are still felt; of a second moment the root counts
    rho_c = rho of the residual's buffer. Feedback that takes up (1 - E) of g + e has |e|^2 = (1 - E)/E |g|^2

The options of a parameter are the ranks on a path from the asked ones down to the lowest (for one compressed mode: all
notches; for several the mode that loses least energy per byte comes first), each with every pair of codecs. How they
are shared out: :mod:`comoving.allocation`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import log, prod
from typing import Any, NamedTuple

import torch

from .. import state as slots
from ..allocation import Short, allocate, frontier
from ..clock import Clock
from ..codecs import BFloat16, Codec, Full, Int4, Int8
from ..codecs.noise import noise
from ..frames import Modes
from ..frames.base import Ranks
from ..refusals import check_composition
from ..sites import Site
from ..slots import Kind
from .base import Notches
from .budget import Claim

AUTO = "auto"
"""In place of a codec: chosen for each parameter."""
ROLES = ("codec", "moments")
LADDER: tuple[Codec, ...] = (Full(), BFloat16(), Int8(), Int4())
"""What "auto" chooses from, finest first."""
USUAL = Int8()
"""What "auto" is without a budget; see docs/choosing.md."""


class Option(NamedTuple):
    """One way to hold a parameter's state: bytes, prior loss, ranks, and codecs (None: the group's own)."""

    bytes: int
    loss: float
    ranks: Ranks
    codec: Codec | None
    moments: Codec | None


def settled(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with Full() in place of "auto", the finest that a parameter can be assigned."""
    return {**group, **{role: Full() for role in _automatic(group)}}


def fill_in(site: Site, given: Mapping[str, Any], budgeted: bool) -> Site:
    """A projected site with codecs in the roles that its group, as it was given, leaves to this library.

    The finest where a budget will choose, else :data:`USUAL`, unless the rule cannot take it.
    """
    if not site.projected:
        return site
    usual = {role: USUAL if _allowed(settled(given), role, USUAL) else Full() for role in _automatic(given)}
    return replace(site, **(dict.fromkeys(usual, Full()) if budgeted else usual))


def _automatic(group: Mapping[str, Any]) -> list[str]:
    return [role for role in ROLES if isinstance(group[role], str) and group[role] == AUTO]


def assign(claims: Sequence[Claim], limit: int, anew: bool = True, whole: str = "") -> list[Site]:
    """Sites that fit the budget together.

    A parameter with state keeps its codecs, and where ranks are fixed its rank; where they adapt it may lose rank.

    Args:
        claims: the projected parameters.
        limit: bytes.
        anew: begin again from the asked ranks and full precision where there is no state.
        whole: what the limit is, in words, for the error.

    Raises:
        ValueError: even the lowest ranks and coarsest codecs need more; with the bytes that are missing.
    """
    claims = [claim._replace(site=_asked(claim)) if anew and not claim.state else claim for claim in claims]
    if sum(claim.bytes_at(claim.site.ranks) for claim in claims) <= limit:
        return [claim.site for claim in claims]
    known: dict[tuple[Any, ...], list[Option]] = {}
    frontiers = [_frontier_of(claim, anew, known) for claim in claims]
    try:
        chosen = allocate(frontiers, limit)
    except Short as short:
        coarsest = " and the coarsest codecs" if any(c.site.codec or c.site.moments for c in claims) else ""
        raise ValueError(
            f"budget must be at least {short.least} bytes, what the lowest ranks{coarsest} of the projected parameters "
            f"need, {short.least - limit} more than it allows, got {whole or limit}"
        ) from None
    return [
        replace(slots.resized(claim.site, claim.group, option.ranks), codec=option.codec, moments=option.moments)
        for claim, option in zip(claims, chosen, strict=True)
    ]


def _asked(claim: Claim) -> Site:
    """The site as it was asked for: its first ranks, and full precision where codecs are to be chosen."""
    site, group = claim.site, claim.group
    base = site.base or site.ranks
    site = replace(site, base=base, **{role: Full() for role in ROLES if getattr(site, role) is not None})
    return slots.resized(site, group, group["ranks"].initial(base, site.view.shape))


def _frontier_of(claim: Claim, anew: bool, known: dict[tuple[Any, ...], list[Option]]) -> list[Option]:
    """The options worth having; alike parameters share one list."""
    alike = replace(claim.site, name="", reason="", role="hidden", phase=0, index=0)
    key = (alike, id(claim.group), bool(claim.state), slots.RANKS in claim.state)
    if key not in known:
        known[key] = frontier(options(claim, anew))
    return known[key]


def options(claim: Claim, anew: bool = True) -> list[Option]:
    """All ranks on the path with all codecs, finest first."""
    free = anew and not claim.state
    codecs, moments = (_candidates(claim, role, free) for role in ROLES)
    found = list[Option]()
    for ranks in _path(claim, free):
        site = slots.resized(claim.site, claim.group, ranks)
        # Buffer and moments lie apart: their bytes, and their losses, add up.
        plain = _bytes(site, claim, codecs[0], moments[0])
        buffers = [_bytes(site, claim, codec, moments[0]) - plain for codec in codecs]
        cores = [_bytes(site, claim, codecs[0], own) - plain for own in moments]
        entries, energy = prod(site.view.shape), captured(site, claim.group)
        found += [
            Option(
                plain + more + less,
                entries * (1 - energy + energy * moment + (1 - energy) / energy * buffer),
                ranks,
                codec,
                own,
            )
            for codec, more, buffer in zip(codecs, buffers, _buffer_noise(site, claim, codecs), strict=True)
            for own, less, moment in zip(moments, cores, _moment_noise(site, claim, moments), strict=True)
        ]
    return found


def _candidates(claim: Claim, role: str, free: bool) -> tuple[Codec | None, ...]:
    """The codecs that one role can have, in the parameter's place: None for the group's own."""
    own = getattr(claim.site, role)
    return tuple(c for c in LADDER if _allowed(claim.group, role, c)) if free and own is not None else (own,)


def _allowed(group: Mapping[str, Any], role: str, codec: Codec) -> bool:
    try:
        check_composition({**group, role: codec})
    except ValueError:
        return False
    return True


def _path(claim: Claim, free: bool) -> list[Ranks]:
    """The ranks from those of the site down to the lowest, by least energy lost per byte."""
    site, group = claim.site, claim.group
    policy = group["ranks"]
    if not policy.adaptive and free and (site.codec or site.moments) and type(group["frame"]) is Modes:
        policy = Notches()  # fixed from the first step on, which has not been made
    path = [site.ranks]
    while policy.adaptive:
        ranks, now = path[-1], claim.bytes_at(path[-1])
        energy = captured(slots.resized(site, group, ranks), group)
        cuts = list[tuple[float, int, Ranks]]()
        for n, rank in enumerate(ranks):
            less = None if rank is None else policy.below(site.view.shape[n], rank)
            if less is not None:
                lower = (*ranks[:n], less, *ranks[n + 1 :])
                lost = energy - captured(slots.resized(site, group, lower), group)
                cuts.append((lost / max(now - claim.bytes_at(lower), 1), n, lower))
        if not cuts:
            break
        path.append(min(cuts)[2])
    return path


def captured(site: Site, group: Mapping[str, Any]) -> float:
    """E, what a frame of the site's ranks captures by the prior; in (0, 1]."""
    one = site.block(0) if site.blocks else site
    layout = slots.group_of_block(group)["frame"] if site.blocks else group["frame"]
    shape = one.view.shape
    if type(layout) is not Modes:
        return _harmonic(prod(one.core_shape)) / _harmonic(prod(shape))
    pairs = zip(one.ranks, shape, strict=True)
    return prod(_harmonic(r) / _harmonic(d) for r, d in pairs if r is not None)


@cache
def _harmonic(n: int) -> float:
    """H(n), from 1000 on by Euler's formula, good to 1e-13."""
    if n < 1000:
        return sum(1 / j for j in range(1, n + 1))
    return log(n) + 0.5772156649015329 + 1 / (2 * n) - 1 / (12 * n * n)


def _bytes(site: Site, claim: Claim, codec: Codec | None, moments: Codec | None) -> int:
    return claim._replace(site=replace(site, codec=codec, moments=moments)).bytes_at(site.ranks)


def _buffer_noise(site: Site, claim: Claim, codecs: Sequence[Codec | None]) -> list[float]:
    """rho_c of each codec, for a buffer of the gradient's shape; all 0 where the group's own codec is used."""
    one = site.block(0) if site.blocks else site
    return [0.0 if codec is None else noise(codec, one.view.shape, one.view.dtype) for codec in codecs]


def _moment_noise(site: Site, claim: Claim, codecs: Sequence[Codec | None]) -> list[float]:
    """rho_m of each codec; all 0 where the group's own codec is used."""
    one = site.block(0) if site.blocks else site
    group = slots.group_of_block(claim.group) if site.blocks else claim.group
    beta1, beta2 = group["betas"]
    decay, _ = group["rule"].recursion(Clock(torch.tensor(1e6, device="cpu"), beta1, beta2, 10**6))
    felt = 1 / (1 - decay**2) if decay < 1 else 1.0
    result = list[float]()
    for codec in codecs:
        total = 0.0
        stored = {} if codec is None else slots.moments(one, {**group, "moments": codec})
        for slot in slots.rule_slots(one, group):
            if codec is None or slot.name in stored:  # stored as it is
                continue
            spec = slots.slot_spec(slot, one, group)
            if slot.kind is Kind.VARIANCE:
                # bfloat16 stores v itself, whose root has half the relative error.
                share = 0.25 if isinstance(codec, BFloat16) else 1.0
                total += share * noise(codec.positive, spec.shape, spec.dtype)
            else:
                total += noise(codec, spec.shape, spec.dtype) * (felt if slot.kind is Kind.LINEAR else 1.0)
        result.append(total)
    return result
