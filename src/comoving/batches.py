"""Batches: rows of one kind stacked, so that a step of all of them is as many operations as a step of one.

Rows are of one *kind* when they share everything that was decided about them but their names and places: group, view,
ranks, codecs, phase. They are stacked where every part is ``batched``, none has more entries than the optimizer's
``stacked_entries``, and the host knows the same of all: the number of finished steps, and the integers of finder and
cadence. A frame that is still to be found for the first time is found alone. So is every other one where a part is
``alone``: then phases may differ, and those that are not due are stacked.

A batch that lasts holds its tensors stacked, and the state of each row shows its part of them, as views. A step writes
into what is stacked, so that the views stay what they are; while nobody else replaces one, nothing is stacked again.
Where some rows of a batch have no gradient, or are stepped alone, the others are gathered, and written back.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor

from . import state as slots
from .cell import Cell
from .kind import Kind
from .section import Section
from .sites import Site

State = MutableMapping[str, Any]


class Owner(Protocol):
    """What rows need of the optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any
    on_nonfinite: str


@dataclass(eq=False)
class Row:
    """What has a frame of its own: a parameter, or a block of one.

    Args:
        p: the parameter.
        block: the number of the block, as a string; None for a whole parameter.
        site: what was decided about it.
        kind: what it shares with others.
        owner: the optimizer, whose state of a parameter with blocks holds the slots of all of them.
    """

    p: Tensor
    block: str | None
    site: Site
    kind: Kind
    owner: Owner
    _section: Section | None = None

    @property
    def state(self) -> State:
        """Its tensors, by name."""
        whole: dict[str, Any] = self.owner.state[self.p]
        if self.block is None:
            return whole
        if self._section is None or self._section.whole is not whole:
            self._section = Section(whole, self.block)
        return self._section

    def look_again(self) -> None:
        """Slots of the block may have been added or taken away by others."""
        self._section = None

    @property
    def prefix(self) -> str:
        """How its slots' names begin in the state of the parameter."""
        return "" if self.block is None else f"{self.block}."

    def cell(self) -> Cell:
        """Its state, with the ranks that it asks for."""
        kind = self.kind.at(slots.current(self.site, self.kind.group, self.state))
        return Cell.of(kind, self.state, 0, self.site.name)


class Together(Protocol):
    """Rows that are stepped as one."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """In the order in which they are stacked."""
        ...

    @property
    def stacked(self) -> int:
        """How many leading dimensions of a cell count rows."""
        ...

    def cell(self) -> Cell:
        """Their state."""
        ...

    def commit(self, cell: Cell) -> None:
        """Bring their states up to date with a cell, all at once."""
        ...

    def count(self) -> None:
        """Note on the host that they have been stepped once more, by other means than :meth:`commit`."""
        ...

    def states(self) -> list[State]:
        """Where their tensors are, to be put back."""
        ...


class Alone:
    """A row by itself. Its tensors are replaced, or written to where they are those of a batch."""

    stacked = 0

    def __init__(self, row: Row, shown: bool = False) -> None:
        self.rows, self._shown = (row,), shown

    def cell(self) -> Cell:
        """The row's."""
        return self.rows[0].cell()

    def commit(self, cell: Cell) -> None:
        """The row's state, as it is in the cell."""
        state, new = self.rows[0].state, cell.flat()
        if self._shown:
            own = _apart(new, state)
            new = {name: _into(state.get(name), x) for name, x in own.items()}
        slots.commit(state, new)

    def count(self) -> None:
        """One more tick."""
        self.rows[0].state["tick"] += 1

    def states(self) -> list[State]:
        """The row's."""
        return [self.rows[0].state]


def apart(which: Together, cell: Cell) -> list[tuple[Alone, Cell]]:
    """The rows of a cell that is not committed yet, each by itself with its part of it."""
    if not which.stacked:
        return [(Alone(which.rows[0], shown=True), cell)]
    kind, count, parts = which.rows[0].kind, len(which.rows), dict[str, Sequence[Any]]()
    for name, x in cell.flat().items():
        shared = isinstance(x, Tensor) and (name in kind.shared or name == "step")
        # What is the same for all is the first row's, which its commit writes to.
        parts[name] = [x.clone() for _ in range(count)] if shared else _rows_of(x, count, False)
    return [
        (Alone(row, shown=True), Cell.of(kind, {name: listed[i] for name, listed in parts.items()}, 0, row.site.name))
        for i, row in enumerate(which.rows)
    ]


class Gathered:
    """Some rows, copied together for one step."""

    stacked = 1

    def __init__(self, kind: Kind, rows: Sequence[Row]) -> None:
        self.kind, self.rows = kind, tuple(rows)

    def cell(self) -> Cell:
        """Their states stacked, but for what is the same for all."""
        states, own = [row.state for row in self.rows], dict[str, Any]()
        for name, x in states[0].items():
            alone = not isinstance(x, Tensor) or name in self.kind.shared or name == "step"
            own[name] = x if alone else torch.stack([state[name] for state in states])
        return Cell.of(self.kind, own, 1, _names(self.rows))

    def commit(self, cell: Cell) -> None:
        """Each row's part of the cell, into its own tensors."""
        new, targets, values = cell.flat(), list[Tensor](), list[Tensor]()
        parts = {
            name: _rows_of(x, len(self.rows), name in self.kind.shared or name == "step") for name, x in new.items()
        }
        for i, row in enumerate(self.rows):
            fresh = dict[str, Any]()
            for name, listed in parts.items():
                old, x = row.state.get(name), listed[i]
                if _has_room(old, x):
                    targets.append(old)
                    values.append(x)
                else:  # one that holds on to no mate
                    fresh[name] = x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x
            for name in [name for name in row.state if name not in new]:
                del row.state[name]
            row.state.update(fresh)
        if targets:
            copy_into(targets, values)

    def count(self) -> None:
        """One more tick of each."""
        for row in self.rows:
            row.state["tick"] += 1

    def states(self) -> list[State]:
        """Each row's."""
        return [row.state for row in self.rows]


class Batch:
    """Rows whose tensors are stacked for good.

    Args:
        kind: of all of them.
        rows: in the order in which they are stacked.
    """

    stacked = 1

    def __init__(self, kind: Kind, rows: Sequence[Row]) -> None:
        self.kind, self.rows = kind, tuple(rows)
        self._tensors = dict[str, Any]()
        for name, x in self.rows[0].state.items():
            self._tensors[name] = torch.stack([row.state[name] for row in self.rows]) if isinstance(x, Tensor) else x
        self._show(self._tensors)

    def stands(self) -> bool:
        """Whether the states of all rows still are views of what is stacked, and agree where they have to.

        That another tensor's memory was put into a view (``x.data = ...``), as by tools that move whole states, is told
        by one slot of each row.
        """
        states: Mapping[Tensor, dict[str, Any]] = self.rows[0].owner.state
        try:
            tick = states.get(self.rows[0].p, {})[self._shown[0][2]]
            for row, (shown, views, ticks, core), place in zip(self.rows, self._shown, self._places, strict=True):
                whole = states.get(row.p, {})
                if whole[ticks] != tick or core in whole or not all(map(is_, shown(whole), views)):
                    return False
                if views[-1].data_ptr() != place:
                    return False
        except KeyError:
            return False
        counts = (x.numpy() for name in self._alike() if (x := self._tensors[name]).device.type == "cpu")
        return all(bool((own == own[0]).all()) for own in counts)

    def cell(self) -> Cell:
        """What is stacked; of what is the same for all, the first row's."""
        own = self._tensors | {"tick": self.rows[0].state["tick"]}  # rows may have been stepped one by one
        for name in self._alike():
            own[name] = own[name][0]
        return Cell.of(self.kind, own, 1, _names(self.rows))

    def commit(self, cell: Cell) -> None:
        """Write the cell into what is stacked; slots that are new, or of another shape, are shown anew."""
        new, alike, count = _apart(cell.flat(), self._tensors), self._alike(), len(self.rows)
        self._tick(new.pop("tick"))
        fresh, targets, values = dict[str, Any](), list[Tensor](), list[Tensor]()
        for name, own in new.items():
            old, x = self._tensors.get(name), own.expand(count, *own.shape) if name in alike else own
            if not _has_room(old, x):
                fresh[name] = x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x
            elif old is not x:
                targets.append(old)
                values.append(x)
        if targets:
            copy_into(targets, values)
        gone = [name for name in self._tensors if name not in new and name != "tick"]
        for name in gone:
            del self._tensors[name]
            for row in self.rows:
                del row.state[name]
        self._tensors.update(fresh)
        if fresh or gone:
            self._show(fresh)

    def count(self) -> None:
        """One more tick of all."""
        self._tick(self.rows[0].state["tick"] + 1)

    def states(self) -> list[State]:
        """What is stacked."""
        return [self._tensors]

    def dissolve(self) -> None:
        """Give each row that still shows its part of a tensor one of its own, so that none keeps the others' alive."""
        names = [name for name, x in self._tensors.items() if isinstance(x, Tensor)]
        for row, (_, views, _, _) in zip(self.rows, self._shown, strict=True):
            if row.p not in row.owner.state:
                continue
            state = row.state
            for name, view in zip(names, views[1:], strict=True):
                if state.get(name) is view:
                    state[name] = view.clone()

    def _tick(self, tick: int) -> None:
        self._tensors["tick"], states = tick, self.rows[0].owner.state
        for row, (_, _, ticks, _) in zip(self.rows, self._shown, strict=True):
            states[row.p][ticks] = tick

    def _alike(self) -> set[str]:
        return {name for name in self._tensors if name in self.kind.shared or name == "step"}

    def _show(self, names: Iterable[str]) -> None:
        """Put each row's part of these slots into its state."""
        listed = {name: _rows_of(self._tensors[name], len(self.rows), False) for name in names}
        if listed:
            for row, own in zip(self.rows, zip(*listed.values(), strict=True), strict=True):
                row.state.update(zip(listed, own, strict=True))
        names = [name for name, x in self._tensors.items() if isinstance(x, Tensor)]
        self._shown: list[tuple[itemgetter[Any], tuple[Any, ...], str, str]] = []
        for row in self.rows:
            known = (row.prefix + name for name in ("step", *names))  # two at least: of one no tuple would be shown
            shown = cast("itemgetter[Any]", itemgetter(*known))
            self._shown.append((shown, shown(row.owner.state[row.p]), f"{row.prefix}tick", row.prefix + slots.CORE))
        self._places = [views[-1].data_ptr() for _, views, _, _ in self._shown]


def _names(rows: Sequence[Row]) -> str:
    """What rows are called in messages."""
    return ", ".join(row.site.name for row in rows[:3]) + (" ..." if len(rows) > 3 else "")


def _rows_of(x: Any, count: int, shared: bool) -> Sequence[Any]:
    """What each row has of a stacked value."""
    if not isinstance(x, Tensor):
        return [x] * count
    return (x.expand(count, *x.shape) if shared else x).unbind()


def _has_room(old: Any, x: Any) -> TypeGuard[Tensor]:
    """Whether one tensor can be written into another."""
    return (
        isinstance(old, Tensor)
        and isinstance(x, Tensor)
        and old.shape == x.shape
        and old.dtype == x.dtype
        and old.device == x.device
    )


def _apart(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """New values, copied where they lie in the memory of an old one that is about to be written to."""
    places = {_memory(x) for x in old.values() if isinstance(x, Tensor)}
    return {
        name: x.clone() if isinstance(x, Tensor) and x is not old.get(name) and _memory(x) in places else x
        for name, x in new.items()
    }


def _memory(x: Tensor) -> int:
    """What tells the memory of one tensor from that of another."""
    return x.untyped_storage()._cdata  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _into(old: Any, x: Any) -> Any:
    """The old tensor with the numbers of the new one where it has room for them, else the new one."""
    if not _has_room(old, x) or old is x:
        return x
    old.copy_(x)
    return old


def copy_into(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write each value into its target; on most devices as one operation."""
    torch._foreach_copy_(list(targets), list(values))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
