"""Steps between refreshes as CUDA graphs: one launch for a batch, whatever its parts do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, Protocol
from weakref import proxy

import torch
from torch import Tensor

from ..batches import Alone, Batch, Row, Together, copy_into
from ..engine import Engine
from ..state import CORE, layout

Replay = Callable[[], None]


class Recorder(Protocol):
    """Notes what some work does on a device, without doing it, and returns what does it, always on the same tensors."""

    device: str
    """The type of the devices whose work is noted; what is done elsewhere is done at once, and never again."""

    def __call__(self, work: Callable[[], None], device: torch.device) -> Replay:
        """Run the work, which is for this device; where it raises nothing has been done."""
        ...


@dataclass
class _Steps:
    """How some rows were stepped last.

    Args:
        fixed: what may not have changed since: addresses of weights and gradients, and rates that are numbers.
        tensors: of the state; that they are kept keeps their memory from others.
        inputs: where gradients are copied to; none where they are read from where they lie.
        replay: makes such a step, once it has been recorded.
    """

    fixed: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...] = ()
    replay: Replay | None = None


class Graphs:
    """Records a step of each batch, and replays it at every step that brings no refresh.

    What a recording reads and writes must stay where it is: weights, state, and the gradient of a large parameter.
    Gradients of a batch are copied to a place of their own. The learning rate is read from the device; other rates
    are numbers in the recording, and a change of them, or of an address, makes a new one. What is recorded has been
    stepped once before just so, but without a recording: libraries are loaded by then, tables are on the device and
    rules compiled; and where something changes at every step, nothing is recorded in vain.

    Steps with a refresh, and of kinds that do not replay (:attr:`comoving.kind.Kind.replays`), are made as ever; with
    ``on_nonfinite="skip"``, where gradients are new tensors at every step, so are those of large parameters.

    Args:
        engine: whose steps are recorded.
        record: how.
    """

    recorded: int = 0
    """How many recordings were made."""
    replayed: int = 0
    """How many steps, of batches and of rows by themselves, were made by a recording."""

    def __init__(self, engine: Engine, record: Recorder) -> None:
        self.engine: Engine = proxy(engine)  # a cycle would keep state alive until the collector comes
        self._record = record
        self._rates: dict[tuple[int, torch.device], tuple[Tensor, float]] = {}
        self.forget()
        engine.counts_on_device = True
        for p in engine.owner.state:
            for row in engine.rows_of(p) if not engine.roster.sites[p].plain else ():
                _move_counts(row)
        engine.forget()

    def forget(self) -> None:
        """Whatever was recorded may lie elsewhere now."""
        self._steps: dict[tuple[Row, ...], _Steps] = {}
        self._failed: set[tuple[Row, ...]] = set()

    def step(self, which: Together, gradient: Callable[[Tensor], Tensor]) -> bool:
        """Step these rows by a recording, or so that they can be recorded; False where they have to be stepped as ever.

        Args:
            which: the rows.
            gradient: of a parameter.
        """
        if not self._serves(which):
            return False
        given, rate = [gradient(row.p) for row in which.rows], self._rate(which.rows[0])
        fixed = (*self._numbers(which.rows[0]), *_addresses(which, given))
        known = self._steps.get(which.rows)
        if known is None or known.fixed != fixed or not _same(known.tensors, _tensors(which)):
            if known is None:  # others may have held some of these rows
                self._steps = {rows: own for rows, own in self._steps.items() if not {*which.rows} & {*rows}}
            self._steps.pop(which.rows, None)
            self.engine.advance(which, given, None, rate)
            self._steps[which.rows] = _Steps(fixed, _tensors(which))
            return True
        if known.replay is None:
            self._begin(known, which, given, rate)
        else:
            if known.inputs:
                copy_into(known.inputs, given)
            known.replay()
            which.count()
        self.replayed += 1
        return True

    def _begin(self, known: _Steps, which: Together, given: Sequence[Tensor], rate: Tensor) -> None:
        """Record a step, and make it; where that fails, states are as they were, and these rows are stepped as ever."""
        states = [*which.states(), *(row.state for row in which.rows)]
        before = [dict(state) for state in states]
        inputs = torch.stack(list(given)).unbind() if which.stacked else ()
        try:
            replay = self._record(
                lambda: self.engine.advance(which, inputs or given, None, rate), which.rows[0].p.device
            )
            if not _same(known.tensors, _tensors(which)):
                raise RuntimeError("a slot of the state was made anew in a recording, whose memory others share")
            self.recorded += 1
            replay()
        except BaseException as error:
            for state, old in zip(states, before, strict=True):
                state.clear()
                state.update(old)
            del self._steps[which.rows]
            if isinstance(error, Exception):
                self._failed.add(which.rows)
                names = ", ".join(row.site.name for row in which.rows[:5])
                error.add_note(f"{names}: the step could not be recorded, and is made without a CUDA graph from now on")
            raise
        known.inputs, known.replay = inputs, replay

    def _serves(self, which: Together) -> bool:
        row = which.rows[0]
        if not (isinstance(which, Batch | Alone) and row.kind.replays and row.block is None):
            return False
        if row.p.device.type != self._record.device or which.rows in self._failed:
            return False
        if not which.stacked and self.engine.owner.on_nonfinite == "skip":
            return False
        state = row.state
        if CORE in state or state["tick"] <= 0 or state["step"].device != row.p.device:
            return False
        return not row.site.projected or not self.engine.due(row)

    def _group(self, row: Row) -> dict[str, Any]:
        return self.engine.owner.param_groups[row.kind.number]

    def _numbers(self, row: Row) -> tuple[Any, ...]:
        """What is no tensor in a step."""
        group = self._group(row)
        return (
            *(group[name] for name in ("rate", "betas", "eps", "weight_decay", "decay", "scale", "maximize")),
            self.engine.turn,
        )

    def _rate(self, row: Row) -> Tensor:
        """The learning rate of a row's group, on its device."""
        key, lr = (row.kind.number, row.p.device), float(self._group(row)["lr"])
        if key not in self._rates:
            self._rates[key] = torch.full((), lr, dtype=torch.float64, device=row.p.device), lr
        rate, before = self._rates[key]
        if lr != before:
            self._rates[key] = rate.fill_(lr), lr
        return rate


class CudaRecorder:
    """Records CUDA graphs, which share the memory of what they make in between, on a stream of their own.

    Calls of other threads meanwhile, of loaders that pin memory, say, are let be. A capture that fails leaves the
    stream, and torch's own list of pools, as they are in the middle of it: the first is put back, and the second makes
    the pool useless, so that the next recording gets another.
    """

    device: str = "cuda"

    def __init__(self) -> None:
        self._places: dict[torch.device, tuple[Any, torch.cuda.Stream]] = {}

    def __call__(self, work: Callable[[], None], device: torch.device) -> Replay:
        """Run the work as a capture."""
        with torch.cuda.device(device):
            if device not in self._places:
                self._places[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            (pool, stream), before = self._places[device], torch.cuda.current_stream()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    work()
            except BaseException:
                torch.cuda.set_stream(before)
                del self._places[device]
                raise
        return graph.replay


def _addresses(which: Together, given: Sequence[Tensor]) -> tuple[Any, ...]:
    """Where weights are, and what can be told of gradients without their numbers; where they are, if they are read."""
    weights = [x for row in which.rows for x in (row.p.data_ptr(), row.p.stride())]
    if which.stacked:
        return *weights, *(g.dtype for g in given)
    g = given[0]
    return *weights, g.dtype, g.data_ptr(), g.stride(), g.is_conj(), g.is_neg()


def _same(known: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(known) == len(now) and all(map(is_, known, now))


def _tensors(which: Together) -> tuple[Tensor, ...]:
    return tuple(x for state in which.states() for x in state.values() if isinstance(x, Tensor))


def _move_counts(row: Row) -> None:
    """Put what is beside the step count on the parameter's device."""
    for name, part in layout(row.site, row.kind.group).items():
        if part.scalar and part.dtype.is_floating_point and name in row.state:
            row.state[name] = row.state[name].to(row.p.device)
