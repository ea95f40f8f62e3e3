"""A parameter's state as flat tensors: what slots it has, where they are, and what they weigh."""

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .codecs import Codec, Full, InWeights, Spec, store
from .diagnostics import SLOT, STORED
from .draws import scramble
from .frames import stored as stored_frame
from .frames.base import Ranks
from .precondition import Plain
from .residual import Discard
from .residual.base import HELD, HELD_NORM
from .rounding import SEED
from .rules import Adam
from .rules.adam import FIRST, SECOND
from .sites import Site
from .slots import Kind, Slot
from .transport import initial

_T = TypeVar("_T")
SECOND_MAX = "moment.second.max"
RANKS, VALUE = "ranks", "ranks.value"
"""On the host, for adaptive ranks: those that the next frame shall have, and the energy per byte of each last notch."""
VALIDATION = "validation"
"""The key of a group for what :class:`comoving.ranks.Record` holds; absent from groups
of fixed ranks before the first report."""
CORE, WINDOW, REST, SIZE = "core", "window", "rest", "size"
"""What is there between the first gradient and the step only: z; and where steps are taken in the backward pass, how
many gradients there were (on the host), the norm of their part outside the frame, and that of all, once stepped."""
REFRESHED = "refreshed"
"""There, and True, until the step where the first gradient brought a new frame to a weight whose change is deferred:
then what it has is merged into its codes (:class:`comoving.weights.DeferringLinear`)."""
UNFINISHED = (CORE, HELD, HELD_NORM, WINDOW, REST, SIZE, REFRESHED)
RUNNING = "gradient_norm"
"""The key of groups for the norm of the last window's gradients; there where clipping goes by it."""
MEMORY, CADENCE = "finder.", "cadence."
"""How the names of the slots begin that are the finder's own, and the cadence's."""
# Hyper-parameters on which the sites and the shape of the state depend.
FIXED = (
    "rank", "view", "side", "frame", "finder", "cadence", "precondition", "transport", "rule", "residual", "codec",
    "moments", "bases", "amsgrad", "diagnostics", "select", "reasons", "roles", "ranks", "rounding",
)  # fmt: skip
_CODED = (Kind.LINEAR, Kind.VARIANCE, Kind.COVARIANCE)
"""What the codec of moments stores; not in a set: hashes of an Enum take longer than the comparisons."""
_DENSE = {"rule": Adam(), "precondition": Plain(), "moments": Full(), "residual": Discard()}
_UNPROJECTED = {"residual": Discard()}


def parts_of(site: Site, group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group's hyper-parameters as they hold for one parameter: Adam alone for a dense one, codecs as assigned."""
    if site.projected:
        if site.codec is None and site.moments is None:
            return group
        assigned = {"codec": site.codec, "moments": site.moments}
        own = {role: codec for role, codec in assigned.items() if codec is not None}
        return {**group, **own}
    return {**group, **(_UNPROJECTED if site.whole else _DENSE)}


def resized(site: Site, group: Mapping[str, Any], ranks: Ranks) -> Site:
    """The site with a frame of other ranks."""
    if ranks == site.ranks:
        return site
    return replace(site, ranks=ranks, core_shape=group["frame"].core_shape(site.framed.view.shape, ranks))


def current(site: Site, group: Mapping[str, Any], state: Mapping[str, Any]) -> Site:
    """The site with the ranks that the state asks for; as it was decided where ranks are fixed."""
    if RANKS not in state:
        return site
    return resized(site, group, tuple(None if r < 0 else r for r in state[RANKS].tolist()))


def set_ranks(state: dict[str, Any], ranks: Ranks) -> None:
    """Ask for ranks, as numbers with -1 for whole."""
    state[RANKS] = torch.tensor([-1 if r is None else r for r in ranks], dtype=torch.int64, device="cpu")


def ranks_in(site: Site, group: Mapping[str, Any], state: Mapping[str, Any]) -> Ranks:
    """The ranks of the frame in the state; the site's own where neither frame nor moments, being coded, show them."""
    said = stored_frame.ranks(state, site.framed.view.shape)
    if said is not None:
        return said
    momentum = state.get(group["rule"].momentum)
    try:
        return group["frame"].load(state, site.view.shape, momentum).ranks
    except ValueError:
        if momentum is not None:
            raise
        return site.ranks


def at_its_ranks(site: Site, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether the frame in the state has the site's ranks."""
    return ranks_in(site, group, state) == site.ranks


def rule_slots(site: Site, group: Mapping[str, Any]) -> tuple[Slot, ...]:
    """The slots of the rule, and of the transport where the parameter is projected."""
    rule = group["rule"].slots(site.core_shape)
    return (*rule, *group["transport"].slots(rule)) if site.projected else rule


def slot_spec(slot: Slot, site: Site, group: Mapping[str, Any]) -> Spec:
    """Shape and dtype of one slot of the rule or the transport."""
    core = site.core_shape
    real = site.view.dtype.to_real() if site.view.dtype.is_complex else site.view.dtype
    if slot.kind in (Kind.LINEAR, Kind.VARIANCE):
        return Spec(core, site.view.dtype if slot.kind is Kind.LINEAR else real)
    if slot.kind is Kind.MASS:
        mass, turned = group["frame"].mass_shape(site.view.shape, site.ranks), dict(slot.turned_by)
        return Spec(tuple(d if n in turned else k for n, (d, k) in enumerate(zip(core, mass, strict=True))), real)
    if slot.kind is Kind.FACTORED:
        return Spec((core[slot.mode],), real)
    if slot.kind is Kind.THIN:
        return Spec(slot.size, real if slot.real else site.view.dtype)
    if slot.kind in (Kind.COVARIANCE, Kind.BASIS, Kind.CACHE):
        return Spec((core[slot.mode], core[slot.mode]), site.view.dtype)
    return Spec((), torch.float32, scalar=True)


def _store(slot: Slot, codec: Codec) -> Codec | None:
    """What stores a slot; None for plain tensors."""
    if isinstance(codec, Full) or slot.kind not in _CODED:
        return None
    return codec.positive if slot.kind is Kind.VARIANCE else codec


def _stored(slot: Slot, site: Site, group: Mapping[str, Any]) -> dict[str, Spec]:
    spec, store = slot_spec(slot, site, group), _store(slot, group["moments"])
    if store is None:
        return {slot.name: spec}
    return {f"{slot.name}.{name}": p for name, p in store.schema(spec.shape, spec.dtype).items()}


def moments(site: Site, group: Mapping[str, Any]) -> dict[str, Spec]:
    """The slots of rule and transport as stored tensors; none where they are in the weights."""
    if in_weights(group):
        return {}
    return {name: spec for slot in rule_slots(site, group) for name, spec in _stored(slot, site, group).items()}


def first_moments(site: Site, group: Mapping[str, Any], like: Tensor, scalars: torch.device) -> dict[str, Tensor]:
    """The slots of rule and transport before the first gradient, decoded."""
    return _first(site, group, like.device, scalars)


def _first(site: Site, group: Mapping[str, Any], device: torch.device, scalars: torch.device) -> dict[str, Tensor]:
    slots = rule_slots(site, group)
    schema = {slot.name: slot_spec(slot, site, group) for slot in slots}
    fresh = zeros(schema, device, scalars)
    return {slot.name: initial(slot, fresh[slot.name]) for slot in slots}


def awaited(site: Site, group: Mapping[str, Any], state: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """What the moments of a projected parameter begin as, as they are stored; empty where there are some already."""
    names = moments(site, group).keys()
    if not site.projected or any(name in state for name in names if "seed" not in name):
        return {}
    first = packed(site, group, {**state, **_first(site, group, device, state["step"].device)})
    return {name: x for name, x in first.items() if name in names and name not in state}


def in_weights(group: Mapping[str, Any]) -> bool:
    """Whether the moments of a group are kept in the weights (:mod:`comoving.embedded`), and no slots of the state."""
    return isinstance(group["moments"], InWeights)


def coded(group: Mapping[str, Any]) -> bool:
    """Whether the moments of a group are stored in codes."""
    return not isinstance(group["moments"], Full)


def decoded(
    site: Site, group: Mapping[str, Any], moments: Mapping[str, Any], only: str | None = None, rows: int = 0
) -> dict[str, Any]:
    """Moments in a dict of their own, or ``only`` one of them, decoded; what is decoded already stays.

    Args:
        site: of the parameter, with the ranks of the frame that the moments are in.
        group: its hyper-parameters.
        moments: as they are stored.
        only: the name of one slot.
        rows: how many leading dimensions count rows.

    Raises:
        ValueError: codes that belong to no core of these ranks.
    """
    working = dict(moments)
    if not coded(group) or in_weights(group):
        return working
    for slot in rule_slots(site, group):
        if only not in {None, slot.name}:
            continue
        spec, store, names = slot_spec(slot, site, group), _store(slot, group["moments"]), _stored(slot, site, group)
        if store is not None and all(name in working for name in names):
            if any(tuple(working[name].shape[rows:]) != p.shape for name, p in names.items()):
                raise ValueError(f"{site.name}: {slot.name}, as it is stored, belongs to no core of shape {spec.shape}")
            codes = {
                name.removeprefix(f"{slot.name}."): working[name] if p.seed or p.kept else working.pop(name)
                for name, p in names.items()
            }
            working[slot.name] = store.decode(codes, spec.shape, spec.dtype)
    return working


def encoded(
    site: Site, group: Mapping[str, Any], moments: Mapping[str, Any], before: Mapping[str, Any] | None, rows: int = 0
) -> dict[str, Any]:
    """Decoded moments as they are stored, in a dict and with coded tensors of its own.

    Args:
        site: of the parameter.
        group: its hyper-parameters.
        moments: decoded; what is stored already stays.
        before: as they were stored, where they have not moved and keep their codes; else None.
        rows: how many leading dimensions count rows.
    """
    result = dict(moments)
    if not coded(group):
        return result
    if in_weights(group):
        gone = {slot.name for slot in rule_slots(site, group)}
        return {name: x for name, x in result.items() if name not in gone}
    for slot in rule_slots(site, group):
        codec = _store(slot, group["moments"])
        if codec is None or slot.name not in result:
            continue
        value, prefix = result.pop(slot.name), f"{slot.name}."
        if before is None:
            # Seeds, and what is kept.
            own = {n.removeprefix(prefix): x for n, x in result.items() if n.startswith(prefix)}
            _, own = store(codec, value, own, rows)
        else:
            own = {name: before[prefix + name] for name in codec.schema(tuple(value.shape[rows:]), value.dtype)}
        result |= {prefix + name: x for name, x in own.items()}
    return result


def unpacked(site: Site, group: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state in a dict of its own, with its moments decoded."""
    if site.projected and coded(group):
        site = resized(site, group, ranks_in(site, group, state))
    return decoded(site, group, state)


def packed(site: Site, group: Mapping[str, Any], working: Mapping[str, Any]) -> dict[str, Any]:
    """An unpacked state as it is stored."""
    return encoded(site, group, working, None)


def commit(state: MutableMapping[str, Any], new: Mapping[str, Any]) -> None:
    """Bring a state up to date, all at once."""
    if state.keys() != new.keys():
        for name in [name for name in state if name not in new]:
            del state[name]
    state.update(new)


def zeros(schema: Mapping[str, Spec], device: torch.device, scalars: torch.device) -> dict[str, Tensor]:
    """Zero tensors of these shapes and dtypes, single numbers on a device of their own."""
    return {
        name: torch.zeros(spec.shape, dtype=spec.dtype, device=place(spec, device, scalars))
        for name, spec in schema.items()
    }


def place(spec: Spec, device: torch.device, scalars: torch.device) -> torch.device:
    """Where a tensor is stored: seeds and counts of draws, which are read at every refresh, always on the host."""
    if not spec.shape and spec.dtype == torch.int64:
        return torch.device("cpu")
    return scalars if spec.scalar else device


def first_seeds(site: Site, group: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """The seeds of stochastic rounding before the first draw; those of the frame begin with it.

    They follow from the optimizer's seed, the parameter's place, the block's number and the slot's name.
    """
    return {
        name: torch.tensor(scramble(seed, site.index, *name.encode()), device="cpu")
        for name, spec in layout(site, group).items()
        if spec.seed and not name.startswith(stored_frame.PREFIX)
    }


def initial_state(site: Site, group: Mapping[str, Any], p: Tensor, scalars: torch.device, seed: int) -> dict[str, Any]:
    """The state of a parameter before its first step; frame and moments of a projected one follow later.

    That of a parameter with blocks is empty before its first gradient.
    """
    if site.blocks:
        return {}
    schema, group = layout(site, group), parts_of(site, group)
    if site.plain:
        step = zeros({"step": schema.pop("step")}, p.device, scalars)
        return step | {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in schema}
    later = set(moments(site, group))
    if site.projected:
        later |= {*stored_frame.schema(group, site.view.shape, site.ranks, site.view.dtype), RANKS, VALUE}
    state = {"tick": 0, **zeros({n: x for n, x in schema.items() if n not in later}, p.device, scalars)}
    state |= first_seeds(site, group, seed)
    if not site.projected:
        state = packed(site, group, state | first_moments(site, group, p, scalars))
    return {**state, **asked(site, group)}


def asked(site: Site, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """What adaptive ranks start from."""
    if not (site.projected and group["ranks"].adaptive):
        return {}
    modes = len(site.ranks)
    asked = {RANKS: torch.zeros(modes, dtype=torch.int64), VALUE: torch.full((modes,), torch.inf, dtype=torch.float64)}
    set_ranks(asked, site.ranks)
    return asked


def layout(site: Site, group: Mapping[str, Any]) -> dict[str, Spec]:
    """Every tensor of a parameter's state between two steps; those of blocks behind the block's number."""
    if site.blocks:
        own = layout(site.block(0), group_of_block(group))
        return {f"{b}.{name}": spec for b in range(site.blocks) for name, spec in own.items()}
    schema = {"step": Spec((), torch.float32, scalar=True)}
    if site.plain:
        names = (FIRST, SECOND, SECOND_MAX) if group["amsgrad"] else (FIRST, SECOND)
        return schema | {name: Spec(site.view.stored_shape, site.view.stored_dtype) for name in names}
    shape, dtype = site.view.shape, site.view.dtype
    group = parts_of(site, group)
    if site.rounded:
        schema[SEED] = Spec((), torch.int64, scalar=True, seed=True)
    schema |= moments(site, group)
    schema |= group["precondition"].schema(shape, dtype)
    if site.projected:
        framed = site.framed.view.shape
        schema |= stored_frame.schema(group, framed, site.ranks, dtype)
        remembered = group["finder"].schema(framed, site.ranks, dtype)
        schema |= prefixed(remembered, MEMORY) | prefixed(group["cadence"].schema(), CADENCE)
        schema |= group["residual"].schema(group["codec"], shape, site.core_shape, dtype)
        if group["diagnostics"]:
            schema[SLOT] = Spec((len(STORED),), site.view.dtype.to_real())
        if group["ranks"].adaptive:
            schema |= {RANKS: Spec((len(shape),), torch.int64), VALUE: Spec((len(shape),), torch.float64)}
    return schema


def group_of_block(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a block: its group's, with the layout of one frame."""
    return {**group, "frame": group["frame"].inner}


def prefixed(named: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    """The slots of a part, or their specs, under the names that they have in the state."""
    return {prefix + name: x for name, x in named.items()}


def spec_bytes(spec: Spec) -> int:
    """Bytes of one stored tensor."""
    return prod(spec.shape) * spec.dtype.itemsize


def state_bytes(optimizer: Optimizer, projected: bool = False) -> int:
    """Exact bytes of an optimizer's state: the storages of its tensors, each counted once.

    Args:
        optimizer: any torch optimizer whose state holds tensors.
        projected: count only what belongs to projected parameters: frame, moments, feedback, scales, finder state.
            0 for an optimizer that is not ours.
    """
    sites: Mapping[Tensor, Site] = getattr(optimizer, "sites", {})
    storages: dict[int, int] = {}
    for p, slots in optimizer.state.items():
        if projected and not (p in sites and sites[p].projected):
            continue
        for value in slots.values():
            if isinstance(value, Tensor):
                storage = getattr(value, "_local_tensor", value).untyped_storage()  # of a DTensor what is here
                storages[id(storage) if storage.data_ptr() == 0 else storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
