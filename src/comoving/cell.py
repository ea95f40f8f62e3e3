"""Cells: the state of a batch while it is stepped, in one compartment per role."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from torch import Tensor

from . import state as slots
from .clock import Clock
from .diagnostics import SLOT
from .frames import Frame, ModeFrame, SharedFrame
from .frames import stored as stored_frame
from .kind import Kind
from .residual.base import HELD, HELD_NORM, Passage
from .sites import Site
from .state import CADENCE, CORE, MEMORY, REFRESHED, REST, WINDOW

_PRECONDITION = "precondition."


class Search(Protocol):
    """A search that was begun, and need not have come to its end."""

    def found(self) -> dict[str, Tensor]:
        """What it leaves in the finder's memory; the device waits for it, if it has to, and the host does not."""
        ...


@dataclass
class Open:
    """What lives between the first gradient and the step only, beside what the residual holds in its compartment.

    Args:
        core: z, the coordinates of all gradients so far.
        size: the norm of the gradient, (*rows), where there was one and the residual holds on to it.
        rest: the norm of what they have outside the frame, (*rows), where clipping asks for it.
        window: how many gradients there were, where a driver counts them.
        refreshed: whether the first of them brought a new frame to a weight whose change is deferred.
        newest: what is used of the last of them alone, for a driver that sends it to others; in no state.
    """

    core: Tensor
    size: Tensor | None = None
    rest: Tensor | None = None
    window: int | None = None
    refreshed: bool = False
    newest: Tensor | None = None


@dataclass
class Cell:
    """The state of a batch, or of one row by itself, while it is stepped.

    Compartments are dicts of this cell's own: a part puts new tensors into its own, and sees no other. It finds the
    slots there that it declares, and a residual, within a step, what it holds (:data:`comoving.residual.base.HELD`);
    whatever else it leaves is refused. The tensors are those of the state, and are not written to: a cell that is
    dropped has changed nothing.

    Args:
        kind: of its rows.
        rows: how many leading dimensions count rows: 1, or 0 of a row by itself.
        tick: the number of finished steps, known to the host.
        t: likewise, but for steps that were skipped or forgotten: what bias correction goes by.
        basis: the frame, as it is stored.
        moments: of the rule and the transport; as they are stored until :meth:`decode`.
        precondition, finder, cadence, residual: of these parts.
        figures: of :mod:`comoving.diagnostics`, (*rows, 6); None where they are off.
        host: what no part sees: ranks that are asked for, seeds of rounding, and what somebody else put into the state.
        open: None before the first gradient.
        recorded: whether the step is recorded, to be replayed at other counts and rates.
        name: what its rows are called in messages.
        search: of a frame to come, which this step has begun and which goes on elsewhere; in no state.
    """

    kind: Kind
    rows: int
    tick: int
    t: Tensor
    basis: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    moments: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    precondition: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    finder: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    cadence: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    residual: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    figures: Tensor | None = None
    host: dict[str, Any] = field(default_factory=dict[str, Any])
    open: Open | None = None
    recorded: bool = False
    name: str = ""
    search: Search | None = None
    _frame: Frame | None = None
    _stored: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def of(cls, kind: Kind, state: Mapping[str, Any], rows: int = 0, called: str = "") -> "Cell":
        """The cell of a state with flat names."""
        cell = cls(kind, rows, state["tick"], state["step"], figures=state.get(SLOT), name=called or kind.site.name)
        known, kept = kind.moments, kind.declared["residual"]
        for name, x in state.items():
            if name in known:
                cell.moments[name] = x
            elif name.startswith(stored_frame.PREFIX):
                cell.basis[name] = x
            elif name.startswith(MEMORY):
                cell.finder[name.removeprefix(MEMORY)] = x
            elif name.startswith(CADENCE):
                cell.cadence[name.removeprefix(CADENCE)] = x
            elif name.startswith(_PRECONDITION):
                cell.precondition[name] = x
            elif name in _SINGLE:
                continue
            elif name in kept or name.startswith(HELD):
                cell.residual[name] = x
            else:
                cell.host[name] = x
        if CORE in state:
            own = (state.get(name) for name in (HELD_NORM, REST, WINDOW))
            cell.open = Open(state[CORE], *own, refreshed=REFRESHED in state)
        cell._stored = cell.moments
        return cell

    def flat(self) -> dict[str, Any]:
        """The state with flat names, moments as they are stored."""
        found: dict[str, Any] = {"tick": self.tick, "step": self.t, **self.host, **self.precondition, **self.basis}
        found |= slots.prefixed(self.finder, MEMORY) | slots.prefixed(self.cadence, CADENCE)
        found |= self.moments | self.residual
        if self.figures is not None:
            found[SLOT] = self.figures
        if self.open is not None:
            own = {CORE: self.open.core, HELD_NORM: self.open.size, REST: self.open.rest, WINDOW: self.open.window}
            found |= {name: x for name, x in own.items() if x is not None}
            found |= {REFRESHED: True} if self.open.refreshed else {}
        return found

    def copy(self) -> "Cell":
        """A cell of the same tensors, to be stepped where this one stays as it is."""
        names = ("basis", "moments", "precondition", "finder", "cadence", "residual", "host")
        return replace(self, **{name: dict(getattr(self, name)) for name in names})

    def check(self) -> None:
        """Raise where a part has put something beside the slots that it declares; moments are as they are stored.

        Raises:
            RuntimeError: naming the part and what it has put there.
        """
        declared, parts = self.kind.declared, self.kind.parts
        for role, own, names in (
            ("rule", self.moments, declared["moments"]),
            ("precondition", self.precondition, declared["precondition"]),
            ("finder", self.finder, declared["finder"]),
            ("cadence", self.cadence, declared["cadence"]),
            ("residual", self.residual, declared["residual"]),
        ):
            if own.keys() <= names:
                continue
            more = [name for name in own if name not in names and not (role == "residual" and name.startswith(HELD))]
            if more:
                part = f"{parts.rule} or transport {parts.transport}" if role == "rule" else getattr(parts, role)
                raise RuntimeError(
                    f"{self.name}: {role} {part} keeps {', '.join(map(repr, more))}, which it does not "
                    f"declare as slots; nothing was changed"
                )

    def decode(self, only: str | None = None) -> None:
        """Decode the moments, or ``only`` one of them; those that are decoded already stay."""
        self.moments = slots.decoded(self._framed(), self.kind.group, self.moments, only, self.rows)

    def encode(self, moved: bool) -> None:
        """Encode the moments; where they have not ``moved``, their codes are those that they had."""
        self.moments = slots.encoded(
            self._framed(), self.kind.group, self.moments, None if moved else self._stored, self.rows
        )
        self._stored = self.moments

    def _framed(self) -> Site:
        """The site, with the ranks of the frame that is here where codes have to be told them."""
        site, group = self.kind.site, self.kind.group
        if not site.projected or not slots.coded(group):
            return site
        return slots.resized(site, group, slots.ranks_in(site, group, {**self.basis, **self.moments}))

    @property
    def frame(self) -> Frame:
        """The frame that is here; the whole one of a dense parameter."""
        return self.load(self.moments.get(self.kind.parts.rule.momentum))

    def load(self, like: Tensor | None) -> Frame:
        """The frame that is here; ``like`` is of the core's shape, for frames that do not store their directions."""
        if self._frame is None:
            view = self.kind.site.framed.view
            if self.kind.site.projected:
                self._frame = self.shared(stored_frame.load(self.kind.group, self.basis, view.shape, view.dtype, like))
            else:
                self._frame = ModeFrame((None,) * len(view.shape))
        return self._frame

    def shared(self, frame: Frame) -> Frame:
        """The frame, as it lies on what is here of a tensor that processes share, along a mode that it compresses."""
        if not self.kind.site.one_core:
            return frame
        assert isinstance(frame, ModeFrame)
        return SharedFrame(frame.factors, self.kind.comm)

    def turn(self, basis: dict[str, Tensor], frame: Frame | None) -> None:
        """Put another frame in place of the one that is here."""
        self.basis, self._frame = basis, frame

    def clock(self, betas: tuple[float, float]) -> Clock:
        """Where its averages stand."""
        return Clock(self.t, *betas, self.tick, self.rows, self.recorded)

    def standing(self, betas: tuple[float, float]) -> Passage:
        """The passage of a momentum whose frame stays as it is; its slot is decoded."""
        rule, frame = self.kind.parts.rule, self.frame
        decay, intake = rule.recursion(self.clock(betas))
        momentum = self.moments.get(rule.momentum)
        if momentum is None:
            return Passage(frame, cast("Tensor", None), decay, intake, tick=self.tick, rows=self.rows)
        return Passage(frame, momentum, decay, intake, frame, momentum, tick=self.tick, rows=self.rows)


_SINGLE = {"tick", "step", SLOT, CORE, HELD_NORM, REST, WINDOW, REFRESHED}
