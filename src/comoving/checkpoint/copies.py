"""What processes whose gradients differ keep each for itself: one copy of each in a checkpoint, and their mean."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec, Full, Spec, store
from ..diagnostics import SLOT, STORED
from ..ranks.assignment import LADDER
from ..section import blocks_in
from ..sites import Site
from ..state import group_of_block, parts_of, ranks_in, resized

WIRE = "wire."
"""What the names of slots begin with that serve what is sent of a parameter, and not its steps."""
Sum = Callable[[Tensor], Tensor]
"""The sum of what processes have, where each has some of the copies."""


def without_wire(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state that a parameter is stepped by."""
    return {name: x for name, x in state.items() if not name.startswith(WIRE)}


def kept_apart(state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Spec]:
    """The slots of a state that differ from process to process: what the residual keeps, and figures; no seeds.

    Their shapes are those of one copy, at the ranks of the site.

    Args:
        state: of a parameter, with one copy or with several.
        site: what was decided about it.
        group: its hyper-parameters.
    """
    if site.blocks:
        found, inner = dict[str, Spec](), group_of_block(group)
        for b in blocks_in(dict(state)):
            own = kept_apart(_of_block(state, b), site.block(int(b)), inner)
            found |= {f"{b}.{name}": spec for name, spec in own.items()}
        return found
    if not site.projected:
        return {}
    group = parts_of(site, group)
    schema = _schema(stored_by(state, site, group), site, group)
    schema[SLOT] = Spec((len(STORED),), site.view.dtype.to_real())
    return {name: spec for name, spec in schema.items() if name in state and not spec.seed}


def copies_in(state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> int:
    """How many copies there are of what differs; 0 where there is one, as one process has it."""
    kept = kept_apart(state, site, group)
    return next((state[name].shape[0] for name, spec in kept.items() if state[name].ndim > len(spec.shape)), 0)


def averaged(state: Mapping[str, Any], site: Site, group: Mapping[str, Any], count: int, sum_of: Sum) -> dict[str, Any]:
    """The state with the mean of all copies.

    What a residual keeps is linear in it, slot by slot, and all copies belong to the same frame: so the mean of what
    they decode to is what one process would have kept that has the mean of their gradients.

    Args:
        state: of a parameter, with copies in front, some of which may be elsewhere.
        site: what was decided about it here.
        group: its hyper-parameters here.
        count: of all copies.
        sum_of: joins sums of copies.
    """
    if site.blocks:
        found, inner = dict(state), group_of_block(group)
        for b in blocks_in(dict(state)):
            own = averaged(_of_block(state, b), site.block(int(b)), inner, count, sum_of)
            found |= {f"{b}.{name}": x for name, x in own.items()}
        return found
    found, kept = dict(state), kept_apart(state, site, group)
    if SLOT in kept:
        found[SLOT] = sum_of(state[SLOT].sum(0)) / count
    if kept.keys() <= {SLOT}:
        return found
    group = parts_of(site, group)
    codec, site = stored_by(state, site, group), resized(site, group, ranks_in(site, group, state))
    stored = _schema(codec, site, group)
    if not stored.keys() <= state.keys():
        return found  # which does not fit, as is said where it is admitted
    for prefix, spec in _kept(site, group).items():
        own = {n.removeprefix(prefix): (state[n], s.seed) for n, s in stored.items() if n.startswith(prefix)}
        seeds = {name: x for name, (x, seed) in own.items() if seed}
        copies = {name: x for name, (x, seed) in own.items() if not seed}
        first = next(iter(copies.values()))
        total = torch.zeros(spec.shape, dtype=spec.dtype, device=first.device)
        for i in range(len(first)):  # one by one: codecs need not take several
            one = {name: x[i] for name, x in copies.items()}
            total += codec.decode(seeds | one, spec.shape, spec.dtype)
        _, encoded = store(codec, sum_of(total) / count, seeds)
        found |= {prefix + name: x for name, x in encoded.items()}
    return found


def stored_by(state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> Codec:
    """The codec that has stored what a residual keeps, told by names and dtypes; that of the group in doubt."""
    here: Codec = group["codec"]
    return next((codec for codec in (here, *LADDER) if _fits(_schema(codec, site, group), state)), here)


def _kept(site: Site, group: Mapping[str, Any]) -> dict[str, Spec]:
    """What the residual keeps as tensors, by what the names of their slots begin with."""
    plain = _schema(Full(), site, group)
    return {name.removesuffix("value"): spec for name, spec in plain.items() if name.endswith(".value")}


def _schema(codec: Codec, site: Site, group: Mapping[str, Any]) -> dict[str, Spec]:
    return dict(group["residual"].schema(codec, site.view.shape, site.core_shape, site.view.dtype))


def _fits(schema: Mapping[str, Spec], state: Mapping[str, Any]) -> bool:
    return all(name in state and state[name].dtype == spec.dtype for name, spec in schema.items())


def _of_block(state: Mapping[str, Any], block: str) -> dict[str, Any]:
    prefix = f"{block}."
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
