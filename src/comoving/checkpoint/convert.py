"""What a saved state becomes in an optimizer of other ranks, codecs or blocks."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..codecs import Full, Spec
from ..frames import stored as stored_frame
from ..frames.base import Ranks
from ..linalg import reorthonormalize
from ..refusals import kinds
from ..rules.adam import FIRST, SECOND
from ..sites import Site
from ..slots import Kind
from ..state import (
    MEMORY,
    RANKS,
    SECOND_MAX,
    UNFINISHED,
    VALUE,
    asked,
    current,
    first_seeds,
    group_of_block,
    in_weights,
    layout,
    packed,
    parts_of,
    place,
    resized,
    rule_slots,
    slot_spec,
    unpacked,
    zeros,
)
from ..views import View
from .recode import recoded

_MOMENTS = "moment."
_TORCH_NAMES = {"exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": SECOND_MAX}


def admit(saved: Mapping[str, Any], site: Site, group: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A parameter's saved state, checked and, where ranks differ or it is torch's AdamW's, made fit for this optimizer.

    State of other ranks keeps its old frame: the next step finds that it does not fit and carries the moments over.
    Dense state counts as a frame that is whole everywhere, so AdamW's moments are carried into the subspace just so;
    what stochastic rounding draws from then begins anew from the optimizer's seed.

    Raises:
        ValueError: what does not fit, with the parameter's name.
    """
    if site.blocks:
        inner = group_of_block(group)
        admitted = {b: admit(own, site.block(b), inner, seed) for b, own in _blocks_of(saved, site).items()}
        return {f"{b}.{name}": x for b, own in admitted.items() for name, x in own.items()}
    state = _renamed(saved, site)
    state, site = _with_ranks(state, site, group)
    expected, group = layout(site, group), parts_of(site, group)
    caches = {slot.name for slot in rule_slots(site, group) if slot.kind is Kind.CACHE}
    expected = {name: spec for name, spec in expected.items() if name in state or name not in caches}
    if site.plain:
        state = _checked(state, expected, site, ignore=("tick", *UNFINISHED))
        return {name: value for name, value in state.items() if name in expected or name in UNFINISHED}
    state.setdefault("tick", 0)
    if in_weights(group):
        _check_empty(state, site)
    if FIRST in state and not any(name.startswith(stored_frame.PREFIX) for name in state):
        state = first_seeds(site, group, seed) | state
    if site.projected:
        state = recoded(state, site, group)
    names = [slot.name for slot in rule_slots(site, group)]
    if any(name in state and name not in expected for name in names):
        state = _packed(state, site, group)
    moved = {
        n for n in {*state, *expected} if n.startswith(stored_frame.PREFIX) or any(_is_of(n, name) for name in names)
    }
    fits = all(name in state and tuple(state[name].shape) == expected[name].shape for name in moved if name in expected)
    fits = fits and _said(state, site) in (None, site.ranks)
    if not fits and site.projected:
        state = unpacked(site, group, state)
        rule, momentum = group["rule"], group["rule"].momentum
        _check_movable(state, site, group)
        shape, device = tuple(state[momentum].shape), state[momentum].device
        if any(slot.name not in state for slot in group["transport"].slots(rule.slots(shape))):
            group["transport"].adopt(state, rule.slots(shape), Clock(state["step"], *group["betas"]))
        # What a finder remembers may depend on the ranks, and then starts anew.
        remembered = {name: spec for name, spec in expected.items() if name.startswith(MEMORY)}
        stale = {name for name, spec in remembered.items() if name in state and tuple(state[name].shape) != spec.shape}
        stale |= {name for name in state if name.startswith(MEMORY) and name not in remembered}
        state = {name: value for name, value in state.items() if name not in stale}
        anew = {name: spec for name, spec in remembered.items() if name not in state}
        state |= zeros(anew, device, state["step"].device)
        residual = group["residual"].schema(group["codec"], site.view.shape, shape, site.view.dtype)
        expected = {name: spec for name, spec in (expected | residual).items() if name not in moved}
        # Dense state has no feedback and no record of its error: both start at zero.
        if not any(name.startswith("frame.") for name in state):
            missing = {name: spec for name, spec in expected.items() if name not in state}
            state |= zeros(missing, device, state["step"].device)
        state = _packed(state, site, group)
    state = _checked(state, expected, site, ignore=("tick", *UNFINISHED, *moved))
    return _mended(state, site) if isinstance(group["bases"], Full) else state


def owned(
    state: Mapping[str, Any], p: Tensor, site: Site, group: Mapping[str, Any], scalars: torch.device
) -> dict[str, Any]:
    """An admitted state in copies of the parameter's own, on the right devices, in the dtypes that it was saved in.

    Args:
        state: of the parameter.
        p: the parameter.
        site: what was decided about it.
        group: its hyper-parameters.
        scalars: where single numbers are.
    """
    schema = layout(site, group)

    def own(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return deepcopy(value)
        if name in (RANKS, VALUE):
            return value.detach().clone().cpu()
        spec = schema.get(name, Spec(tuple(value.shape), value.dtype))
        return value.detach().clone().to(place(spec, p.device, scalars))

    return {name: own(name, value) for name, value in state.items()}


def _check_empty(state: Mapping[str, Any], site: Site) -> None:
    """Raise for moments of a parameter that keeps them elsewhere."""
    found = sorted(name for name in state if name.startswith(_MOMENTS))
    if found:
        raise ValueError(
            f"{site.name}: the checkpoint has {', '.join(found)}, and this optimizer keeps moments in its weights, "
            f"where those of the checkpoint are in its state: load it into one with the same moments="
        )


def _said(state: Mapping[str, Any], site: Site) -> Ranks | None:
    try:
        return stored_frame.ranks(state, site.framed.view.shape)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None


def _is_of(name: str, slot: str) -> bool:
    return name == slot or name.startswith(f"{slot}.")


def _packed(state: dict[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its moments as they are stored here."""
    return packed(site, group, state)


def _blocks_of(saved: Mapping[str, Any], site: Site) -> dict[int, dict[str, Any]]:
    """The states of the blocks; dense state, such as AdamW's, is cut into blocks.

    Raises:
        ValueError: state of one frame, or of a block that the parameter does not have.
    """
    state = _renamed(saved, site)
    if FIRST in state and tuple(state[FIRST].shape) == site.view.shape and site.block_mode is not None:
        cut = {name: state[name].unbind(site.block_mode) for name in (FIRST, SECOND) if name in state}
        return {
            b: {"step": state["step"].clone(), **{name: parts[b] for name, parts in cut.items()}}
            for b in range(site.blocks)
        }
    blocks: dict[int, dict[str, Any]] = {}
    for name, value in saved.items():
        number, dot, slot = name.partition(".")
        if not (dot and number.isdecimal() and int(number) < site.blocks):
            raise ValueError(f"{site.name}: {name} in the checkpoint belongs to none of {site.blocks} blocks")
        blocks.setdefault(int(number), {})[slot] = value
    return blocks


def _renamed(saved: Mapping[str, Any], site: Site) -> dict[str, Any]:
    """Torch's names in ours; torch keeps a complex second moment as two real ones, of which |g|^2 is the sum."""
    state = {_TORCH_NAMES.get(name, name): value for name, value in saved.items()}
    dense = FIRST in state and not any(name.startswith("frame.") for name in state)
    if not isinstance(state.get("step"), Tensor):
        state["step"] = torch.tensor(float(state.get("step", 0)))
    view = site.framed.view
    if dense and not site.plain and tuple(state[FIRST].shape) == view.stored_shape:
        if SECOND_MAX in state:
            raise ValueError(f"{site.name}: state of amsgrad has no meaning in a moving subspace")
        state[FIRST] = view.see(state[FIRST])
        if SECOND in state:
            state[SECOND] = _real_second(state[SECOND], view)
    return state


def _with_ranks(state: dict[str, Any], site: Site, group: Mapping[str, Any]) -> tuple[dict[str, Any], Site]:
    """The state and site with the saved ranks where both sides adapt them, with this optimizer's own where not.

    Raises:
        ValueError: saved ranks that no frame of this parameter has.
    """
    own = asked(site, group)
    saved = {name: state.pop(name) for name in (RANKS, VALUE) if name in state}
    if not own or saved.keys() != own.keys():
        return state | own, site
    sizes = [(-1, -1) if r is None else (1, d) for r, d in zip(site.ranks, site.view.shape, strict=True)]
    ranks = saved[RANKS].tolist()
    if len(ranks) != len(sizes) or not all(low <= r <= high for r, (low, high) in zip(ranks, sizes, strict=True)):
        raise ValueError(
            f"{site.name}: the checkpoint has ranks {ranks} (-1: whole), which do not fit a parameter of shape "
            f"{site.view.shape} that was given ranks {site.ranks}"
        )
    return state | saved, current(site, group, saved)


def _real_second(v: Tensor, view: View) -> Tensor:
    if v.is_complex():
        v = torch.view_as_real(v).sum(-1)
    elif view.name == "pairs" and tuple(v.shape) == view.stored_shape:
        v = v.sum(-1)
    real = view.dtype.to_real() if view.dtype.is_complex else view.dtype
    return v.to(real).reshape(view.shape)


def _check_movable(state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> None:
    """Raise unless the state is a consistent frame of other ranks whose moments the transport can move here."""
    layout, shape, momentum = group["frame"], site.framed.view.shape, group["rule"].momentum
    frame = stored_frame.load(group, state, shape, site.view.dtype, state.get(momentum))
    core = layout.core_shape(shape, frame.ranks)
    framed = resized(site, group, frame.ranks)
    lasting = [slot for slot in group["rule"].slots(core) if slot.kind is not Kind.CACHE]
    needed = {slot.name: slot_spec(slot, framed, group) for slot in lasting}
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"{site.name}: the checkpoint lacks {', '.join(missing)} (it has {', '.join(sorted(state))})")
    frame_schema = stored_frame.schema(group, shape, frame.ranks, site.view.dtype)
    frame_shapes = {name: spec.shape for name, spec in frame_schema.items()}
    found = {name: tuple(x.shape) for name, x in state.items() if name.startswith("frame.")}
    if found != frame_shapes or any(tuple(state[name].shape) != spec.shape for name, spec in needed.items()):
        raise ValueError(
            f"{site.name}: the checkpoint's moments have shape {tuple(state[momentum].shape)}, which belongs to no "
            f"frame of a parameter of shape {shape} laid out as {layout} (dense moments go into mode-wise frames only)"
        )
    if kinds(group["rule"], core) != kinds(group["rule"], site.core_shape):
        raise ValueError(
            f"{site.name}: the checkpoint has ranks {frame.ranks}, this optimizer {site.ranks}, and rule "
            f"{group['rule']} has slots of another kind for long modes than for short ones: use the saved rank"
        )
    if not group["transport"].resizes:
        raise ValueError(
            f"{site.name}: the checkpoint has ranks {frame.ranks}, this optimizer {site.ranks}, and transport "
            f"{group['transport']} cannot take moments from one to the other: use Carry(), Rotate() or Reset(), or "
            f"the saved rank"
        )


def _checked(
    state: Mapping[str, Any], expected: Mapping[str, Spec], site: Site, ignore: tuple[str, ...]
) -> dict[str, Any]:
    """The state with floating-point tensors in the dtype that they are worked on in; raises for what does not fit."""
    missing = sorted(set(expected) - set(state))
    surplus = sorted(set(state) - set(expected) - set(ignore))
    if missing or surplus:
        raise ValueError(f"{site.name}: the checkpoint's state does not fit: missing {missing}, unexpected {surplus}")
    fitting = dict(state)
    for name, spec in expected.items():
        value = state[name]
        if tuple(value.shape) != spec.shape:
            raise ValueError(f"{site.name}: {name} has shape {tuple(value.shape)} in the checkpoint, {spec.shape} here")
        if value.dtype != spec.dtype:
            alike = value.dtype.is_complex == spec.dtype.is_complex
            if not (alike and value.dtype.is_floating_point == spec.dtype.is_floating_point):
                raise ValueError(f"{site.name}: {name} is {value.dtype} in the checkpoint, {spec.dtype} here")
            fitting[name] = value.to(spec.dtype)
    return fitting


def _mended(state: dict[str, Any], site: Site) -> dict[str, Any]:
    """The state with a frame as orthonormal as it was, or made so; coded ones are, whenever they are decoded."""
    for name, value in state.items():
        if name.startswith(stored_frame.PREFIX) and (value.is_floating_point() or value.is_complex()):
            basis = value.to(site.view.dtype)  # transfer tensors are matrices by their last index
            state[name] = reorthonormalize(basis.flatten(0, -2)).view(basis.shape)
    return state
