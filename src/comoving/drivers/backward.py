"""Stepping inside the backward pass: a gradient is taken in, and freed, as soon as it is accumulated."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

from ..batches import Row
from ..engine import Engine
from ..linalg import norm
from ..precision import full_precision
from ..precondition import Plain
from ..state import CORE, REST, RUNNING, SIZE, WINDOW, commit
from . import gradients
from .dealt import step_dealt
from .dense import step_dense
from .guard import Guard
from .taken import TakenUp, stand_in

_SMALL = 1e-6  # torch's, in clip_grad_norm_


@dataclass
class Window:
    """How gradients are gathered and clipped between two steps, and what has happened since the last one.

    Args:
        accumulate: backward passes in a window.
        clip: largest norm of all gradients together; None for no limit.
        exact: whether that is this window's norm, else the last one's.
        stepped: parameters that have been stepped since the last step().
        checked: whether groups were looked at since then.
        incomplete: whether a gradient was dropped since then.
        closing: what gradients are multiplied by in the step() that ends the window, once that is known.
        norm: of the last finished window.
        held: of parameters that one process steps for all that share them, what is here of the sum of gradients.
        counts: how many gradients that is.
        sizes: the norms of these sums, once they were used.
    """

    accumulate: int
    clip: float | None
    exact: bool
    stepped: set[Tensor] = field(default_factory=set[Tensor])
    checked: bool = False
    incomplete: bool = False
    closing: float | None = None
    norm: float | None = None
    held: dict[Tensor, Tensor] = field(default_factory=dict[Tensor, Tensor])
    counts: dict[Tensor, int] = field(default_factory=dict[Tensor, int])
    sizes: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def factor(self, size: float) -> float:
        """What gradients of this norm are multiplied by."""
        return 1.0 if self.clip is None else min(1.0, self.clip / (size + _SMALL))


class Stepped(Protocol):
    """An optimizer with an engine."""

    engine: Engine


class Backward:
    """Hooks on gradients, which take them up; see :meth:`comoving.LowRankOptimizer.step_in_backward`.

    Args:
        owner: the optimizer.
        guard: counts what was skipped.
        window: how gradients are gathered.
        averaged: whether somebody calls :meth:`take_all` once gradients have been averaged over processes, who may
            write to them afterwards; else they are taken up as soon as they are accumulated.
    """

    def __init__(self, owner: Stepped, guard: Guard, window: Window, averaged: bool = False) -> None:
        self._owner = owner  # whose engine does not keep it alive, as hooks have to
        self.averaged = averaged
        self.engine, self.guard, self.window = owner.engine, guard, window
        engine = self.engine
        self._hooks: dict[Tensor, list[RemovableHandle]] = {}
        engine.clips = window.clip is not None
        self.hook_into(engine.roster.sites)

    def hook_into(self, params: Iterable[Tensor]) -> None:
        """Take up the gradients of these parameters too."""
        for p in params:
            if p.requires_grad:
                self._hooks[p] = [p.register_hook(unserializable_hook(partial(_clear, p)))]
                if not self.averaged:
                    self._hooks[p].append(p.register_post_accumulate_grad_hook(self._hook))

    def take_all(self) -> None:
        """Take up all gradients that are there, the same on all processes; none after :meth:`remove`.

        Where anything raises those that are left are dropped, as where a backward pass does not come to its end.
        """
        given = [p for p in self._hooks if p.grad is not None and not isinstance(p.grad, TakenUp)]
        try:
            for p in given:
                self._hook(p)
        except BaseException:
            for p in given:
                if not isinstance(p.grad, TakenUp):
                    p.grad = None
            raise

    def remove(self) -> None:
        """Leave gradients where they are from now on.

        Raises:
            RuntimeError: in the middle of a window.
        """
        if self.window.held or any(True for _ in self._pending()):
            raise RuntimeError("a window is open, with gradients that are not in any p.grad: call step() first")
        self.clear()
        self.leave([*self._hooks])
        self.engine.clips = False

    def leave(self, params: Iterable[Tensor]) -> None:
        """Leave the gradients of these parameters where they are."""
        for p in params:
            for hook in self._hooks.pop(p, ()):
                hook.remove()
            _clear(p)
            self.window.stepped.discard(p)

    def copied(self) -> Window:
        """The window, as a pickle or a deep copy takes it along."""
        return replace(self.window)

    def clear(self) -> None:
        """Take away what stands for gradients."""
        for p in self.engine.roster.sites:
            _clear(p)

    def begin_running(self) -> None:
        """Where clipping goes by the last window's norm, give groups a place for it, which is saved from the start."""
        if self.window.clip is not None and not self.window.exact:
            for group in self.engine.owner.param_groups:
                group.setdefault(RUNNING, self.engine.owner.param_groups[0].get(RUNNING, 0.0))

    # ------------------------------------------------------------------------------------------------------ the window

    def _hook(self, p: Tensor) -> None:
        """Take up a gradient; step the parameter where the window is full and nothing has to be waited for."""
        window = self.window
        with torch.no_grad(), full_precision():
            count = self._take_up(p)
            early = (window.clip is None or not window.exact) and p not in window.held
            if count == window.accumulate and early:
                self._step_one(p, window.factor(self._running()))
                window.stepped.add(p)
        if count == window.accumulate or p not in self.engine.roster.placements:  # FSDP adds to what it finds there
            p.grad = stand_in(p, self.engine.roster.sites[p].name)

    def _running(self) -> float:
        return self.engine.owner.param_groups[0].get(RUNNING, 0.0)

    def _take_up(self, p: Tensor) -> int:
        """Take up a gradient; how many the window has of this parameter then, and 0 for one that is dropped."""
        engine, window, site, gradient = self.engine, self.window, self.engine.roster.sites[p], p.grad
        if gradient is None or isinstance(gradient, TakenUp):
            raise RuntimeError(
                f"the gradient of {site.name} is gone: another hook, or another optimizer, has taken it up"
            )
        if p in window.stepped:
            raise RuntimeError(
                f"{site.name} has got a gradient after it was stepped: a window is {window.accumulate} backward "
                f"passes, then step(). Reentrant checkpointing of activations, which hands out gradients in pieces, is "
                f"refused: pass use_reentrant=False"
            )
        if not window.checked:
            engine.roster.check()
            window.checked = True
        gradients.check_layout([p], engine.roster.sites)
        gradient = engine.roster.gradient(p)
        if self.averaged and (not site.projected or engine.roster.group_of(p)["residual"].holds):
            gradient = gradient.clone()
        p.grad = None
        if not self._finite(gradient, p):
            window.incomplete = True
            return 0
        if site.owner is not None:
            window.held[p] = window.held[p].add_(gradient) if p in window.held else gradient.clone()
            window.counts[p] = window.counts.get(p, 0) + 1
            return window.counts[p]
        if site.plain:
            state = engine.row(p).state
            state[CORE] = state[CORE].add_(gradient) if CORE in state else gradient
        else:
            engine.take(p, gradient)
        count = 1 + max((row.state.get(WINDOW, 0) for row in engine.rows_of(p)), default=0)
        for row in engine.waiting(p):
            row.state[WINDOW] = count
        return count

    def finish(self) -> None:
        """End of a window: step whatever has a gradient and was not stepped inside the backward pass."""
        engine, window = self.engine, self.window
        engine.roster.check()
        for p in engine.roster.sites:
            given = p.grad
            if given is not None and not isinstance(given, TakenUp):  # set by hand
                if self.averaged and given.any():
                    raise RuntimeError(
                        f"{engine.roster.sites[p].name}: p.grad is this process's alone, since no backward pass has "
                        f"averaged it. Let the last backward pass before step() be outside of no_sync(), and set no "
                        f"p.grad by hand"
                    )
                try:
                    self._take_up(p)
                except BaseException:
                    p.grad = given
                    raise
        if window.closing is None:  # else an earlier try has stepped some, and what is left has another norm
            window.closing = window.factor(self._running())
            if window.clip is not None and window.exact:
                every = [row for p in engine.roster.sites for row in engine.waiting(p)]
                sizes = [(row.p, _size(row)) for row in every]
                sizes += [(p, norm(held)) for p, held in window.held.items()]
                window.norm = self._total(sizes)
                window.closing = window.factor(window.norm)
        for p in list(self._pending()):
            self._step_one(p, window.closing)
        self._step_held(window.closing)
        if window.clip is not None and not window.exact:
            rows = [row for p in engine.roster.sites for row in engine.rows_of(p)]
            sizes = [(row.p, row.state.pop(SIZE)) for row in rows if SIZE in row.state]
            sizes += window.sizes
            window.norm = self._total(sizes)
            # What was dropped may have been the largest, and an overflow would stop all that follow.
            last = self._running() if window.incomplete or not sizes else 0.0
            for group in engine.owner.param_groups if isfinite(window.norm) else ():
                group[RUNNING] = max(last, window.norm)
        if window.incomplete:
            self.guard.count()
        window.stepped.clear()
        window.sizes.clear()
        window.checked = window.incomplete = False
        window.closing = None
        self.clear()

    def _step_held(self, factor: float) -> None:
        """Step parameters that one process each steps for all, by their gradients of this window."""
        window = self.window
        if not window.held:
            return
        if window.clip is not None and not window.exact:
            window.sizes += [(p, norm(held)) for p, held in window.held.items()]
        params = [p for p in self.engine.roster.sites if p in window.held]
        step_dealt(self.engine, self.guard, params, lambda p: window.held[p].mul_(factor))
        window.held.clear()
        window.counts.clear()

    def _total(self, sizes: Sequence[tuple[Tensor, Tensor]]) -> float:
        """The norm of all, by one reading of the device; where processes share parameters, with what they have."""
        roster, own, shared = self.engine.roster, list[Tensor](), dict[Any, list[Tensor]]()
        for p, size in sizes:
            spread = roster.placements.get(p)
            alone = spread is None or not spread.cut or roster.sites[p].one_core  # then it is that of all already
            (own if spread is None or alone else shared.setdefault(spread.group, [])).append(size)
        for group, comm in roster.comms.items():
            given = shared.get(group, [])
            device = next(p.device for p, spread in roster.placements.items() if spread.group == group)
            here = norm(torch.stack(given)) if given else torch.zeros((), device=device)
            own.append(comm.norm(here.float()))
        if not own:
            return 0.0
        device = own[0].device
        return float(norm(torch.stack([size.to(device, torch.float32) for size in own])))

    def _step_one(self, p: Tensor, factor: float) -> None:
        """Step a parameter by its gradients of this window, multiplied by this; where that fails it is as it was."""
        rows, written = self.engine.waiting(p), set[str]()
        before = {row: dict(row.state) for row in rows}
        try:
            self._step_scaled(p, rows, factor, written)
        except BaseException:
            for row in rows:
                if row.block is None or row.block not in written:
                    commit(row.state, before[row])
            raise

    def _step_scaled(self, p: Tensor, rows: list[Row], factor: float, written: set[str]) -> None:
        window, engine = self.window, self.engine
        for row in rows if window.clip is not None and not window.exact else ():
            row.state[SIZE] = _size(row)
        for row in rows:
            if factor < 1:
                _rescale(row, factor, engine.owner.param_groups[row.kind.number]["betas"])
            del row.state[WINDOW]
            row.state.pop(REST, None)
        if not engine.roster.sites[p].plain:
            engine.write(p, written)
            return
        (row,) = rows
        step_dense([engine.numbers(p)], [row.state.pop(CORE)], [row.state], engine.roster.group_of(p))

    def _pending(self) -> Iterator[Tensor]:
        return (p for p in self.engine.roster.sites if self.engine.waiting(p))

    def _finite(self, gradient: Tensor, p: Tensor) -> bool:
        """Whether a gradient is, in all processes that share it; one host synchronization."""
        good, name = norm(gradient).isfinite(), self.engine.roster.sites[p].name
        if not bool(good):  # a norm may overflow
            good = gradient.isfinite().all()
        spread = self.engine.roster.placements.get(p)
        if spread is not None and spread.cut:
            good = spread.comm_of_all.largest(1.0 - good.float()) == 0
        if bool(good):
            return True
        if self.guard.on_nonfinite == "skip":
            return False
        stepped = self.window.stepped
        done = f"{len(stepped)} parameters have been stepped in this window before it" if stepped else ""
        raise RuntimeError(
            f"non-finite gradient in {name}: {done or 'nothing was stepped'}. Look for a diverging loss, or pass "
            f'on_nonfinite="skip" to drop such gradients'
        )


# ------------------------------------------------------------------------------------------------------------ clipping


def _size(row: Row) -> Tensor:
    """The norm of a row's gradients of this window, with what was fed back."""
    core = row.state[CORE]
    if not row.site.projected:
        return norm(core)
    if REST not in row.state:
        raise RuntimeError(f"{row.site.name} has gradients of a window that began without clip, and no norm of them")
    cell = row.cell()
    return cell.kind.parts.residual.size(core, row.state[REST], cell.residual)


def _rescale(row: Row, factor: float, betas: tuple[float, float]) -> None:
    """Multiply a row's gradients of this window, core and rest alike."""
    if row.site.plain:
        row.state[CORE] = row.state[CORE] * factor
        return
    cell = row.cell()
    assert cell.open is not None
    core = cell.open.core
    if row.site.projected:
        parts = cell.kind.parts
        cell.decode()
        parts.residual.rescale(factor, core, cell.standing(betas), cell.residual, parts.codec)
        cell.encode(moved=False)
    cell.open = replace(cell.open, core=core * factor, size=None)
    commit(row.state, cell.flat())


def _clear(p: Tensor, _: Tensor | None = None) -> None:
    """Take away what stands for a gradient, as before the next one is accumulated."""
    if isinstance(p.grad, TakenUp):
        p.grad = None


# ------------------------------------------------------------------------------------------------------------ refusals


def check_hooks(engine: Engine, clip: float | None, averaged: bool) -> None:
    """Raise unless gradients can be taken up inside the backward pass.

    Args:
        engine: with the parameters.
        clip: largest norm of their gradients.
        averaged: whether they are taken up after they were averaged over processes.

    Raises:
        ValueError: several processes; a part that cannot be clipped so.
        RuntimeError: a gradient is there already.
    """
    distributed = torch.distributed
    sites, roster = engine.roster.sites, engine.roster
    alone = [site.name for p, site in sites.items() if p not in roster.placements and not averaged]
    if alone and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            f"step_in_backward() is refused with {distributed.get_world_size()} processes for {', '.join(alone[:3])}: "
            f"gradients reach the hooks before they are averaged over them. Pass the DistributedDataParallel that "
            f"averages them, step_in_backward(model=...), or shard the model with fully_shard()"
        )
    full = [site.name for p, site in sites.items() if p.grad is not None and not isinstance(p.grad, TakenUp)]
    if full:
        raise RuntimeError(f"{', '.join(full[:5])} has a gradient already: call step() or zero_grad() first")
    for group in engine.owner.param_groups if clip is not None else ():
        check_clip(clip, group)


def check_clip(clip: float | None, group: Mapping[str, Any]) -> None:
    """Raise unless the gradients of a group can be clipped once their norm is known.

    Raises:
        ValueError: a residual or preconditioner that uses them before.
    """
    if not group["residual"].rescales:
        raise ValueError(
            f"clip={clip} is refused: residual {group['residual']} adds gradients to a momentum before the "
            f"norm of all of them is known"
        )
    if group["precondition"] != Plain():
        raise ValueError(
            f"clip={clip} is refused: precondition {group['precondition']} uses gradients before the norm of "
            f"all of them is known"
        )
