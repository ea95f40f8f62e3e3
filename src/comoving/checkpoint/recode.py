"""State that codecs of one assignment store, as those of another would."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..codecs import Codec, Full, Spec
from ..ranks.assignment import LADDER
from ..sites import Site
from ..state import moments, packed, ranks_in, resized, unpacked, zeros
from .copies import stored_by


def recoded(state: dict[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
    """A projected parameter's saved state, decoded and encoded anew where other codecs of the ladder stored it.

    Which did is seen from names and dtypes. What no codec of :data:`comoving.ranks.assignment.LADDER` stored stays as
    it is.

    Args:
        state: of a parameter or a block of it, at any ranks.
        site: of this optimizer.
        group: with the codecs that the parameter has here.
    """
    try:
        at = resized(site, group, ranks_in(site, group, state))
    except ValueError:
        return state  # AdamW's: there is no frame
    return _moments(_buffer(state, at, group), at, group)


def _moments(state: dict[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
    stores: dict[str, Mapping[str, Spec]] = {"here": moments(site, group)}
    ladder = {str(codec): codec for codec in LADDER}
    stores |= {name: moments(site, {**group, "moments": codec}) for name, codec in ladder.items()}
    found = next((name for name, schema in stores.items() if _stored_as(schema, state)), "here")
    if found == "here":
        return state
    return packed(site, group, unpacked(site, {**group, "moments": ladder[found]}, state))


def _buffer(state: dict[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
    def schema(codec: Codec) -> dict[str, Spec]:
        return group["residual"].schema(codec, site.view.shape, site.core_shape, site.view.dtype)

    here: Codec = group["codec"]
    found = stored_by(state, site, group)
    if found == here:
        return state
    before, after = schema(found), schema(here)
    result = {name: value for name, value in state.items() if name not in before or before[name] == after.get(name)}
    for name, spec in schema(Full()).items():
        if name in result or not name.endswith(".value"):
            continue
        prefix = name.removesuffix("value")
        stored: dict[str, Tensor] = {n.removeprefix(prefix): state[n] for n in before if n.startswith(prefix)}
        value = found.decode(stored, spec.shape, spec.dtype)
        own = zeros(here.schema(spec.shape, spec.dtype), value.device, value.device)
        here.encode(value.clone(), own)
        result |= {prefix + n: x for n, x in own.items()}
    return result


def _stored_as(schema: Mapping[str, Spec], state: Mapping[str, Any]) -> bool:
    return all(name in state and state[name].dtype == spec.dtype for name, spec in schema.items())
