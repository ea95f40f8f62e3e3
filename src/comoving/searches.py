"""Searches that were begun ahead of the step that uses them: where they are made, and where what they find waits.

A search of :class:`comoving.finders.Delayed` may take as long as the steps until its frame is used. On the CPU it is
made at once, and what it finds is in the state with the step that began it. On a CUDA device it is queued on a side
stream, behind what its gradient takes, and nothing waits for it: what it will have found is held here, beside the
states, until a step uses it or somebody asks for the state (:meth:`Searches.settle`). The current stream waits then,
and the host does not.

It reads copies of its own, made on the current stream: the gradient may be zeroed, and the state written to, while it
goes on. Where processes have a gradient together it sums over them, and is made at once on the current stream: sums of
two streams could pass one another on their way.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .batches import Row, Together, copy_into
from .cell import Cell, Search
from .finders import Memory, Operand
from .finders.delayed import DUE
from .frames import ModeFrame
from .state import MEMORY


class Elsewhere(Protocol):
    """Makes searches while steps go on."""

    def __call__(self, work: Callable[[], Memory], reads: Sequence[Tensor], device: torch.device) -> Search:
        """Begin one.

        Args:
            work: the search; it returns what it leaves in the memory.
            reads: the tensors that it reads, which nobody else does.
            device: where they are.
        """
        ...


@dataclass
class _Queued:
    """What a side stream will have found."""

    memory: Memory
    done: Any

    def found(self) -> Memory:
        """It; what the current stream is given from now on comes after it."""
        tensors = [x for x in self.memory.values() if x.is_cuda]
        for device in {x.device for x in tensors}:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.done)
            for x in tensors:
                x.record_stream(stream)
        return self.memory


class SideStream:
    """Queues searches on one stream of each CUDA device, in the order in which they are begun."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, work: Callable[[], Memory], reads: Sequence[Tensor], device: torch.device) -> Search:
        """Queue one behind what the current stream has been given so far."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        for x in reads:  # their memory is given to nobody else before this stream is done with it
            x.record_stream(stream)
        with torch.cuda.stream(stream):
            found = work()
            return _Queued(found, stream.record_event())


@dataclass
class _Held:
    """What a row waits for.

    Args:
        search: its own, or that of its batch.
        place: which of the batch it is; None by itself.
        due: the step that uses it.
    """

    search: Search
    place: int | None
    due: int


class Searches:
    """What rows wait for, and who makes it.

    Args:
        shown: whether a row's state shows its part of a batch's tensors, which are written to.
    """

    elsewhere: Elsewhere | None = None
    """In place of what the device suggests."""

    def __init__(self, shown: Callable[[Row], bool]) -> None:
        self._shown = shown
        self._held: dict[Row, _Held] = {}
        self._side = SideStream()

    def on(self, device: torch.device) -> Elsewhere | None:
        """Who makes searches for this device while steps go on; None where they are made at once."""
        if self.elsewhere is not None:
            return self.elsewhere
        return self._side if device.type == "cuda" else None

    def hold(self, which: Together, cell: Cell) -> None:
        """Hold what a cell, which is committed now, has begun; what its rows were waiting for is dropped."""
        if cell.search is None:
            return
        due = cell.finder[DUE].view(-1).tolist()
        for i, row in enumerate(which.rows):
            self._held[row] = _Held(cell.search, i if which.stacked else None, due[i])

    def settle(self, rows: Iterable[Row] | None = None, due: Callable[[Row], bool] | None = None) -> None:
        """Put what was found into states.

        Args:
            rows: of these rows; None for all.
            due: of these whether a refresh is, where only what the next step uses is asked for.
        """
        if not self._held:
            return
        targets, values, found = list[Tensor](), list[Tensor](), dict[int, Memory]()
        for row in list(self._held if rows is None else rows):
            held = self._held.get(row)
            if held is None or (due is not None and row.state["tick"] < held.due and not due(row)):
                continue
            del self._held[row]
            if row.p not in row.owner.state:
                continue
            if id(held.search) not in found:  # rows of a batch have one
                found[id(held.search)] = held.search.found()
            self._put(row, held.place, found[id(held.search)], targets, values)
        if targets:
            copy_into(targets, values)

    def _put(self, row: Row, place: int | None, found: Memory, targets: list[Tensor], values: list[Tensor]) -> None:
        """Put a row's part of what was found into its state, or among what is written into a batch's tensors."""
        state: Any = row.state
        for name, x in found.items():
            old: Tensor | None = state.get(MEMORY + name)
            one = x if place is None or x.ndim == 0 else x[place]  # rows share single numbers
            if old is None or old.shape != one.shape:
                continue
            if self._shown(row):
                targets.append(old)
                values.append(one)
            else:
                state[MEMORY + name] = one.to(old.device).clone(memory_format=torch.contiguous_format)


def apart(operand: Operand, start: ModeFrame) -> tuple[Operand, ModeFrame, list[Tensor]]:
    """An operand, and the frame to start from, in copies, what was one tensor staying one; and all of the copies."""
    known = dict[int, Tensor]()

    def own(x: Tensor) -> Tensor:
        if id(x) not in known:
            known[id(x)] = x.clone()
        return known[id(x)]

    def framed(frame: Any) -> ModeFrame:
        return ModeFrame(tuple(None if u is None else own(u) for u in frame.factors))

    copied = replace(
        operand,
        dense=own(operand.dense),
        frame=None if operand.frame is None else framed(operand.frame),
        core=None if operand.core is None else own(operand.core),
        inside=None if operand.inside is None else own(operand.inside),
        past=None if operand.past is None else (framed(operand.past[0]), own(operand.past[1])),
    )
    return copied, framed(start), [*known.values()]
