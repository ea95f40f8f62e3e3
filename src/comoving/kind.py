"""Kinds: what was decided, once, about a parameter and those that are like it, but for their names and places."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from . import state as slots
from .cadence import Cadence
from .codecs import Codec
from .comm import LOCAL, Comm
from .embedded import Embedded
from .finders import Finder
from .frames import Layout
from .frames import stored as stored_frame
from .likeness import one_by_one
from .precondition import Precondition
from .ranks import Policy
from .residual import Residual
from .rules import Rule
from .sites import Site
from .transport import Transport

_TOGETHER = 2**22
"""Entries of a batch at most: what is stacked is there twice while it is stepped."""


@dataclass(frozen=True)
class Parts:
    """The parts that a parameter is stepped by, one of each role; see the protocols of their packages."""

    frame: Layout
    finder: Finder
    cadence: Cadence
    precondition: Precondition
    transport: Transport
    rule: Rule
    residual: Residual
    codec: Codec
    moments: Codec
    bases: Codec
    ranks: Policy

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Parts":
        """Those of a parameter group."""
        return cls(**{field.name: group[field.name] for field in fields(cls)})


@dataclass(frozen=True, eq=False)
class Kind:
    """What the rows of a batch share; of what is stepped alone, what was decided about it.

    Args:
        site: how it is seen, its ranks and its codecs; name and place are those of the first that is of this kind.
        group: its hyper-parameters as they hold for it; see :func:`comoving.state.parts_of`. Those that may be edited
            are read anew at every step (:class:`comoving.steps.Now`).
        number: of its parameter group.
        stacks: whether rows of this kind can be stepped together.
        comm: joins what processes have that share it, and step it together.
    """

    site: Site
    group: Mapping[str, Any]
    number: int
    stacks: bool = False
    comm: Comm = LOCAL

    @cached_property
    def parts(self) -> Parts:
        """What its rows are stepped by."""
        return Parts.of(self.group)

    @cached_property
    def moments(self) -> frozenset[str]:
        """The names of all slots of the rule and the transport, decoded and as they are stored."""
        own = {slot.name for slot in slots.rule_slots(self.site, self.group)}
        return frozenset(own | slots.moments(self.site, self.group).keys())

    @cached_property
    def embedded(self) -> Embedded | None:
        """How its moments lie in the weights; None where they are in the state."""
        return Embedded.of(self.site, self.group)

    @cached_property
    def declared(self) -> dict[str, frozenset[str]]:
        """The names of the slots that each part declares, by compartment; of ``moments`` as above."""
        site, parts = self.site, self.parts
        shape, dtype = site.view.shape, site.view.dtype
        found: dict[str, Iterable[str]] = dict.fromkeys(("finder", "cadence", "residual"), ())
        if site.projected:
            found["finder"] = parts.finder.schema(site.framed.view.shape, site.ranks, dtype)
            found["cadence"] = parts.cadence.schema()
            found["residual"] = parts.residual.schema(parts.codec, shape, site.core_shape, dtype)
        found |= {"moments": self.moments, "precondition": parts.precondition.schema(shape, dtype)}
        return {name: frozenset(names) for name, names in found.items()}

    @cached_property
    def shared(self) -> frozenset[str]:
        """The slots on the host that are the same for all rows of a batch, but for the ranks that frames store."""
        return frozenset(
            name
            for name, spec in slots.layout(self.site, self.group).items()
            if not spec.shape and spec.dtype == torch.int64 and not (spec.seed or spec.own)
        )

    @cached_property
    def basis(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor of a frame of these ranks."""
        site = self.site
        shape, dtype = site.framed.view.shape, site.view.dtype
        found = stored_frame.schema(self.group, shape, site.ranks, dtype) if site.projected else {}
        return {name: spec.shape for name, spec in found.items()}

    @cached_property
    def said(self) -> dict[str, int]:
        """Name and value of each rank that a frame stores."""
        said = {stored_frame.RANK.format(n): r for n, r in enumerate(self.site.ranks) if r is not None}
        return {name: rank for name, rank in said.items() if name in self.shared}

    @cached_property
    def alone(self) -> bool:
        """Whether frames of this kind are refreshed one by one, at steps of their own."""
        return self.site.projected and one_by_one(self.group)

    @cached_property
    def replays(self) -> bool:
        """Whether a step between refreshes is the same operations with the same numbers each time.

        Not where processes share the parameter, where seeds are drawn from on the host, where a finder remembers
        anything (of every gradient, or a frame that it has searched ahead), where the host chooses ranks, and where
        weights are in codes or rounded stochastically.
        """
        site, parts = self.site, self.parts
        if (
            site.plain
            or site.blocks
            or site.coded
            or site.rounded
            or site.shard is not None
            or site.owner is not None
            or not (parts.rule.replays and parts.precondition.replays)
        ):
            return False
        specs = slots.layout(site, self.group)
        if any(spec.seed for spec in specs.values()):
            return False
        notes = any(name.startswith(slots.MEMORY) for name in specs)
        return not site.projected or (parts.residual.replays and not notes and not parts.ranks.adaptive)

    @cached_property
    def entries(self) -> int:
        """How many entries a row has; where processes share it, the largest part: all decide alike."""
        site = self.site if self.site.shard is None else self.site.of_length(max(self.site.shard.sizes))
        return prod(site.view.shape)

    @property
    def most(self) -> int:
        """How many rows a batch has at most."""
        return max(1, _TOGETHER // max(1, self.entries))

    @cached_property
    def straight(self) -> bool:
        """Whether parameters and gradients are seen just as they are stored."""
        view = self.site.view
        return view.name == "tensor" and view.dtype is view.stored_dtype and not view.dtype.is_complex

    def at(self, site: Site) -> "Kind":
        """The kind with the ranks of another site."""
        return self if site.ranks == self.site.ranks else replace(self, site=site)

    def now(self, state: Mapping[str, Any], missed: int = 0) -> Hashable:
        """What the host knows of a row, by which rows are sorted; None where it has to be stepped alone now.

        Args:
            state: of the row.
            missed: what stands for the steps that it has missed, where the device alone knows its count.
        """
        tick, t = state["tick"], state["step"]
        if self.site.projected and (
            tick <= 0
            or any(name not in state or state[name].shape != shape for name, shape in self.basis.items())
            or any(int(state[name]) != rank for name, rank in self.said.items())
        ):
            return None
        on_host = t.device.type == "cpu"
        if not on_host and self.alone and self.parts.transport.restarts:
            return None  # each row's count begins anew with its own frames
        count = float(t.numpy()) if on_host else missed
        host = (int(state[name]) for name in self.shared if name not in self.said)
        return (tick, count, state.get(slots.WINDOW), frozenset(state), *host)
