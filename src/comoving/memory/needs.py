"""What a whole step needs beside weights, gradients and state, from rehearsals of each kind of parameter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import state as slots
from ..distributed.traffic import Traffic
from ..optimizer import LowRankOptimizer
from ..sites import Site
from .compressing import Compressing
from .rehearsal import Rehearsal, rehearse

Cache = dict[Any, Rehearsal]
"""Rehearsals by kind of parameter, for plans of one model."""


@dataclass(frozen=True)
class Needs:
    """The most bytes that a step between refreshes, and one with a refresh, allocates; operations, and bytes sent."""

    step: int = 0
    refresh: int = 0
    step_flops: int = 0
    refresh_flops: int = 0
    step_bytes: int = 0
    refresh_bytes: int = 0


NOTHING = Needs()


def needs(
    optimizer: LowRankOptimizer,
    device: str,
    layerwise: bool,
    ranks: int,
    cache: Cache,
    traffic: Traffic | None,
    cores: Compressing | None = None,
) -> Needs:
    """The needs of all parameters: one batch of alike ones at a time, but for dense ones that torch steps together.

    The first step counts as a refresh. With ``layerwise`` its order is that of the backward pass, and with several
    ranks who steps what is not its own: the state of all other parameters then counts as there.

    Where ``cores`` are sent, what all parameters keep open from the backward pass to the step is there at once, beside
    what one batch needs more.
    """
    traffic = traffic if cores is None else cores.traffic
    waiting = waiting_refresh = waiting_first = 0.0
    step = refresh = step_flops = refresh_flops = bound = step_bytes = refresh_bytes = 0
    seen: dict[Tensor, tuple[Rehearsal, int]] = {}
    for group in optimizer.param_groups:
        trained = [p for p in group["params"] if p.requires_grad]
        for params, alike in _kinds(trained, optimizer, group, device, layerwise):
            site = optimizer.sites[params[0]]
            key = device, len(params), kind_of(params[0], site, group), cores and (cores.wire, cores.ranks)
            if key not in cache:
                cache[key] = rehearse(optimizer, params, device, traffic, cores and cores.take)
            found, times = cache[key], len(alike) / len(params)
            own = times if site.owner is None else times / ranks
            step, refresh = max(step, found.step - found.waiting), max(refresh, found.refresh - found.waiting_refresh)
            bound = max(bound, found.first - (found.waiting_first if cores is not None else found.state))
            waiting += times * found.waiting
            waiting_refresh += times * (found.waiting_refresh - found.waiting) / group["refresh_every"]
            if cores is not None:
                waiting_first += times * (found.waiting_first - found.state)
            step_flops += round(own * found.step_flops)
            refresh_flops += round(own * found.refresh_flops)
            step_bytes += round(times * found.step_bytes)
            refresh_bytes += round(times * found.refresh_bytes)
            seen |= dict.fromkeys(alike, (found, len(params)))
    exact = ranks == 1 and not layerwise and cores is None
    first = _first_step(optimizer, seen) if exact else bound + round(waiting_first)
    step, refresh = step + round(waiting), refresh + round(waiting + waiting_refresh)
    return Needs(step, max(refresh, first), step_flops, refresh_flops, step_bytes, refresh_bytes)


def kind_of(p: Tensor, site: Site, group: Mapping[str, Any]) -> Any:
    """What decides how a parameter is stepped: equal for parameters that are stepped alike."""
    options = tuple(str(group[key]) for key in sorted(group) if key not in {"params", "param_names", "reasons"})
    owner = None if site.owner is None else 0
    alike = replace(site, name="", reason="", phase=0, index=0, owner=owner)  # codecs, too, may be each parameter's own
    return tuple(p.shape), p.dtype, alike, options


def _kinds(
    params: Sequence[Tensor], optimizer: LowRankOptimizer, group: Mapping[str, Any], device: str, layerwise: bool
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Parameters to rehearse, as many of each kind as are stepped together, and those that they stand for."""
    apart = not group["foreach"] and optimizer.on_nonfinite != "skip" and (device == "cpu" or group["foreach"] is False)
    together = [p for p in params if optimizer.sites[p].plain and not (layerwise or apart)]
    if together:
        yield together, together
    kinds: dict[Any, list[Tensor]] = {}
    for p in params:
        if not any(p is q for q in together):
            kinds.setdefault(kind_of(p, optimizer.sites[p], group), []).append(p)
    for alike in kinds.values():
        count = 1 if layerwise else optimizer.engine.stacks(alike)
        yield alike[:count], alike


def _first_step(optimizer: LowRankOptimizer, seen: Mapping[Tensor, tuple[Rehearsal, int]]) -> int:
    """The most of a first step, in the engine's order, beside all state: that of later parameters is not there yet."""
    most = total = 0
    for group in optimizer.param_groups:
        trained = [p for p in group["params"] if p.requires_grad]
        initial = {p: _initial_bytes(p, optimizer, group) for p in trained}
        moving = [p for p in trained if not optimizer.sites[p].plain]
        resident = total + sum(initial.values())
        for p in moving:
            found, count = seen[p]
            state = found.state // count
            most = max(most, resident - count * initial[p] + found.first - (count - 1) * (state - initial[p]))
            resident += state - initial[p]
        plain = [seen[p][0] for p in trained if optimizer.sites[p].plain]
        most = max([most, *(resident + found.first - found.state for found in plain)])
        total = resident
    return most - total


def _initial_bytes(p: Tensor, optimizer: LowRankOptimizer, group: Mapping[str, Any]) -> int:
    """Bytes of the state with which a parameter begins, before its first gradient is taken in."""
    state = slots.initial_state(optimizer.sites[p].here, group, p, torch.device("meta"), optimizer.seed)
    return sum(x.numel() * x.element_size() for x in state.values() if isinstance(x, Tensor))
