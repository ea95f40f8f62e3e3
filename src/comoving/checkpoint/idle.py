"""Blocks that have had no gradient yet: experts that saw no token, in a state that has the same slots for all."""

from collections.abc import Mapping
from typing import Any

import torch

from ..section import blocks_in
from ..sites import Site
from ..state import asked, first_seeds, group_of_block, layout, zeros


def with_idle(
    state: Mapping[str, Any],
    site: Site,
    group: Mapping[str, Any],
    device: torch.device,
    scalars: torch.device,
    seed: int,
) -> dict[str, Any]:
    """The state with slots of zeros for blocks that have none, so that its keys do not tell which had gradients.

    Args:
        state: of the blocks that are here.
        site: of what is here of the parameter.
        group: its hyper-parameters.
        device: the parameter's.
        scalars: where single numbers are.
        seed: the optimizer's.
    """
    found, inner, there = dict(state), group_of_block(group), blocks_in(dict(state))
    first = 0 if site.shard is None else site.shard.start
    for b in range(first, first + site.blocks):
        if str(b) in there:
            continue
        own = site.block(b)
        fresh: dict[str, Any] = {"tick": 0, **zeros(layout(own, inner), device, scalars)}
        fresh |= first_seeds(own, inner, seed) | asked(own, inner)
        found |= {f"{b}.{name}": x for name, x in fresh.items()}
    return found


def without_idle(state: Mapping[str, Any], site: Site) -> dict[str, Any]:
    """The state of the blocks that have made a step; of blocks that the parameter does not have, for refusal, all."""
    if not site.blocks:
        return dict(state)
    own = [b for b in blocks_in(dict(state)) if b.isdecimal() and int(b) < site.entire.blocks]
    idle = {b for b in own if not (state.get(f"{b}.tick", 1) or float(state.get(f"{b}.step", 1)))}
    return {name: x for name, x in state.items() if name.partition(".")[0] not in idle}
