"""Parameters that processes share and one of them steps for all."""

from collections.abc import Callable, Sequence
from contextlib import closing

from torch import Tensor

from ..engine import Engine
from . import gradients
from .dense import step_dense
from .guard import Guard


def step_dealt(engine: Engine, guard: Guard, params: Sequence[Tensor], gradient: Callable[[Tensor], Tensor]) -> None:
    """Step them: what is here of them goes to those who step them, and the new weights come back.

    Args:
        engine: of their optimizer.
        guard: undoes what a bad gradient does.
        params: the parameters, the same ones in all processes.
        gradient: what is here of a parameter's gradient.
    """
    from ..distributed.dealing import deal  # noqa: PLC0415  (torch's DTensor takes its time)

    blocked = engine.roster.blocked
    with closing(deal(params, engine.roster, gradient, engine.lent)) as rounds:
        for given in rounds:
            norms = gradients.norms(given)
            rows = [engine.row(p) for p in given if p not in blocked]
            for which in engine.sorted_out(row for row in rows if not row.kind.site.plain):
                with guard.undo(which):
                    engine.step(which, given.__getitem__, norms)
            for p in (p for p in given if p in blocked):
                with guard.undo_whole([p]):
                    engine.step_blocks(p, given[p], set())
            for row in (row for row in rows if row.kind.site.plain):
                with guard.undo_whole([row.p]):
                    step_dense([engine.numbers(row.p)], [given[row.p]], [row.state], engine.roster.group_of(row.p))
