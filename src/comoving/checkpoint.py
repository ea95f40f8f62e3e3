"""What a checkpoint holds beside tensors, and what it becomes in an optimizer of other ranks, groups or blocks."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .clock import Clock
from .codecs import Full, Spec
from .frames import stored as stored_frame
from .frames.base import Ranks
from .groups import check_options
from .linalg import reorthonormalize
from .ranks.base import Record
from .recode import recoded
from .refusals import kinds
from .rules.adam import FIRST, SECOND
from .sites import Site
from .slots import Kind
from .state import (
    MEMORY,
    RANKS,
    SECOND_MAX,
    UNFINISHED,
    VALIDATION,
    VALUE,
    asked,
    current,
    first_seeds,
    group_of_block,
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
from .validate import plain
from .views import View

_TORCH_NAMES = {"exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": SECOND_MAX}
# What makes a recipe. Ranks are not among them: a change of rank is one more change of frame.
_STRUCTURE = (
    "view", "side", "frame", "finder", "cadence", "precondition", "transport", "rule", "residual", "codec", "moments",
    "bases", "amsgrad", "rounding",
)  # fmt: skip
# Neither hyper-parameters of ours nor a scheduler's marks: what torch's AdamW writes beside its own.
_FOREIGN = {"capturable", "differentiable", "decoupled_weight_decay", "name"}
_OURS = {*_STRUCTURE, "rank", "ranks", "select", "reasons", "diagnostics", "param_names", "params"}


def describe(value: Any) -> Any:
    """A hyper-parameter as plain data, which loads with ``weights_only=True``: a part as its name and fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"part": type(value).__name__} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    return plain(value)


def describe_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group with every part described."""
    return {key: describe(value) for key, value in group.items()}


def schedule_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a loaded group takes over: the rate, decay rates and schedulers' marks, not what makes the recipe."""
    return {key: value for key, value in saved.items() if key not in _OURS | _FOREIGN}


def check_recipe(saved: Mapping[str, Any], group: Mapping[str, Any], index: int) -> None:
    """Raise unless a saved group was made by the same recipe; a group of torch's AdamW has none of the keys and passes.

    Raises:
        ValueError: naming each hyper-parameter that differs, with both values.
    """
    if saved.get("decoupled_weight_decay") is False and saved.get("weight_decay", 0) > 0:
        raise ValueError(
            f"the checkpoint's group {index} comes from torch.optim.Adam with weight_decay={saved['weight_decay']}, "
            f"which it adds to the gradient, so that the saved moments hold it; here weights decay by themselves. In "
            f"its param_groups set weight_decay to 0 to load it without decay, or decoupled_weight_decay to True to go "
            f"on with AdamW's"
        )
    differing = [
        f"{key}: saved {saved[key]!r}, here {describe(group[key])!r}"
        for key in _STRUCTURE
        if key in saved and saved[key] != describe(group[key])
    ]
    if differing:
        raise ValueError(
            f"the checkpoint's group {index} comes from another recipe; build the optimizer with the recipe it was "
            f"saved from, or start with fresh state. " + "; ".join(differing)
        )


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
        return {str(b): admit(own, site.block(b), inner, seed) for b, own in _blocks_of(saved, site).items()}
    state = _renamed(saved, site)
    state, site = _with_ranks(state, site, group)
    expected, group = layout(site, group), parts_of(site, group)
    caches = {slot.name for slot in rule_slots(site, group) if slot.kind is Kind.CACHE}
    expected = {name: spec for name, spec in expected.items() if name in state or name not in caches}
    if site.plain:
        state = _checked(state, expected, site, ignore=("tick", *UNFINISHED))
        return {name: value for name, value in state.items() if name in expected or name in UNFINISHED}
    state.setdefault("tick", 0)
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


def _said(state: Mapping[str, Any], site: Site) -> Ranks | None:
    try:
        return stored_frame.ranks(state, site.view.shape)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None


def _is_of(name: str, slot: str) -> bool:
    return name == slot or name.startswith(f"{slot}.")


def _packed(state: dict[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its moments as they are stored here."""
    return packed(site, group, state)


def _blocks_of(saved: Mapping[str, Any], site: Site) -> dict[int, dict[str, Any]]:
    """The inverse of :func:`flat`; dense state, such as AdamW's, is cut into blocks.

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
    if dense and not site.plain and tuple(state[FIRST].shape) == site.view.stored_shape:
        if SECOND_MAX in state:
            raise ValueError(f"{site.name}: state of amsgrad has no meaning in a moving subspace")
        state[FIRST] = site.view.see(state[FIRST])
        if SECOND in state:
            state[SECOND] = _real_second(state[SECOND], site.view)
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
    layout, shape, momentum = group["frame"], site.view.shape, group["rule"].momentum
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


def check_form(state_dict: object) -> None:
    """Raise unless something has the form of an optimizer's ``state_dict()``.

    Raises:
        ValueError: saying what it has instead.
    """
    given: Any = state_dict
    if not isinstance(given, Mapping) or not {"state", "param_groups"} <= given.keys():
        found = ", ".join(map(str, [*given][:5])) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"an optimizer's state_dict() has 'state' and 'param_groups', got {found or 'nothing'}")


def owned(
    state: Mapping[str, Any], p: Tensor, site: Site, group: Mapping[str, Any], scalars: torch.device
) -> dict[str, Any]:
    """An admitted state in copies of the parameter's own, on the right devices, in the dtypes that it was saved in.

    Args:
        state: of the parameter; of one with blocks a state for each.
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

    if site.blocks:
        return {b: {n: own(f"{b}.{n}", x) for n, x in block.items()} for b, block in state.items()}
    return {name: own(name, value) for name, value in state.items()}


def unheard(group: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a group whose ranks adapt, before any validation loss.

    It is always there, since torch's flattened checkpoints restore keys that exist already, and no others.
    """
    return {VALIDATION: tuple(Record())} if group["ranks"].adaptive else {}


def match_parameters(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> dict[Tensor, Any]:
    """Parameter -> key of its saved state: by name where both sides have names, by place otherwise.

    Raises:
        ValueError: other names, or other group sizes.
    """
    keys = [key for group in saved for key in group["params"]]
    params = [p for group in groups for p in group["params"]]
    if all("param_names" in group for group in (*saved, *groups)):
        by_name = dict(zip((n for g in saved for n in g["param_names"]), keys, strict=True))
        names = [n for g in groups for n in g["param_names"]]
        if set(names) != set(by_name):
            raise ValueError(
                f"the checkpoint holds other parameters: missing {sorted(set(names) - set(by_name))}, unexpected "
                f"{sorted(set(by_name) - set(names))}"
            )
        return {p: by_name[name] for name, p in zip(names, params, strict=True)}
    sizes, here = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if sizes != here:
        raise ValueError(
            f"the checkpoint has groups of {sizes} parameters, this optimizer {here}: without names they can only be "
            f"matched by place. Save from, and load into, optimizers that were given named_parameters()"
        )
    return dict(zip(params, keys, strict=True))


def load_groups(
    saved: list[dict[str, Any]], groups: list[dict[str, Any]], keys: Mapping[Tensor, Any]
) -> list[dict[str, Any]]:
    """The groups with what they take over from the saved groups that hold their parameters.

    Where these disagree on a value (weight decay, say, if parameters were grouped otherwise), a group keeps its own.

    Args:
        saved: groups of the checkpoint.
        groups: groups of this optimizer.
        keys: parameter -> key of its saved state.

    Raises:
        ValueError: another recipe, or a saved value outside its interval.
    """
    holder = {key: group for group in saved for key in group["params"]}
    loaded: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        sources = list({id(g): g for g in (holder[keys[p]] for p in group["params"])}.values())
        for source in sources:
            check_recipe(source, group, index)
        schedules = [schedule_of(source) for source in sources]
        agreed = {k: v for k, v in schedules[0].items() if all(k in s and s[k] == v for s in schedules)}
        loaded.append({k: v for k, v in group.items() if k != VALIDATION} | unheard(group) | agreed)
        check_options(loaded[-1])
    return loaded
