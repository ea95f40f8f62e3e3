"""Stepping by what processes have of their gradients in common frames: each sends its cores, and no gradient."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from ..batches import Row, Together, apart
from ..cell import Cell
from ..checkpoint import without_wire
from ..codecs.base import as_real
from ..comm import Comm
from ..engine import Engine, laid
from ..linalg import norm, trouble
from ..sites import Site
from ..steps import absorb
from . import gradients
from .guard import Guard
from .resume import WHOLE, Resume
from .taken import SENT, TakenUp, stand_in
from .whole import Whole


class Sending(Protocol):
    """Tensors that are being averaged."""

    def wait(self) -> list[Tensor]:
        """The means."""
        ...

    def leave(self) -> None:
        """Let what is going on come to its end."""
        ...


class Sends(Protocol):
    """Starts to average cores (*rows, ...) over all processes, given with the number of dimensions that count rows."""

    def __call__(self, cores: Sequence[tuple[Tensor, int]], /) -> Sending:
        """All of them, and nobody waits here."""
        ...


class Copies(Protocol):
    """Of what processes keep each for itself, those of all of them in a checkpoint."""

    def of_all(self, state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state with all copies."""
        ...

    def of_this_process(self, state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state with that of this process."""
        ...


class Beside(Protocol):
    """What else of a parameter belongs into a checkpoint."""

    def saved(self, p: Tensor, /) -> Mapping[str, Any]:
        """Its slots."""
        ...

    def loaded(self, p: Tensor, state: Mapping[str, Any], /) -> None:
        """Take note of them, and change nothing."""
        ...

    def adopt(self, loaded: Collection[Tensor], /) -> None:
        """Go by what was loaded of these parameters, and of others by nothing."""
        ...

    def settle(self) -> None:
        """The gradients that were sent are stepped by."""
        ...

    def drop(self) -> None:
        """They are not: all is as it was before."""
        ...


class Joins(Comm, Protocol):
    """A comm that rounds cores as they are sent."""

    keeps: bool
    """Whether the next ones are not sent yet."""
    earlier: Tensor | None
    """What the next one is sent together with."""


class Stepped(Protocol):
    """An optimizer with an engine."""

    engine: Engine


Part = tuple[Sending, int, int | None]


@dataclass(eq=False)
class Open:
    """Rows that have absorbed gradients of this process, and wait for those of the others.

    Args:
        which: the rows.
        cell: theirs, which is not committed, with cores of this process alone.
        sent: their cores: what averages them, the place among what it averages, and which row of it is theirs, None
            for all of it.
        unsent: the sum of cores that were not sent yet.
    """

    which: Together
    cell: Cell
    sent: list[Part] = field(default_factory=list[Part])
    unsent: Tensor | None = None

    def core(self) -> Tensor:
        """The mean over all processes, of all gradients together."""
        found: Tensor | None = None
        for sending, place, part in self.sent:
            mean = sending.wait()[place]
            mean = mean if part is None else mean[part]
            found = mean if found is None else found + mean
        assert found is not None
        return found

    def apart(self) -> list["Open"]:
        """Each row by itself."""
        if not self.which.stacked:
            return [self]
        return [
            Open(
                alone,
                cell,
                [(sending, place, i) for sending, place, _ in self.sent],
                None if self.unsent is None else self.unsent[i],
            )
            for i, (alone, cell) in enumerate(apart(self.which, self.cell))
        ]


class Replicas(Whole):
    """Takes up gradients before they are averaged, sends their cores, and steps once the means are there.

    Until the step no state changes: cells are kept open. :meth:`take` is a collective, and so is :meth:`step` where the
    wire has something left to do; all processes call them for the same parameters in the same order.

    Args:
        owner: the optimizer.
        guard: counts what was skipped.
        comm: what joins gradients where frames are searched.
        send: averages cores.
        copies: of what differs from process to process, in checkpoints.
        accumulate: how many backward passes send their cores together.
        called: the name of this driver in messages.
    """

    beside: Beside | None = None

    def __init__(  # noqa: PLR0917
        self, owner: Stepped, guard: Guard, comm: Joins, send: Sends, copies: Copies, accumulate: int, called: str
    ) -> None:
        super().__init__(owner.engine, guard)
        self._keeps = owner  # whose engine does not keep it alive, as hooks have to
        self._send, self._copies, self._called = send, copies, called
        self.engine.comm = self._comm = comm
        self._accumulate, self._passes = accumulate, 0
        self._bad_here: list[Tensor] = []
        self._open: dict[Row, Open] = {}
        self._flags: list[tuple[Sending, int]] = []
        self._looked_at: list[tuple[str, Tensor]] = []
        self._begun: set[Tensor] = set()
        for p, site in self.engine.roster.sites.items():
            if site.projected and p.requires_grad:
                p.register_hook(unserializable_hook(partial(clear, p)))

    def __str__(self) -> str:
        return self._called

    @property
    def waiting(self) -> bool:
        """Whether gradients have been taken up since the last step."""
        return bool(self._open)

    def saved(self, p: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A parameter's state, with what all processes keep each for itself."""
        own = self._copies.of_all(state, self.engine.roster.sites[p], self.engine.roster.group_of(p))
        return own if self.beside is None else {**own, **self.beside.saved(p)}

    def loaded(self, p: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A parameter's state, with what this process keeps; a collective call."""
        if self.beside is not None:
            self.beside.loaded(p, state)
        state, roster = without_wire(state), self.engine.roster
        return self._copies.of_this_process(state, roster.sites[p], roster.group_of(p))

    def adopt(self, loaded: Collection[Tensor]) -> None:
        """Go by what was loaded."""
        if self.beside is not None:
            self.beside.adopt(loaded)

    # ------------------------------------------------------------------------------------------------------ taking up

    def begin_pass(self) -> bool:
        """A backward pass begins; whether it ends a window, and sends."""
        self._passes += 1
        return self._passes % self._accumulate == 0

    def take(self, given: Mapping[Tensor, Tensor], agree_on_idle: bool, send: bool = True) -> None:
        """Steps 1-4 by gradients of this process; their cores are on their way then, or wait for those that follow.

        A gradient that is not finite counts as zero, and stops the next step on all processes.

        Args:
            given: parameter -> gradient, which may be overwritten afterwards.
            agree_on_idle: whether parameters whose gradients are zero on all processes are left as they are.
            send: whether cores are sent, with those that wait.
        """
        engine, sites = self.engine, self.engine.roster.sites
        usable, bad = self._usable(given)
        self._comm.keeps = not send
        # Idle ones, too, have to be rounded as they are sent.
        waiting = [row for row, own in self._open.items() if send and own.unsent is not None and row.p in given]
        late = {row.p for row in waiting}
        if agree_on_idle:
            live = engine.comm.largest(torch.stack([g.any() for g in usable.values()]).float()).tolist()
            usable = {p: g for (p, g), any_ in zip(usable.items(), live, strict=True) if any_ or p in late}
        state = engine.owner.state
        self._begun |= {p for p in usable if p not in state}
        parts: dict[Row, Tensor] = {}
        taken: list[Open] = []
        for p, g in usable.items():
            if sites[p].blocks:
                blocks = engine.blocks_of(p, g, ())
                idle = [row for row in waiting if row.p is p and row not in blocks]
                blocks |= {row: g.new_zeros(row.site.view.shape, dtype=row.site.view.dtype) for row in idle}
                taken += self._absorbed([*blocks], lambda which, blocks=blocks: laid(which, blocks))
            else:
                parts[engine.row(p)] = g
        taken += self._absorbed([*parts], lambda which: [parts[row] for row in which.rows])
        for own in taken:
            assert own.cell.open is not None and own.cell.open.newest is not None
            newest = own.cell.open.newest
            own.unsent = newest if own.unsent is None else own.unsent + newest
        self._bad_here.append(bad)
        if send:
            self._send_all(taken)
        for own in taken:
            self._open.update(dict.fromkeys(own.which.rows, own))

    def _send_all(self, taken: Sequence[Open]) -> None:
        """Send what waits, and whether a gradient was bad."""
        cores = [(own.unsent, int(own.which.stacked)) for own in taken if own.unsent is not None]
        bad = torch.stack([flag.to(self._bad_here[0].device) for flag in self._bad_here]).any()
        sending = self._send([*cores, (bad.float().view(1), 0)])
        for place, own in enumerate(taken):
            own.sent.append((sending, place, None))
            own.unsent = None
        self._flags.append((sending, len(cores)))

    def _usable(self, given: Mapping[Tensor, Tensor]) -> tuple[dict[Tensor, Tensor], Tensor]:
        """The gradients, with zeros in place of bad ones, and whether there was one; nothing is read on the host."""
        usable, flags = dict[Tensor, Tensor](), list[Tensor]()
        for p, g in given.items():
            size, total = norm(g), as_real(g).sum()
            flag = ~size.isfinite() & ~total.isfinite()  # a norm may overflow
            usable[p] = gradients.usable(g, flag)
            flags.append(flag)
            self._looked_at.append((self.engine.roster.sites[p].name, flag))
        return usable, torch.stack([flag.to(flags[0].device) for flag in flags]).any()

    def _absorbed(self, rows: Sequence[Row], given: Callable[[Together], Any]) -> list[Open]:
        """These rows with one more gradient each, as they are stepped together.

        Args:
            rows: with a gradient.
            given: of rows that are stepped together, a list of gradients, or their parts of one as the view has it.
        """
        found: list[Open] = []
        for own in [*self._again(rows), *self._first(rows)]:
            given_here, self._comm.earlier = given(own.which), own.unsent
            try:
                if isinstance(given_here, Tensor):
                    absorb(own.cell, given_here, None, self.engine.now(own.which.rows[0]))
                else:
                    self.engine.absorbed(own.which, given_here, None, cell=own.cell)
            finally:
                self._comm.earlier = None
            found.append(own)
        return found

    def _first(self, rows: Sequence[Row]) -> list[Open]:
        new = [row for row in rows if row not in self._open]
        return [Open(which, self.engine.cell(which)) for which in self.engine.sorted_out(new)]

    def _again(self, rows: Sequence[Row]) -> list[Open]:
        """Rows that have absorbed a gradient before; those that were together by themselves where some are missing."""
        here, found = set(rows), list[Open]()
        for own in dict.fromkeys(self._open[row] for row in rows if row in self._open):
            if here.issuperset(own.which.rows):
                found.append(own)
                continue
            single = own.apart()
            self._open |= {row: one for one in single for row in one.which.rows}
            found += [one for one in single if one.which.rows[0] in here]
        return [Open(own.which, own.cell.copy(), list(own.sent), own.unsent) for own in found]

    def leave_stand_ins(self) -> None:
        """Put into ``p.grad`` what stands for the gradients that were taken up."""
        for p in {row.p for row in self._open}:
            p.grad = stand_in(p, self.engine.roster.sites[p].name, SENT)

    # -------------------------------------------------------------------------------------------------------- stepping

    def step(self) -> None:
        """All parameters, once all processes have the same cores; where one has a bad gradient, none.

        Raises:
            RuntimeError: a non-finite gradient on any process, with "raise"; one that was not sent. Nothing has changed
                then.
        """
        if not self._open:
            self.engine.roster.check()
        self._check_closed()
        if self._passes % self._accumulate:
            raise RuntimeError(
                f"step() after {self._passes} backward passes, of which {self._accumulate} send their cores together: "
                f"call backward() as often as compress(accumulate={self._accumulate}) says, or zero_grad() to drop them"
            )
        self._check_sent()
        done = self._resume.by_the_same_gradients()
        self.forget()
        again, begun = dict(done), list[Tensor]()
        state, groups = self._owner.state, self._owner.param_groups
        dense = {p: None for p, site in self.engine.roster.sites.items() if p.grad is not None and not site.projected}
        try:
            if self._bad([*dense]):
                self.guard.count()
                self.drop()
                return
            if self.beside is not None:
                self.beside.settle()
            cores = {own: own.core() for own in self._open.values()}
            for group in groups:
                ready = [p for p in group["params"] if p in dense and not (p in again and again[p] is WHOLE)]
                begun += [p for p in ready if p not in state]
                for p in ready:
                    _ = state[p]  # is made, in the order of the parameters
                self._step_group(group, ready, done)
            self._apply(cores)
        except BaseException:
            self._resume = Resume(done, self.engine.roster.gradient)
            for p in begun:
                if p not in done:
                    state.pop(p, None)
            raise
        finally:
            self.guard.forget()
        self._settle()

    def _apply(self, cores: Mapping[Open, Tensor]) -> None:
        """Steps 5-7 by these cores; what is done waits no more, should another fail."""
        engine = self.engine
        blocked: dict[Tensor, list[Open]] = {}
        for own, core in cores.items():
            if own.which.rows[0].block is not None:
                blocked.setdefault(own.which.rows[0].p, []).append(own)
                continue
            cell = _with_core(own, core)
            engine.applied(own.which, cell, engine.now(own.which.rows[0]))
            engine.commit(own.which, cell)
            self._close(own.which.rows)
        for p, waiting in blocked.items():
            rows = sorted((row for own in waiting for row in own.which.rows), key=lambda row: int(row.block or 0))
            written = set[str]()
            opened = [(own.which, _with_core(own, cores[own]), engine.now(own.which.rows[0])) for own in waiting]
            try:
                engine.apply_blocks(p, rows, opened, written)
            finally:
                self._close([row for row in rows if row.block in written])
        engine.settle()

    def _close(self, rows: Collection[Row]) -> None:
        for row in rows:
            del self._open[row]
            self._begun.discard(row.p)

    def _bad(self, dense: Sequence[Tensor]) -> bool:
        """Whether anything that would be used is not finite; the same on all processes, read on the host once.

        Raises:
            RuntimeError: it is, and shall be raised.
        """
        gradients.check_layout(dense, self.engine.roster.sites)
        given = {p: self.engine.roster.gradient(p) for p in dense}
        self.guard.norms = gradients.norms(given)
        flags = [sending.wait()[place].any().view(()) for sending, place in self._flags]
        flags += [~own.core().isfinite().all() for own in dict.fromkeys(self._open.values())]
        if dense:
            flags.append(gradients.any_nonfinite(self.guard.norms.values())
                         & gradients.any_nonfinite(gradients.sums(given.values())))  # fmt: skip
        if not flags or not trouble(torch.stack([flag.to(flags[0].device) for flag in flags]).any()):
            return False
        if self.guard.on_nonfinite == "skip":
            return True
        if culprits := gradients.nonfinite(given, self.engine.roster.sites):
            gradients.refuse_nonfinite(", ".join(culprits))
        names = [name for name, flag in self._looked_at if trouble(flag)]
        where = f"{', '.join(names)} of this process" if names else "what another process has sent, which names it"
        raise RuntimeError(
            f"non-finite gradient in {where}: nothing was changed on any of them. Look for a diverging loss, or pass "
            f'on_nonfinite="skip" to skip such steps'
        )

    def _check_sent(self) -> None:
        """Raise for gradients of projected parameters that only this process knows."""
        sites = self.engine.roster.sites
        own = {
            p: p.grad for p, site in sites.items()
            if site.projected and p.grad is not None and not isinstance(p.grad, TakenUp)
        }  # fmt: skip
        if own and not self._open and not any(trouble(g.any()) for g in own.values()):
            self.take(own, agree_on_idle=False)  # zeros, by which torch.distributed.checkpoint makes a state
        elif own:
            raise RuntimeError(
                f"{', '.join([sites[p].name for p in own][:5])}: p.grad is this process's alone, since no backward "
                f"pass has sent it. Let the last backward pass before step() be outside of no_sync(), and set no "
                f"p.grad by hand"
            )

    def drop(self) -> None:
        """Forget the gradients; parameters and states are as they were."""
        if self.beside is not None:
            self.beside.drop()
        self.leave()

    def leave(self) -> None:
        """Forget those that were taken up, and not what lies in ``p.grad``."""
        for sending, _ in self._flags:
            sending.leave()
        for p in self._begun:
            self._owner.state.pop(p, None)
        self._open.clear()
        self._settle()

    def _settle(self) -> None:
        self._begun.clear()
        self._flags.clear()
        self._looked_at.clear()
        self._bad_here.clear()
        self._passes = 0
        self.clear()

    def clear(self) -> None:
        """Take away what stands for gradients."""
        for p in self.engine.roster.sites:
            clear(p)


def _with_core(own: Open, core: Tensor) -> Cell:
    """A copy of its cell, which a step that fails may spoil, with this core."""
    cell = own.cell.copy()
    assert cell.open is not None
    cell.open.core = core
    return cell


def clear(p: Tensor, _: Tensor | None = None) -> None:
    """Take away what stands for a gradient."""
    if isinstance(p.grad, TakenUp):
        p.grad = None
