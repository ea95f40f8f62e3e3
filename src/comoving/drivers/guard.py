"""The guard: bad gradients are refused before anything changes, or what they did is undone on the device."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .. import state as slots
from ..batches import Together
from ..engine import Engine
from ..linalg import asks_host, trouble
from ..weights import codes_of
from . import gradients


class Guard:
    """Looks at the gradients of a step, and stands around the parts of it.

    Args:
        engine: whose parameters they are.
        on_nonfinite: "raise" or "skip".
    """

    skipped: Tensor | None = None
    """How many steps were skipped, on the device; None before the first look."""

    def __init__(self, engine: Engine, on_nonfinite: str) -> None:
        self.engine, self.on_nonfinite = engine, on_nonfinite
        self.norms: dict[Tensor, Tensor] = {}
        self._bad: Tensor | None = None

    def inspect(self, params: Sequence[Tensor]) -> None:
        """Refuse bad gradients of these parameters before anything changes; with "skip", note a flag on the device.

        Raises:
            RuntimeError: a sparse gradient; a non-finite one with "raise".
        """
        self._bad = None
        gradients.check_layout(params, self.engine.roster.sites)
        roster = self.engine.roster
        given = {p: roster.gradient(p) for p in params if p.grad is not None}
        self.norms = gradients.norms(given)
        if not params:
            return
        bad = gradients.any_nonfinite(self.norms.values())
        if self.on_nonfinite == "skip":
            self._bad = roster.anywhere(bad & gradients.any_nonfinite(gradients.sums(given.values())))
            self.count(self._bad)
        elif trouble(roster.anywhere(bad)):
            culprits = gradients.nonfinite(given, roster.sites)
            found = bool(culprits)
            if roster.placements:
                found = trouble(roster.anywhere(bad.new_tensor(found)))
            if found:
                gradients.refuse_nonfinite(", ".join(culprits) or "entries that another process has")

    def forget(self) -> None:
        """The step is over."""
        self.norms, self._bad = {}, None

    def stops(self) -> bool:
        """Whether nothing shall be stepped at all, since what a bad gradient would change cannot be put back."""
        if self._bad is None:
            return False
        changes = any(map(self._changes_shape, self.norms))
        if self.engine.roster.placements:  # all processes go the same way
            changes = bool(self.engine.roster.anywhere(self._bad.new_tensor(changes)))
        return changes and trouble(self._bad)

    def gradient(self, p: Tensor) -> Tensor:
        """The gradient of a parameter; zeros where it is unusable: no decomposition may see a NaN."""
        return gradients.usable(self.engine.roster.gradient(p), self._bad)

    def undo(self, which: Together) -> AbstractContextManager[None]:
        """What undoes what happens inside to these rows, where a gradient is bad."""
        if self._bad is None:
            return nullcontext()
        states = [(state, {}) for state in which.states()]
        if not which.stacked and not asks_host(self._bad):
            row = which.rows[0]
            site = slots.current(row.site, row.kind.group, row.state)
            states = [(row.state, slots.awaited(site, row.kind.group, row.state, row.p.device))]
        return gradients.Undo(self._bad, [x for row in which.rows for x in self._numbers(row.p)], states)

    def undo_whole(self, params: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Likewise for all that whole parameters have."""
        if self._bad is None:
            return nullcontext()
        params = list(params)
        rows = [row for p in params for row in self.engine.rows_of(p)]
        states = [
            (
                row.state,
                {} if asks_host(self._bad) else slots.awaited(row.site, row.kind.group, row.state, row.p.device),
            )
            for row in rows
        ]
        return gradients.Undo(self._bad, [x for p in params for x in self._numbers(p)], states)

    def count(self, bad: Tensor | None = None) -> None:
        """Count a step that was skipped; by a flag on the device where one is given."""
        new = torch.ones((), dtype=torch.int64) if bad is None else bad.long()
        self.skipped = new if self.skipped is None else self.skipped + new.to(self.skipped.device)

    def _numbers(self, p: Tensor) -> list[Tensor]:
        """The tensors that hold a parameter's numbers: its codes, or itself."""
        codes = codes_of(p)
        return [self.engine.numbers(p)] if codes is None else codes.numbers()

    def _changes_shape(self, p: Tensor) -> bool:
        """Whether the next step may give slots of this parameter another shape, or on the CPU their first one.

        Elsewhere the host does not wait to know whether a first step is skipped. What it has made is set back to what
        it begins as, but for the frame, which is one of zeros: random until the next refresh that is due. So do bases
        and roots of rules wait for the step at which they are due again.
        """
        engine = self.engine
        site, rows = engine.roster.sites[p].here, engine.rows_of(p)
        if not engine.roster.stepped_here(p):
            return False
        if not (site.blocks or asks_host(p) or p in engine.owner.state):
            return False
        if not site.projected:
            return not rows
        return len(rows) < max(1, site.blocks) or any(
            not slots.at_its_ranks(slots.current(row.site, row.kind.group, row.state), row.kind.group, row.state)
            or (row.kind.parts.ranks.adaptive and engine.due(row))
            for row in rows
        )
