"""The state of parameters that processes share: of all of them in a checkpoint, of this one in the optimizer."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from .. import state as slots
from ..frames.stored import PREFIX
from ..residual.base import HELD
from ..rules.adam import FIRST, SECOND
from ..sites import Site
from .placement import Spread, cut_along

_OF_TORCH = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
_SMALL = 256
"""Entries of a tensor up to which every process saves all of it."""


class Shared(Protocol):
    """What was decided about parameters."""

    sites: dict[Tensor, Site]
    placements: dict[Tensor, Spread]

    def group_of(self, p: Tensor) -> dict[str, Any]:
        """The group of one."""
        ...


def of_all(
    params: Mapping[Any, Tensor], states: Mapping[Any, dict[str, Any]], shared: Shared
) -> dict[Any, dict[str, Any]]:
    """States with DTensors: the same keys in every process, and whole shapes; a collective call.

    Of what every process steps for itself they hold what is here. What one steps for all is sent to the others, a
    tensor at a time, each of which keeps its rows.

    Args:
        params: the parameters, by the keys of the states.
        states: what this process has.
        shared: what was decided about them.
    """
    found: dict[Any, dict[str, Any]] = {}
    for key, p in params.items():
        spread, site = shared.placements.get(p), shared.sites[p]
        if spread is None or not spread.cut:
            own = states.get(key)
        elif site.owner is None:
            own = _joined(states[key], site, shared.group_of(p), spread) if key in states else None
        else:
            own = _told(states.get(key, {}), site.owner, spread)
        if own:
            found[key] = own
    return found


def of_this_process(states: Mapping[Tensor, dict[str, Any]], shared: Shared) -> dict[Tensor, dict[str, Any]]:
    """What this process keeps of states of whole parameters, which are DTensors or all there; a collective call.

    Raises:
        ValueError: frames along a mode that is cut here.
    """
    found: dict[Tensor, dict[str, Any]] = {}
    for p, state in states.items():
        spread, site = shared.placements.get(p), shared.sites[p]
        if spread is None or not spread.cut:
            found[p] = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
        elif site.owner is None:
            found[p] = _cut(state, site, shared.group_of(p), spread)
        else:
            whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
            if site.owner == spread.rank:
                found[p] = whole
    return found


def dimensions(site: Site, group: Mapping[str, Any]) -> dict[str, int]:
    """Slot -> the dimension that counts the mode that is shared out, of those that have one."""
    assert site.shard is not None
    if site.blocks:
        return {}
    few, more = (slots.layout(site.of_length(count), group) for count in (8, 16))
    pairs = {name: (*zip(spec.shape, more[name].shape, strict=True),) for name, spec in few.items()}
    found = {
        name: [a != b for a, b in sizes].index(True) for name, sizes in pairs.items() if any(a != b for a, b in sizes)
    }
    return found | dict.fromkeys((HELD,) if site.one_core else (slots.CORE, HELD), site.shard.mode)


def _joined(state: Mapping[str, Any], site: Site, group: Mapping[str, Any], spread: Spread) -> dict[str, Any]:
    found, cut = dict(state), dimensions(site, group)
    for name, dim in cut.items():
        if name in found:
            x = found[name]
            shape = (*x.shape[:dim], sum(spread.sizes), *x.shape[dim + 1 :])
            found[name] = spread.sharded(x, dim, shape)
    return found


def _told(state: Mapping[str, Any], owner: int, spread: Spread) -> dict[str, Any]:
    """The state of the owner, of which every process keeps some rows."""
    assert spread.group is not None
    mine = owner == spread.rank
    rest = {name: x for name, x in state.items() if not _is_large(x)}
    large = [(name, tuple(x.shape), x.dtype) for name, x in state.items() if _is_large(x)]
    given: list[Any] = [(rest, large, [*state])] if mine else [None]
    source = dist.get_global_rank(spread.group, owner)
    dist.broadcast_object_list(given, source, group=spread.group)
    found, large, names = given[0]
    device = torch.device(spread.mesh.device_type)
    placed: list[Placement] = [Replicate()] * len(spread.placements)
    # Along one dimension of the mesh: what is cut twice, unevenly, torch does not put together as it was.
    placed[max(_cutting(spread), key=spread.mesh.size)] = Shard(0)
    for name, shape, dtype in large:
        x = state[name].contiguous() if mine else torch.empty(shape, dtype=dtype, device=device)
        real = torch.view_as_real(x) if x.is_complex() else x
        dist.broadcast(real, source, group=spread.group)
        found[name] = distribute_tensor(x, spread.mesh, placed, src_data_rank=None)
    return {name: found[name] for name in names}


def _cutting(spread: Spread) -> list[int]:
    """The dimensions of the mesh that cut a parameter."""
    return [i for i, place in enumerate(spread.placements) if cut_along(place) is not None]


def _is_large(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and x.numel() > _SMALL


def _cut(state: Mapping[str, Any], site: Site, group: Mapping[str, Any], spread: Spread) -> dict[str, Any]:
    shard, cut = site.shard, dimensions(site, group)
    assert shard is not None
    along = f"{PREFIX}{shard.mode}"
    if not site.one_core and any(name == along or name.startswith(f"{along}.") for name in state):
        raise ValueError(
            f"{site.name}: its frame was saved along mode {shard.mode}, which is cut over processes here: build both "
            f"optimizers with the side that is not, side={'right' if shard.mode == 0 else 'left'!r}"
        )
    found: dict[str, Any] = {}
    framed = any(name.startswith(PREFIX) for name in state)
    for name, x in state.items():
        dim = cut.get(name)
        dense = name in _OF_TORCH or (name in {FIRST, SECOND} and not framed)
        if dim is None and dense and not site.one_core:  # else a core, of which everyone has all
            dim = shard.mode
        found[name] = _part(x, dim, spread, shard.start, shard.count)
    return found


def _part(x: Any, dim: int | None, spread: Spread, start: int, count: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    if dim is None:
        return x.full_tensor() if isinstance(x, DTensor) else x
    if isinstance(x, DTensor):
        if x.device_mesh == spread.mesh and list(x.placements) == spread.placed(dim):
            return x.to_local()
        x = x.full_tensor()
    return x.narrow(dim, start, count) if x.shape[dim] == sum(spread.sizes) else x
