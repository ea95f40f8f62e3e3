"""Bytes and operations of a training run, before it runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, cast

import torch
from torch import nn

from .. import state as slots
from ..codecs import Full
from ..diagnostics import SLOT
from ..distributed.wire_frames import WireFrame
from ..distributed.wires import WIRES, WireName
from ..frames.base import Rank
from ..optimizer import LowRankOptimizer
from ..recipes import build, recipes
from ..sites import Site
from ..slots import Kind
from ..units import show_bytes
from ..validate import check_choice, check_int
from ..weights import DeferringLinear, codes_of
from . import sharding
from .compressing import Compressing
from .needs import NOTHING, Cache, Needs, kind_of, needs
from .shapes import Subject, subject

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE = ("moments", "frames", "feedback", "finder", "preconditioner", "scalars")
"""The parts of the state: the rule's and the transport's moments; frames; what the residual keeps; the finder's memory;
statistics of single modes and preconditioners; step counts, seeds, diagnostics, and what the cadence keeps."""
WIRE = ("gradients", "weights", "dealt", "norms", "refreshes", "dense", "cores", "frames")
"""What is on the wire: gradients; weights that FSDP gathers; weights and gradients of parameters that one rank steps
for all, and new weights back; figures between refreshes, and apart from them cores that are sums over ranks; and what
finds frames together. Where cores are sent:
gradients of dense parameters; cores, with what tells of bad gradients; and what frames are searched in."""
_KINDS = {
    Kind.LINEAR: "moments",
    Kind.VARIANCE: "moments",
    Kind.MASS: "moments",
    Kind.THIN: "moments",
    Kind.SCALAR: "scalars",
}


@dataclass(frozen=True)
class Plan:
    """The memory of one rank, in bytes, and the optimizer's operations.

    Weights, gradients and state are exact; temporaries are those of the optimizer's own code, run on tensors without
    data; communication follows torch's defaults; activations are an estimate.

    peak = weights + state + communication + max(gradients + activations, gradients + temporaries)

    With ``layerwise`` a parameter is stepped while activations are still there, and gradients are those of the largest
    parameter:  peak = weights + state + communication + gradients + activations + temporaries.

    Args:
        model, recipe, rank, dtype, device: what was planned for; a rank of None is full rank.
        batch, sequence: samples a step and tokens a sample, or None.
        ddp, fsdp: ranks that share the work, or None.
        layerwise: whether parameters are stepped in the backward pass.
        parameters, projected: numbers of entries: in all, and of those in low-rank frames.
        weights: parameters and buffers.
        gradients: of all parameters that are trained; of the largest one with ``layerwise``.
        state: bytes by the names of :data:`STATE`.
        step_temporaries: the most that a step allocates beside these and frees again.
        refresh_temporaries: likewise for a step with a refresh, the first one included.
        communication: DDP's buckets, or the units that FSDP gathers and scatters.
        activations: an estimate; None where there was nothing to estimate it from.
        activations_formula: how, in symbols; or why not.
        wire: bytes that a rank puts on the wire in a step, by what they are (:data:`WIRE`); a ring sends sums
            2 (N - 1)/N times. Those of refreshes and frames are divided by the period.
        step_flops: real operations of a step of the optimizer between refreshes.
        refresh_flops: those that refreshing every frame once adds.
        options: what was passed on to :func:`comoving.build`.
        compress: the wire of :func:`comoving.distributed.compress`, or None where whole gradients are sent.
    """

    model: str
    recipe: str
    rank: Rank | None
    dtype: str
    device: str
    batch: int | None
    sequence: int | None
    ddp: int | None
    fsdp: int | None
    layerwise: bool
    parameters: int
    projected: int
    weights: int
    gradients: int
    state: Mapping[str, int]
    step_temporaries: int
    refresh_temporaries: int
    communication: int
    activations: int | None
    activations_formula: str
    step_flops: int
    refresh_flops: int
    wire: Mapping[str, int] = field(default_factory=lambda: {})
    options: Mapping[str, Any] = field(default_factory=lambda: {})
    compress: WireName | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state: what :func:`comoving.state_bytes` counts after the first step."""
        return sum(self.state.values())

    @property
    def wire_bytes(self) -> int:
        """Bytes that a rank puts on the wire in a step."""
        return sum(self.wire.values())

    @property
    def temporaries(self) -> int:
        """The most that any step allocates and frees."""
        return max(self.step_temporaries, self.refresh_temporaries)

    @property
    def peak_bytes(self) -> int:
        """The peak of a step, forward and backward pass included as far as activations are estimated."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Name -> bytes of what is there at the peak, which they add up to."""
        activations = self.activations or 0
        temporaries = self.temporaries
        if not self.layerwise:  # activations are gone when the optimizer steps: the larger of both counts
            activations, temporaries = (activations, 0) if activations > temporaries else (0, temporaries)
        state = {name: self.state.get(name, 0) for name in STATE}
        parts = {"weights": self.weights, "gradients": self.gradients, **state}
        return parts | {
            "temporaries": temporaries,
            "communication": self.communication,
            "activations": activations,
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        rank = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        plain = asdict(self) | {"rank": rank, "options": {k: str(v) for k, v in self.options.items()}}
        return plain | {
            "state_bytes": self.state_bytes,
            "peak_bytes": self.peak_bytes,
            "wire_bytes": self.wire_bytes,
            "parts": self.parts(),
        }

    def __str__(self) -> str:
        lines = [(name, show_bytes(size)) for name, size in self.parts().items() if size]
        lines += [("peak", show_bytes(self.peak_bytes)), ("state alone", show_bytes(self.state_bytes))]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name.ljust(width)}  {text.rjust(10)}" for name, text in lines)


def plan(
    model: str | nn.Module | object,
    recipe: str = "comoving",
    rank: Rank | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    ddp: int | None = None,
    fsdp: int | None = None,
    compress: bool | WireName = False,
    whole: WireFrame | None = None,
    layerwise: bool = False,
    checkpointing: bool = False,
    device: str = "cuda",
    **options: Any,
) -> Plan:
    """The memory that training a model with a recipe takes, before it is trained.

    The optimizer is built on a copy of the model without data. Its state is read off its layout, and its step is
    rehearsed, once for each kind of parameter: the real code runs on the meta device while every storage is followed.

    Args:
        model: a module, or what :func:`comoving.memory.shapes.subject` takes: "llama-7b", "fno:modes=16x16,...", a
            Hugging Face config or its path, "package.module:function".
        recipe: a name of :func:`comoving.recipes`.
        rank: as for :func:`comoving.build`.
        dtype: of the weights and gradients; None for float32, or as a given module has them.
        batch: samples a step on one rank, for the estimate of activations.
        sequence: tokens a sample, likewise.
        ddp: ranks of DistributedDataParallel: each holds everything, and in buckets of 25 MiB, which exist all at once,
            a copy of all gradients (none with ``gradient_as_bucket_view=True``, which this does not assume).
        fsdp: ranks of fully_shard, which cuts the first dimension: see :mod:`comoving.distributed.placement` for what
            each steps and holds. The plan is that of the first rank, which has the most rows, with the state of the
            rank that steps most for others. Gathered at once are the weights of the two largest units, the one at work
            and the next; a unit's whole gradients are there twice, as computed and as the collective's input.
        compress: whether DistributedDataParallel sends cores, as :func:`comoving.distributed.compress` lets it, or the
            name of its wire; True is "bfloat16". Gradients are all there when the backward pass ends, and so is what
            every projected parameter keeps open until the step: another copy of its feedback, and its core as it is, as
            it is sent, and as it comes back. These are counted as temporaries.
        whole: how compress() sends gradients of whole frames; None for as they are.
        layerwise: parameters are stepped in the backward pass and their gradients freed: gradients of the largest one.
        checkpointing: whether layers keep their inputs alone for the backward pass.
        device: "cuda" or "cpu": on the CPU what is drawn on the host counts too, and torch steps dense parameters one
            by one; on CUDA it steps them together by default, with a temporary as large as all of them
            (``foreach=False`` saves that).
        **options: passed on to :func:`comoving.build`: ``codec="int8"``, ``moments="int8"``, ``refresh_every=200`` ...

    Raises:
        ValueError: an unknown model, recipe, dtype or wire, both ``ddp`` and ``fsdp``, numbers below 1, or what
            compress() refuses.
        TypeError: an unknown option.
        ImportError: a missing extra.
    """
    check_choice("device", device, ("cuda", "cpu"))
    for name, value in (("batch", batch), ("sequence", sequence), ("ddp", ddp), ("fsdp", fsdp)):
        if value is not None:
            check_int(name, value, 1)
    if ddp is not None and fsdp is not None:
        raise ValueError(f"ddp={ddp} and fsdp={fsdp} are two ways to share one model: choose one")
    return drafted(
        subject(model, dtype_of(dtype)), recipe, rank, batch=batch, sequence=sequence, ddp=ddp, fsdp=fsdp,
        compress=wire_named(compress), whole=whole, layerwise=layerwise, checkpointing=checkpointing, device=device,
        options=options, cache={},
    )  # fmt: skip


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name.

    Raises:
        ValueError: an unknown one.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        return DTYPES[dtype]
    return dtype


def wire_named(compress: bool | str | None) -> WireName | None:
    """The wire that is meant by True or by its name; None for none.

    Raises:
        ValueError: an unknown one.
    """
    if compress is None or compress is False:
        return None
    name = "bfloat16" if compress is True else compress
    check_choice("compress", name, WIRES)
    return cast("WireName", name)


def drafted(
    model: Subject,
    recipe: str,
    rank: Rank | None,
    *,
    batch: int | None,
    sequence: int | None,
    ddp: int | None,
    fsdp: int | None,
    layerwise: bool,
    checkpointing: bool,
    device: str,
    options: Mapping[str, Any],
    cache: Cache | None,
    compress: WireName | None = None,
    whole: WireFrame | None = None,
) -> Plan:
    """:func:`plan` for a model without data.

    ``cache`` keeps what was rehearsed for the next plan of the same model; with None nothing is rehearsed, and
    temporaries and operations are 0.
    """
    if compress is not None and ddp is None:
        raise ValueError("compress is of DistributedDataParallel: give ddp, the number of ranks")
    if whole is not None and compress is None:
        raise ValueError("whole is of what compress() sends: give compress, too")
    if compress is not None and layerwise:
        raise ValueError("compress is refused with layerwise: it takes gradients up by itself, and steps after that")
    optimizer = build(recipe, model.module, rank=rank, **options)
    ranks = fsdp or 1
    cores = None if compress is None or ddp is None else Compressing(optimizer, compress, ddp, whole)
    traffic = sharding.shard(optimizer, ranks) if ranks > 1 else None
    everything = list(model.module.parameters())
    trained = [p for p in everything if p.requires_grad]
    own = {p: sharding.shard_bytes(p, ranks) for p in everything}
    each = [own[p] for p in trained]
    gradients = max(each, default=0) if layerwise else sum(each)
    work = NOTHING if cache is None else needs(optimizer, device, layerwise, ranks, cache, traffic, cores)
    kept = {} if cores is None else cores.wire_state()
    if cores is not None:
        waiting = cores.wire_waiting()
        work = replace(work, step=max(work.step, waiting), refresh=max(work.refresh, waiting))
    dealt, lent = sharding.dealt_bytes(optimizer) if traffic is not None else (0, 0)
    itemsize = max((p.element_size() for p in trained if not p.is_complex()), default=4)
    activations, formula = None, "not estimated: give batch"
    if batch is not None and model.activations is None:
        formula = "not estimated: nothing is known of what this model keeps for its backward pass"
    elif batch is not None and model.activations is not None:
        activations = model.activations.estimate(batch, sequence, itemsize, checkpointing)
        formula = model.activations.formula
    return Plan(
        model=model.name,
        recipe=recipe,
        rank=recipes()[recipe.partition("+")[0]].rank_for(rank),
        dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in everything})),
        device=device,
        batch=batch,
        sequence=sequence,
        ddp=ddp,
        fsdp=fsdp,
        layerwise=layerwise,
        parameters=sum(p.numel() for p in everything),
        projected=sum(p.numel() for p, site in optimizer.sites.items() if site.projected),
        weights=_weights(model.module, optimizer, ranks),
        gradients=gradients,
        state={name: size + kept.get(name, 0) for name, size in state_by_part(optimizer).items()},
        step_temporaries=work.step + lent,
        refresh_temporaries=work.refresh + lent,
        communication=_communication(model.module, ddp, fsdp),
        activations=activations,
        activations_formula=formula,
        wire=_wire(model.module, optimizer, work, dealt, ddp, fsdp, cores),
        step_flops=work.step_flops,
        refresh_flops=work.refresh_flops,
        options=dict(options),
        compress=compress,
    )


def state_by_part(optimizer: LowRankOptimizer) -> dict[str, int]:
    """The bytes of an optimizer's state between two steps by the names of :data:`STATE`.

    Of sharded parameters those that are here, and of those that others step, what the rank has that steps most.
    """
    here: dict[str, int] = dict.fromkeys(STATE, 0)
    owned: dict[int, dict[str, int]] = {}
    for group in optimizer.param_groups:
        known: dict[Any, dict[str, int]] = {}
        for p in group["params"]:
            if p.requires_grad:
                site = optimizer.sites[p]
                key = kind_of(p, site, group)
                if key not in known:
                    known[key] = _state_of(site.here, group)
                total = here if site.owner is None else owned.setdefault(site.owner, dict.fromkeys(STATE, 0))
                for name, size in known[key].items():
                    total[name] += size
    most = max(owned.values(), key=lambda own: sum(own.values()), default={})
    return {name: size + most.get(name, 0) for name, size in here.items()}


def _state_of(site: Site, group: Mapping[str, Any]) -> dict[str, int]:
    """The bytes of one parameter's state by the names of :data:`STATE`."""
    kinds = _kinds(site, group)
    total: dict[str, int] = dict.fromkeys(STATE, 0)
    for name, spec in slots.layout(site, group).items():
        own = name.partition(".")[2] if site.blocks else name
        total[kinds[own]] += slots.spec_bytes(spec)
    return total


def _kinds(site: Site, group: Mapping[str, Any]) -> dict[str, str]:
    """Slot name -> the part of the state that it belongs to, for the parameter or any one block of it."""
    if site.blocks:
        return _kinds(site.block(0), slots.group_of_block(group))
    if site.plain:
        return {name: "scalars" if name == "step" else "moments" for name in slots.layout(site, group)}
    own = slots.parts_of(site, group)
    rule = slots.rule_slots(site, own)
    found: dict[str, str] = {}
    for name in slots.layout(site, group):
        slot = next((s for s in rule if name == s.name), None) or next(
            (s for s in sorted(rule, key=lambda s: -len(s.name)) if name.startswith(f"{s.name}.")), None
        )
        if name.startswith("frame."):
            found[name] = "frames"
        elif name.startswith(slots.MEMORY):
            found[name] = "finder"
        elif slot is not None:
            found[name] = _KINDS.get(slot.kind, "preconditioner")
        elif name.startswith(slots.CADENCE) or name in (SLOT, "step", slots.RANKS, slots.VALUE):
            found[name] = "scalars"
        elif name in own["precondition"].schema(site.view.shape, site.view.dtype):
            found[name] = "preconditioner"
        else:
            found[name] = "feedback"
    return found


def _weights(module: nn.Module, optimizer: LowRankOptimizer, ranks: int) -> int:
    """Bytes of parameters and buffers; of a parameter in codes, its buffers and the one number that carries it.

    A change that is kept beside codes comes with the first refresh, and with its factor where the state has that in
    another form.
    """
    total = sharding.bytes_of(list(module.buffers()))
    for p in module.parameters():
        codes = codes_of(p)
        total += sharding.shard_bytes(p, ranks) if codes is None else p.element_size()
        if isinstance(codes, DeferringLinear) and p in optimizer.sites:
            total -= sharding.bytes_of([x for x in (codes.factor, codes.change) if x is not None])
            site, group = (
                optimizer.sites[p],
                next(g for g in optimizer.param_groups if any(p is q for q in g["params"])),
            )
            frame = group["frame"].schema(site.view.shape, site.ranks, site.view.dtype)
            factor = 0 if isinstance(group["bases"], Full) else sum(map(slots.spec_bytes, frame.values()))
            total += prod(site.core_shape) * site.view.dtype.itemsize + factor
    return total


def _communication(module: nn.Module, ddp: int | None, fsdp: int | None) -> int:
    if ddp is not None and ddp > 1:
        return sharding.bytes_of([p for p in module.parameters() if p.requires_grad])
    if fsdp is not None and fsdp > 1:
        sizes = sorted((sharding.bytes_of(unit) for unit in sharding.units(module)), reverse=True)
        return sum(sizes[:2]) + 2 * max(sizes, default=0)
    return 0


def _wire(
    module: nn.Module,
    optimizer: LowRankOptimizer,
    work: Needs,
    dealt: int,
    ddp: int | None,
    fsdp: int | None,
    cores: Compressing | None,
) -> dict[str, int]:
    """What a rank puts on the wire in a step, by the names of :data:`WIRE`."""
    trained = sharding.bytes_of([p for p in module.parameters() if p.requires_grad])
    period = min((group["refresh_every"] for group in optimizer.param_groups), default=1)
    if ddp is not None and ddp > 1:
        if cores is None:
            return {"gradients": trained}
        frames = work.step_bytes + work.refresh_bytes // period + cores.wire_frames()
        return cores.sent(module) | {"frames": frames}
    if fsdp is None or fsdp == 1:
        return {}
    sites = [site for site in optimizer.sites.values() if site.one_core]
    sums = sum(prod(site.core_shape) * site.view.dtype.itemsize for site in sites)
    everything = sum(sharding.shard_bytes(p, fsdp) for p in module.parameters())
    return {
        "gradients": trained,
        "weights": 2 * everything,
        "dealt": dealt,
        "norms": work.step_bytes - sums,
        "cores": sums,
        "refreshes": work.refresh_bytes // period,
    }
