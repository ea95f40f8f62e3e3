"""Which rows are stepped together: those of one kind of which the host knows the same."""

from collections.abc import Collection, Iterable, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from . import state as slots
from .batches import Alone, Batch, Gathered, Owner, Row, Together
from .cadence import When
from .finders.delayed import foreseen
from .kind import Kind


class Sorting:
    """Sorts rows into batches, and keeps those that last.

    Args:
        owner: the optimizer whose rows they are.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self._batch_of: dict[Row, Batch] = {}
        self._missed: dict[Tensor, int] = {}

    @property
    def batches(self) -> list[Batch]:
        """Those that last, each once."""
        return [*dict.fromkeys(self._batch_of.values())]

    def stacked(self) -> set[Tensor]:
        """The parameters that are in a batch that lasts, or of which blocks are."""
        return {row.p for row in self._batch_of}

    def shows(self, row: Row) -> bool:
        """Whether the state of a row shows its part of a batch's tensors."""
        return row in self._batch_of

    def forget(self, present: Collection[Tensor]) -> None:
        """What rows have in common has changed; these parameters are still there."""
        for batch in self.batches:  # one after the other, so that no more than one is there twice
            self._end(batch)
        self._missed = {p: mark for p, mark in self._missed.items() if p in present}

    def sort(self, rows: Iterable[Row], entries: int, in_place: bool) -> list[Together]:
        """Which rows are stepped together, and which alone.

        Args:
            rows: those that are about to be stepped.
            entries: up to how many a row may have that is stepped together with others.
            in_place: whether rows by themselves shall be written to in place, if their kind replays.
        """
        alike: dict[Kind, list[Row]] = {}
        alone: list[Row] = []
        for row in rows:
            if row.kind.stacks and row.kind.entries <= entries:
                alike.setdefault(row.kind, []).append(row)
            else:
                alone.append(row)
        found: list[Together] = []
        for kind, mates in alike.items():
            batch = self._batch_of.get(mates[0])
            if batch is not None and self._is(batch, mates) and not kind.alone:
                found.append(batch)
            else:
                alone += self._of_a_kind(kind, mates, found)
        standing: dict[Batch, bool] = {}
        for row in alone:
            batch = self._batch_of.get(row)
            if batch is not None and batch not in standing:
                standing[batch] = batch.stands()
                if not standing[batch]:
                    self._end(batch)
            stands = batch is not None and standing[batch]
            found.append(Alone(row, shown=stands or (in_place and row.kind.replays)))
        return found

    def idle(self, params: Iterable[Tensor], number: int) -> None:
        """Note that parameters whose step counts the device alone knows had no gradient at the step of this number.

        Whether that was skipped the host is not told: only those that missed the same steps have equal counts for sure.
        """
        for p in params:
            self._missed[p] = hash((self._missed.get(p, 0), number))

    def recount(self) -> None:
        """Read the step counts from the device, once, where a state was loaded."""
        for p, state in self.owner.state.items():
            count = state.get("step")
            if count is not None and count.device.type != "cpu":
                self._missed[p] = int(count)

    def _of_a_kind(self, kind: Kind, mates: Sequence[Row], found: list[Together]) -> list[Row]:
        """Add what is stepped together to what was found; returns the rows that are stepped alone."""
        every = self.owner.param_groups[kind.number]["refresh_every"]
        sorts: dict[Any, list[Row]] = {}
        for row in mates:
            sorts.setdefault(kind.now(row.state, self._missed.get(row.p, 0)), []).append(row)
        alone = sorts.pop(None, [])
        for few in (rows[i : i + kind.most] for rows in sorts.values() for i in range(0, len(rows), kind.most)):
            due = {row: None for row in few if kind.alone and (scheduled(row, every) or _begins(row, every))}
            rest = [row for row in few if row not in due] if due else few
            alone += due
            if len(rest) == 1:
                alone += rest
            elif rest:
                batch = self._joined(kind, few)
                whole = len(rest) == len(batch.rows) and all(map(is_, rest, batch.rows))
                found.append(batch if whole else Gathered(kind, rest))
        return alone

    def _is(self, batch: Batch, rows: Sequence[Row]) -> bool:
        if self._missed and len({self._missed.get(row.p, 0) for row in rows}) > 1:
            return False
        return len(batch.rows) == len(rows) and all(map(is_, batch.rows, rows)) and batch.stands()

    def _joined(self, kind: Kind, rows: Sequence[Row]) -> Batch:
        """The batch that all of these rows are in: their own, or one that is made of them."""
        owners = dict.fromkeys(self._batch_of.get(row) for row in rows)
        only = next(iter(owners))
        if len(owners) == 1 and only is not None and only.stands():
            return only
        for batch in owners:
            if batch is not None:
                self._end(batch)
        batch = Batch(kind, rows)
        self._batch_of.update(dict.fromkeys(rows, batch))
        return batch

    def _end(self, batch: Batch) -> None:
        batch.dissolve()
        for row in batch.rows:
            if self._batch_of.get(row) is batch:
                del self._batch_of[row]


def _begins(row: Row, every: int) -> bool:
    """Whether the search for a later refresh begins at the next step of a row, which has none of its own."""
    parts, state = row.kind.parts, row.state
    if not parts.finder.ahead:
        return False
    own = {name: state[slots.CADENCE + name] for name in parts.cadence.schema()}
    return foreseen(parts.finder, parts.cadence, own, When(state["tick"], every, row.site.phase))


def scheduled(row: Row, every: int) -> bool:
    """Whether a refresh is scheduled for the next step of a row."""
    state, cadence = row.state, row.kind.parts.cadence
    own = {name: state[slots.CADENCE + name] for name in cadence.schema()}  # faster than a search for them
    return state["tick"] <= 0 or cadence.due(own, When(state["tick"], every, row.site.phase))
