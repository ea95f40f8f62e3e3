"""Batches: units of one kind stacked, so that a step of all of them is as many operations as a step of one.

Units are of one *kind* when they share everything that was decided about them but their names and places: group, view,
ranks, codecs, phase. They are stacked where every part is ``batched``, none has more entries than the optimizer's
``stacked_entries``, and the host knows the same of all: the number of finished steps, and the integers of finder and
cadence. A frame that is still to be found for the first time is found alone. So is every other one where a part is
``alone``: then phases may differ, and those that are not due are stacked.

A batch holds its tensors stacked; the state of each unit holds its row of them, as a view. While nobody replaces one
of these views, nothing has to be stacked again.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import bases
from . import state as slots
from .schedule import SMALL, at_once
from .sites import Site
from .steps import Unit

_TOGETHER = 2**22
"""Entries of a batch at most: what is stacked is there twice while it is stepped."""
_ROLES = ("rule", "precondition", "moments", "residual")
_OF_FRAMES = ("frame", "finder", "cadence", "transport", "codec", "bases")


@dataclass(frozen=True)
class Kind:
    """What alike units share.

    Args:
        group: the number of their parameter group.
        site: what was decided about them, without name and place.
        shared: the slots that hold the same for all, and are not stacked.
        host: those of them that the host reads: units in which these differ are stepped apart.
        frame: name and shape of each tensor of a frame of these ranks.
        said: name and value of each rank that a frame stores.
        alone: whether frames are refreshed one by one; the site's phase is then that of none.
    """

    group: int
    site: Site
    shared: frozenset[str]
    host: tuple[str, ...]
    frame: tuple[tuple[str, tuple[int, ...]], ...]
    said: tuple[tuple[str, int], ...]
    alone: bool

    @cached_property
    def entries(self) -> int:
        """How many entries a unit has."""
        return prod(self.site.view.shape)

    @property
    def most(self) -> int:
        """How many units a batch has at most."""
        return max(1, _TOGETHER // max(1, self.entries))

    def now(self, unit: Unit) -> Hashable:
        """What the host knows of a unit; None where it has to be stepped alone at this step."""
        state = unit.state
        tick, t = state["tick"], state["step"]
        if self.site.projected and (
            tick <= 0
            or any(name not in state or state[name].shape != shape for name, shape in self.frame)
            or any(int(state[name]) != rank for name, rank in self.said)
            or (self.alone and unit.scheduled())
        ):
            return None
        count = float(t.numpy()) if t.device.type == "cpu" else None  # else the device's own, which agrees
        return (tick, count, state.get(slots.WINDOW), frozenset(state), *(int(state[name]) for name in self.host))


def kind_of(site: Site, group: Mapping[str, Any], number: int) -> Kind | None:
    """The kind of a unit; None where it can only be stepped alone.

    Args:
        site: of the unit.
        group: its hyper-parameters as they hold for it; see :func:`comoving.state.parts_of`.
        number: that of its group.
    """
    if site.plain or site.blocks or site.coded or 0 in site.view.shape:
        return None
    roles = (*_ROLES, *_OF_FRAMES) if site.projected else _ROLES
    if (site.projected and group["ranks"].adaptive) or not all(group[role].batched for role in roles):
        return None
    single = {
        name: part for name, part in slots.layout(site, group).items() if not part.shape and part.dtype == torch.int64
    }
    shared = tuple(name for name, part in single.items() if not (part.seed or part.own))
    said = tuple((name, rank) for name, rank in _said(site) if name in shared)
    alone = any(getattr(group[role], "alone", False) for role in roles)
    phase = 0 if alone else site.phase % group["refresh_every"]
    alike = replace(site, name="", reason="", index=0, phase=phase, base=())
    frame = bases.parts(group, site.view.shape, site.ranks, site.view.dtype) if site.projected else {}
    shapes = tuple((name, part.shape) for name, part in frame.items())
    host = tuple(name for name in shared if name not in dict(said))
    return Kind(number, alike, frozenset({"tick", "step", *shared}), host, shapes, said, alone)


def _said(site: Site) -> list[tuple[str, int]]:
    """The name under which each rank is stored by frames that store it, and the rank."""
    return [(bases.RANK.format(n), r) for n, r in enumerate(site.ranks) if r is not None]


def pieces(sites: Sequence[Site], group: Mapping[str, Any], number: int) -> list[list[int]]:
    """Which parameters of a group, by their places, refresh at the same step: small alike ones, some at a time.

    Those whose frames are refreshed alone do so at a step of their own.

    Args:
        sites: of all of them, still without phases.
        group: its hyper-parameters.
        number: that of the group.
    """
    alike: dict[Hashable, list[int]] = {}
    for place, site in enumerate(sites):
        kind = kind_of(site, slots.parts_of(site, group), number)
        small = kind is not None and kind.entries <= SMALL and not kind.alone
        alike.setdefault(kind if small else place, []).append(place)
    cut: list[list[int]] = []
    for places in alike.values():
        count = at_once(prod(sites[places[0]].view.shape))
        cut += [places[i : i + count] for i in range(0, len(places), count)]
    return cut


class Batch:
    """Units of one kind, and the stacked unit that stands for them.

    Args:
        kind: of all of them.
        units: as they are.
        last: the batch that the same units formed before, whose stacked tensors are taken over where they are in use.
    """

    unit: Unit
    """With a row for each of the others; its state is a dict of its own."""

    def __init__(self, kind: Kind, units: Sequence[Unit], last: "Batch | None" = None) -> None:
        self.kind, self.units = kind, units
        self._stacked = dict[str, Any]()
        self._views = dict[str, Sequence[Any]]()
        first = units[0]
        for name, value in first.state.items():
            rows = [unit.state[name] for unit in units]
            if name in kind.shared or not isinstance(value, Tensor):
                self._stacked[name] = value
                self._views[name] = self._unbound(name, value) if last is None else rows
            elif last is not None and last.holds(name, rows):
                self._stacked[name], self._views[name] = last._stacked[name], last._views[name]
            else:
                self._stacked[name] = torch.stack(rows)
                self._views[name] = self._stacked[name].unbind()
        self.unit = Unit(first.site, first.group, dict(self._stacked), 1)

    def holds(self, name: str, rows: Sequence[Any]) -> bool:
        """Whether these are the rows of what is stacked under a name."""
        own = self._views.get(name, ())
        return len(own) == len(rows) and all(map(is_, own, rows))

    def rows(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row of a stacked state that each unit shall have; the stacked unit is empty then."""
        held, self._stacked = self._stacked, {name: _laid_out(value) for name, value in state.items()}
        for name, value in self._stacked.items():
            if name not in held or value is not held[name]:
                self._views[name] = self._unbound(name, value)
        for name in self._views.keys() - state.keys():
            del self._views[name]
        self.unit.state.clear()  # what a step has replaced must not live until the next one
        return [dict(zip(self._views, row, strict=True)) for row in zip(*self._views.values(), strict=True)]

    def commit(self) -> None:
        """Bring the states of all units up to date with the stacked one."""
        for unit, row in zip(self.units, self.rows(self.unit.state), strict=True):
            slots.commit(unit.state, row)

    def release(self, place: int) -> None:
        """Give a unit that leaves tensors of its own, so that it keeps none of the others' alive."""
        state = self.units[place].state
        for name, own in self._views.items():
            if isinstance(own[place], Tensor) and state.get(name) is own[place]:
                state[name] = own[place].clone()

    def _unbound(self, name: str, value: Any) -> Sequence[Any]:
        if not isinstance(value, Tensor):
            return [value] * len(self.units)
        return (value.expand(len(self.units)).clone() if name in self.kind.shared else value).unbind()


class Batches:
    """The batches that there are, each unit in one at most."""

    def __init__(self) -> None:
        self._of: dict[int, Batch] = {}

    def form(self, kind: Kind, units: Sequence[Unit]) -> Batch:
        """The batch of these units, which leave those that they were in."""
        last = self._of.get(id(units[0].state))
        if last is None or len(last.units) != len(units) or not all(map(_same, last.units, units)):
            last = None
            self._end(units, {id(unit.state) for unit in units})
        batch = Batch(kind, units, last)
        self._of.update((id(unit.state), batch) for unit in units)
        return batch

    def __iter__(self) -> Iterator[Batch]:
        """Each once."""
        return iter({id(batch): batch for batch in self._of.values()}.values())

    def part(self, units: Iterable[Unit]) -> None:
        """End the batches of units that are stepped alone: what is replaced then would live on in their mates'."""
        self._end(units, frozenset())

    def _end(self, units: Iterable[Unit], staying: Set[int]) -> None:
        for batch in {id(own): own for unit in units if (own := self._of.get(id(unit.state))) is not None}.values():
            for place, unit in enumerate(batch.units):
                del self._of[id(unit.state)]
                if id(unit.state) not in staying:
                    batch.release(place)


def _laid_out(value: Any) -> Any:
    """As it would be laid out when it is stacked anew: products go by the layout, in their last digits."""
    return value.contiguous() if isinstance(value, Tensor) else value


def _same(a: Unit, b: Unit) -> bool:
    return a.state is b.state


def copy_into(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write each value into its target; on most devices as one operation."""
    torch._foreach_copy_(list(targets), list(values))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def sorted_out(units: Iterable[tuple[Kind | None, Unit]]) -> tuple[list[tuple[Kind, list[int]]], list[int]]:
    """Which units, by their places in the given order, are stepped together, and which alone; equal kinds are one."""
    alike: dict[int, tuple[Kind, list[tuple[int, Unit]]]] = {}
    alone: list[int] = []
    for place, (kind, unit) in enumerate(units):
        if kind is None:
            alone.append(place)
        else:
            alike.setdefault(id(kind), (kind, []))[1].append((place, unit))
    cut: list[tuple[Kind, list[int]]] = []
    for kind, mates in alike.values():
        together: dict[Hashable, list[int]] = {}
        for place, unit in mates:
            now = kind.now(unit) if len(mates) > 1 else None  # nothing is asked of one that has no mates
            together.setdefault(now, []).append(place)
        alone += together.pop(None, [])
        for places in together.values():
            few = [places[i : i + kind.most] for i in range(0, len(places), kind.most)]
            cut += [(kind, piece) for piece in few if len(piece) > 1]
            alone += [piece[0] for piece in few if len(piece) == 1]
    return cut, sorted(alone)
