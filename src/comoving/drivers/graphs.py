"""Steps between refreshes as CUDA graphs: one launch for a batch, whatever its parts do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..batches import Alone, Batch, Row, Together, copy_into
from ..engine import Engine
from ..state import CORE, layout

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs some work once, only noting the operations, and returns what performs them, every time on the same tensors."""


@dataclass(frozen=True)
class _Recording:
    """A step of some rows, recorded.

    Args:
        which: the batch; None of a row by itself.
        fixed: what may not have changed: addresses of weights and gradients, and rates that are numbers.
        tensors: of the row's state.
        inputs: where gradients are copied to; none where they are read from where they lie.
        replay: performs it.
    """

    which: Batch | None
    fixed: tuple[Any, ...]
    tensors: tuple[Any, ...]
    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]


class Graphs:
    """Records a step of each batch, and replays it at every step that brings no refresh.

    What a recording reads and writes must stay where it is: weights, state, and the gradient of a large parameter.
    Gradients of a batch are copied to a place of their own. The learning rate is read from the device; other rates
    are numbers in the recording, and a change of them, or of an address, makes a new one. Steps with a refresh,
    and of kinds that do not replay (:attr:`comoving.kind.Kind.replays`), are made as ever; with ``on_nonfinite="skip"``
    so are those of large parameters.

    Args:
        engine: whose steps are recorded.
        record: how.
    """

    def __init__(self, engine: Engine, record: Record) -> None:
        self.engine, self._record = engine, record
        self._recordings: dict[tuple[Row, ...], _Recording] = {}
        self._rates: dict[tuple[int, torch.device], Tensor] = {}
        engine.counts_on_device = True
        for p in engine.owner.state:
            for row in engine.rows_of(p) if not engine.roster.sites[p].plain else ():
                _move_counts(row)
        engine.forget()

    def forget(self) -> None:
        """Whatever was recorded may lie elsewhere now."""
        self._recordings.clear()

    def step(self, which: Together, gradient: Callable[[Tensor], Tensor]) -> bool:
        """Step these rows by a recording; False where they have to be stepped as ever.

        Args:
            which: the rows.
            gradient: of a parameter.
        """
        if not self._serves(which):
            return False
        given = [gradient(row.p) for row in which.rows]
        if not which.stacked and given[0] is not which.rows[0].p.grad:
            return False  # with on_nonfinite="skip" it is another tensor at every step
        fixed = (*self._numbers(which.rows[0]), *_addresses(which, given))
        known = self._recordings.get(which.rows)
        if known is not None and known.fixed == fixed and _stays(known, which):
            rate = self._rate(which.rows[0])
            rate.fill_(self._group(which.rows[0])["lr"])
            if known.inputs:
                copy_into(known.inputs, given)
            which.count()
            known.replay()
            return True
        self._recordings[which.rows] = self._recorded(which, given, fixed)
        self._recordings[which.rows].replay()
        return True

    def _recorded(self, which: Together, given: Sequence[Tensor], fixed: tuple[Any, ...]) -> _Recording:
        row, inputs = which.rows[0], tuple[Tensor, ...]()
        if which.stacked:
            inputs = torch.stack(list(given)).unbind()
        rate = self._rate(row)
        rate.fill_(self._group(row)["lr"])
        replay = self._record(lambda: self.engine.advance(which, inputs or given, None, rate))
        batch = which if isinstance(which, Batch) else None
        return _Recording(batch, fixed, () if which.stacked else _tensors(row), inputs, replay)

    def _serves(self, which: Together) -> bool:
        row = which.rows[0]
        if not (isinstance(which, Batch | Alone) and row.kind.replays and row.block is None):
            return False
        state = row.state
        if CORE in state or state["tick"] <= 0 or state["step"].device != row.p.device:
            return False
        return not row.site.projected or not self.engine.due(row)

    def _group(self, row: Row) -> dict[str, Any]:
        return self.engine.owner.param_groups[row.kind.number]

    def _numbers(self, row: Row) -> tuple[Any, ...]:
        group = self._group(row)
        return tuple(group[name] for name in ("betas", "eps", "weight_decay", "scale", "maximize"))

    def _rate(self, row: Row) -> Tensor:
        """The learning rate of a row's group, on its device."""
        key = row.kind.number, row.p.device
        if key not in self._rates:
            self._rates[key] = torch.zeros((), dtype=torch.float64, device=row.p.device)
        return self._rates[key]


def cuda_recorder() -> Record:
    """Records CUDA graphs, which share the memory of what they make in between."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        return graph.replay

    return record


def _addresses(which: Together, given: Sequence[Tensor]) -> tuple[Any, ...]:
    weights = [row.p.data_ptr() for row in which.rows]
    return (*weights,) if which.stacked else (*weights, given[0].data_ptr(), given[0].stride())


def _stays(known: _Recording, which: Together) -> bool:
    """Whether the state is where it was; a batch that stands says so itself."""
    if known.which is not None:
        return known.which is which
    now = _tensors(which.rows[0])
    return len(now) == len(known.tensors) and all(map(is_, now, known.tensors))


def _tensors(row: Row) -> tuple[Any, ...]:
    return tuple(x for x in row.state.values() if isinstance(x, Tensor))


def _move_counts(row: Row) -> None:
    """Put what is beside the step count on the parameter's device."""
    for name, part in layout(row.site, row.kind.group).items():
        if part.scalar and part.dtype.is_floating_point and name in row.state:
            row.state[name] = row.state[name].to(row.p.device)
