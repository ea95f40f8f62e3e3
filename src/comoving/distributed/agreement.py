"""Whether all processes have the same optimizer."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from ..checkpoint import describe_group
from ..optimizer import LowRankOptimizer

_OF_A_PARAMETER = ("place", "shape", "dtype", "ranks", "phase", "steps", "group")
_NOT_OF_A_GROUP = {"params", "param_names"}


def agree(
    optimizer: LowRankOptimizer, group: dist.ProcessGroup | None = None, settings: Mapping[str, Any] | None = None
) -> None:
    """Raise on every process unless all have the same parameters, recipe and seed, and are at the same step.

    Names, shapes, dtypes, ranks, every hyper-parameter and the number of finished steps are compared with those of the
    first process. A collective: all processes of the group have to call it.

    Args:
        optimizer: that of this process.
        group: the processes; None for all of them.
        settings: by name, plain data that has to be the same besides.

    Raises:
        RuntimeError: naming a parameter, or a setting, what differs of it, and both values.
    """
    given: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(given, _described(optimizer, settings or {}), group=group)
    for rank, other in enumerate(given[1:], 1):
        differing = _difference(given[0], other)
        if differing is not None:
            what, first, here = differing
            raise RuntimeError(
                f"processes disagree about {what}: {first!r} on rank 0 of the group, {here!r} on rank {rank}. Build "
                f"the model and the optimizer alike on all of them, and load the same step's checkpoint"
            )


def _described(optimizer: LowRankOptimizer, more: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same, as plain data; groups once, not with each parameter."""
    groups = [
        {key: value for key, value in describe_group(group).items() if key not in _NOT_OF_A_GROUP}
        for group in optimizer.param_groups
    ]
    settings = {
        "seed": optimizer.seed,
        "on_nonfinite": optimizer.on_nonfinite,
        "budget": optimizer.budget,
        "stacked_entries": optimizer.stacked_entries,
        **more,
    }
    parameters: dict[str, Any] = {}
    for place, (p, site) in enumerate(optimizer.sites.items()):
        state = optimizer.state.get(p, {}) if site.owner is None and not site.blocks else {}  # else only some have one
        steps = {name: x for name, x in state.items() if name.rpartition(".")[2] == "tick"}
        shape, dtype = list(site.view.stored_shape), str(site.view.stored_dtype)
        own = (place, shape, dtype, site.ranks, site.phase, steps, optimizer.roster.index[p])
        parameters[site.name] = own
    return {"settings": settings, "groups": groups, "parameters": parameters}


def _difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """What differs, with both values; None where nothing does."""
    mine, theirs = first["parameters"], other["parameters"]
    missing = [name for name in (*mine, *theirs) if name not in mine or name not in theirs]
    if missing:
        there = {True: "there", False: "not there"}
        return f"the parameter {missing[0]}", there[missing[0] in mine], there[missing[0] in theirs]
    for name, own in mine.items():
        groups = first["groups"][own[-1]], other["groups"][theirs[name][-1]]
        for key, here, there in [
            *zip(_OF_A_PARAMETER[:-1], own, theirs[name], strict=False),
            *((key, groups[0].get(key), groups[1].get(key)) for key in (*groups[0], *groups[1])),
        ]:
            if here != there:
                return f"{key} of {name}", here, there
    for name, here in first["settings"].items():
        if here != other["settings"][name]:
            return name, here, other["settings"][name]
    return None
