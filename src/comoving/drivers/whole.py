"""The usual driver: a step of all parameters, by the gradients that they have."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..batches import Owner
from ..engine import Engine
from ..state import WINDOW
from .dealt import step_dealt
from .dense import step_dense
from .guard import Guard
from .resume import WHOLE, Resume

_OF_BLOCK = f".{WINDOW}"


class Whole:
    """Steps every parameter that has a gradient, or has absorbed some.

    Args:
        engine: steps those that torch's AdamW does not serve.
        guard: looks at their gradients first.
    """

    def __init__(self, engine: Engine, guard: Guard) -> None:
        self.engine, self.guard = engine, guard
        self._owner: Owner = engine.owner
        self.forget()
        self._steps = 0

    def forget(self) -> None:
        """The state is another one: what a step that failed had stepped means nothing any more."""
        self._resume = Resume({}, self.engine.roster.gradient)

    def step(self) -> None:
        """All parameters, but for those that were stepped by the same gradients already when the last step failed."""
        self.engine.roster.check()
        self._check_closed()
        done = self._resume.by_the_same_gradients()
        self.forget()
        again, begun = dict(done), list[Tensor]()
        groups, state = self._owner.param_groups, self._owner.state
        whole = len(state) == len(self.engine.roster.sites)  # then there is none whose state is about to begin
        try:
            self.guard.inspect([p for group in groups for p in group["params"] if p.grad is not None])
            if self.guard.stops():
                return
            for group in groups:
                ready = [p for p in group["params"] if p.grad is not None]
                if again:
                    ready = [p for p in ready if p not in again or again[p]]
                if not whole:
                    begun += [p for p in ready if p not in state]
                    for p in ready:
                        _ = state[p]  # is made, in the order of the parameters
                self._step_group(group, ready, done)
        except BaseException as error:
            self._resume = Resume(done, self.engine.roster.gradient)
            for p in begun:
                if p not in done:
                    state.pop(p, None)
            if done:
                error.add_note(
                    f"{len(done)} parameters had been stepped before this was raised; step() with the same gradients "
                    f"goes on with the others."
                )
            raise
        finally:
            self.guard.forget()

    def _step_group(self, group: dict[str, Any], ready: Sequence[Tensor], done: dict[Tensor, frozenset[str]]) -> None:
        engine, guard = self.engine, self.guard
        blocked, dealt = engine.roster.blocked, list[Tensor]()
        if engine.roster.placements:
            dealt = [p for p in ready if engine.roster.sites[p].owner is not None]
            ready = [p for p in ready if engine.roster.sites[p].owner is None]
        rows = [engine.row(p) for p in ready if not blocked or p not in blocked]
        for which in engine.sorted_out(row for row in rows if not row.kind.site.plain):
            with guard.undo(which):
                engine.step(which, guard.gradient, guard.norms)
            done.update(dict.fromkeys((row.p for row in which.rows), WHOLE))
        for p in ready if blocked else ():
            if p in blocked:
                self._step_blocks(p, guard.gradient(p), done)
        if dealt:
            step_dealt(engine, guard, dealt, guard.gradient)
            done.update(dict.fromkeys(dealt, WHOLE))
        idle = [p for p in group["params"] if p.grad is None and p in self._owner.state]
        for p in idle:
            if engine.waiting(p):
                with guard.undo_whole([p]):
                    engine.write(p)
        if idle and self.guard.on_nonfinite == "skip":
            self._steps += 1
            engine.sorting.idle(idle, self._steps)
        dense = [row.p for row in rows if row.kind.site.plain]
        self._step_dense(group, {p: engine.roster.gradient(p) for p in dense}, done)

    def _step_blocks(self, p: Tensor, gradient: Tensor, done: dict[Tensor, frozenset[str]]) -> None:
        written = set(done.get(p, WHOLE))
        try:
            with self.guard.undo_whole([p]):
                self.engine.step_blocks(p, gradient, written)
        except BaseException:
            if written:
                done[p] = frozenset(written)
            raise
        done[p] = WHOLE

    def _step_dense(
        self, group: dict[str, Any], dense: Mapping[Tensor, Tensor], done: dict[Tensor, frozenset[str]]
    ) -> None:
        for device in {p.device for p in dense}:
            here = [p for p in dense if p.device == device]
            states = [self.engine.row(p).state for p in here]
            with self.guard.undo_whole(here):
                step_dense([self.engine.numbers(p) for p in here], [dense[p] for p in here], states, group)
            done.update(dict.fromkeys(here, WHOLE))

    def _check_closed(self) -> None:
        """Raise for gradients that a window has taken up and only stepping in the backward pass would finish."""
        state: dict[Tensor, dict[str, Any]] = self._owner.state
        blocked = self.engine.roster.blocked
        found = [p for p, own in state.items() if WINDOW in own]
        found += [p for p in blocked if any(name.endswith(_OF_BLOCK) for name in state.get(p, ()))]
        open_ = [self.engine.roster.sites[p].name for p in found if p in self.engine.roster.sites]
        if open_:
            raise RuntimeError(
                f"{', '.join(open_[:5])}: the state was saved in the middle of a window of step_in_backward(), which "
                f"has to be called before this step, or its gradients would be lost"
            )
