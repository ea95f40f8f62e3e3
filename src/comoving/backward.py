"""Stepping inside the backward pass: a gradient is taken in, and freed, as soon as it is accumulated."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

from . import gradients
from .container import Container, Unit
from .linalg import norm
from .precondition import Plain
from .sites import Site
from .state import CORE, HELD_NORM, REST, RUNNING, SIZE, WINDOW, commit
from .taken import TakenUp, stand_in
from .validate import check_choice, check_float, check_int

_SMALL = 1e-6  # torch's, in clip_grad_norm_


@dataclass
class Window:
    """How gradients are gathered and clipped between two steps, and what has happened since the last one.

    Args:
        accumulate: backward passes in a window.
        clip: largest norm of all gradients together; None for no limit.
        exact: whether that is this window's norm, else the last one's.
        hooks: those on the parameters.
        stepped: parameters that have been stepped since the last step().
        checked: whether groups were looked at since then.
        incomplete: whether a gradient was dropped since then.
        closing: what gradients are multiplied by in the step() that ends the window, once that is known.
        norm: of the last finished window.
    """

    accumulate: int
    clip: float | None
    exact: bool
    hooks: list[RemovableHandle] = field(default_factory=lambda: [])
    stepped: set[Tensor] = field(default_factory=set[Tensor])
    checked: bool = False
    incomplete: bool = False
    closing: float | None = None
    norm: float | None = None

    def factor(self, size: float) -> float:
        """What gradients of this norm are multiplied by."""
        return 1.0 if self.clip is None else min(1.0, self.clip / (size + _SMALL))


class InBackward(Container):
    """The part of an optimizer that steps parameters from hooks on their gradients."""

    _window: Window | None = None

    def step_in_backward(self, accumulate: int = 1, clip: float | None = None, norm: str = "exact") -> None:
        """From now on take up each gradient inside ``backward()``, as soon as it is accumulated, and free it.

        The training loop stays as it is: ``accumulate`` times ``loss.backward()``, then ``step()``, then the
        scheduler's. Gradients are accumulated **in the subspace**: of a projected parameter only the core and what the
        residual keeps are held (a frame stays as it is during the window), so at no time is there more than one
        parameter's full gradient; of a dense one, and where the residual needs the whole gradient (Fira, Channel,
        Sign), the sum itself. Divide the loss by ``accumulate`` where the mean is meant, as ever.
        Until ``step()`` ``p.grad`` holds a :class:`comoving.taken.TakenUp`, a tensor without numbers: what would read
        gradients there, such as ``clip_grad_norm_``, raises instead of finding none.

        Without ``clip``, or with ``norm="running"``, a parameter is stepped inside the last backward pass of the
        window, and ``step()`` steps only those that got fewer gradients. With ``norm="exact"`` all are stepped in
        ``step()``: cores wait, and full gradients do not.

        Args:
            accumulate: backward passes in a window, >= 1.
            clip: largest norm > 0 of all gradients of a window together, those that are fed back included: as
                F is orthonormal, |g~|^2 = |z|^2 + |g~ - F z|^2 needs no full gradient, and core and rest are multiplied
                by the same factor min(1, clip / (norm + 1e-6)). Exact for one gradient, and with error feedback; of
                several gradients whose rest is dropped, the sum of the rests' norms is taken. Frames are searched
                before the norm is known, in gradients as they are. None for no limit.
            norm: "exact" for the norm of this window; "running" for that of the last one that had gradients (the first
                is not clipped), by which core and rest are multiplied just so. Where non-finite gradients were dropped
                the norm does not fall.

        Raises:
            ValueError: a value outside its interval; a residual or preconditioner that cannot be clipped so; several
                processes, whose gradients would not be averaged yet.
            RuntimeError: a gradient is there already, or this was called before. Later, inside ``backward()``: a
                sparse or non-finite gradient (parameters that were reached before it have been stepped, but with exact
                clipping; with ``on_nonfinite="skip"`` it alone is dropped), or more gradients than the window has.
        """
        check_int("accumulate", accumulate, 1)
        check_choice("norm", norm, ("exact", "running"))
        if clip is not None:
            check_float("clip", clip, 0.0, open_low=True)
        if self._window is not None:
            raise RuntimeError("already stepping in the backward pass; call step_after_backward() first")
        self._check_hooks(clip)
        self._window = Window(accumulate, clip, norm == "exact")
        if clip is not None and norm == "running":
            for group in self.param_groups:
                group.setdefault(RUNNING, 0.0)  # saved from the beginning
        self._hook_into(self.sites)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`Container.add_param_group`; while stepping in the backward pass the new parameters are, too."""
        if self._window is not None and self._window.clip is not None:
            self._check_clip(self._window.clip, self.defaults | param_group)
        known = set(self.sites)
        super().add_param_group(param_group)
        if self._window is not None:
            if RUNNING in self.param_groups[0]:
                self.param_groups[-1][RUNNING] = self.param_groups[0][RUNNING]
            self._hook_into(p for p in self.sites if p not in known)

    def _hook_into(self, params: Iterable[Tensor]) -> None:
        assert self._window is not None
        for p in params:
            if p.requires_grad:
                self._window.hooks.append(p.register_hook(unserializable_hook(partial(_clear, p))))
                self._window.hooks.append(p.register_post_accumulate_grad_hook(self._hook))

    def step_after_backward(self) -> None:
        """Undo :meth:`step_in_backward`.

        Raises:
            RuntimeError: in the middle of a window.
        """
        if self._window is None:
            return
        if any(True for _ in self._pending()):
            raise RuntimeError("a window is open, with gradients that are not in any p.grad: call step() first")
        for hook in self._window.hooks:
            hook.remove()
        self._window = None
        self._clear_gradients()

    @property
    def gradient_norm(self) -> float | None:
        """The norm of the last finished window before clipping; None without clipping, and before the first."""
        return None if self._window is None else self._window.norm

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler.step() first of all.

        Raises:
            RuntimeError: while stepping in the backward pass.
        """
        if self._window is not None:
            raise RuntimeError(
                "GradScaler is refused while stepping in the backward pass: it would unscale gradients, and look for "
                "infinities, after they have been used. Train in bfloat16, which needs no scaling"
            )
        return False

    # ------------------------------------------------------------------------------------------------- what steps

    @abstractmethod
    def _write(self, p: Tensor, written: set[str]) -> None:
        """Steps 5-7 for one parameter that torch's AdamW does not serve, with the blocks of it that were written."""

    @abstractmethod
    def _take(self, p: Tensor, gradient: Tensor, but: Collection[str] = ()) -> None:
        """Steps 1-4 for one parameter that torch's AdamW does not serve, but for some of its blocks."""

    @abstractmethod
    def _settle(self) -> None:
        """What follows from steps 1-4 for other parameters, once they cannot fail any more."""

    @abstractmethod
    def _step_dense(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Torch's AdamW."""

    # ------------------------------------------------------------------------------------------------------ the window

    def _hook(self, p: Tensor) -> None:
        """Take up a gradient; step the parameter where the window is full and nothing has to be waited for."""
        window = self._window
        assert window is not None
        with torch.no_grad(), gradients.full_precision():
            count = self._take_up(p, window)
            if count == window.accumulate and (window.clip is None or not window.exact):
                self._step_one(p, window.factor(self.param_groups[0].get(RUNNING, 0.0)))
                window.stepped.add(p)
        p.grad = stand_in(p, self.sites[p].name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a window of :meth:`step_in_backward` is not emptied."""
        self._clear_gradients()
        super().zero_grad(set_to_none)

    def _clear_gradients(self) -> None:
        for p in self.sites:
            _clear(p)

    def _take_up(self, p: Tensor, window: Window) -> int:
        """Take up a gradient; how many the window has of this parameter then, and 0 for one that is dropped."""
        site, gradient = self.sites[p], p.grad
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
            self._check_structure()
            window.checked = True
        gradients.check_layout([p], self.sites)
        p.grad = None
        if not self._finite(gradient, site.name, window):
            window.incomplete = True
            return 0
        before = self._saved(p)
        try:
            if site.plain:
                _, _, state = self._open(p)
                state[CORE] = state[CORE].add_(gradient) if CORE in state else gradient
            else:
                self._take(p, gradient)
        except BaseException:
            self._put_back(p, before)
            raise
        self._settle()
        count = 1 + max((unit.state.get(WINDOW, 0) for unit in self._opened(p)), default=0)
        for unit in self._with_gradients(p):
            unit.state[WINDOW] = count
        return count

    def _finish(self, window: Window) -> None:
        """End of a window: step whatever has a gradient and was not stepped inside the backward pass."""
        self._check_structure()
        for p in self.sites:
            given = p.grad
            if given is not None and not isinstance(given, TakenUp):  # set by hand
                try:
                    self._take_up(p, window)
                except BaseException:
                    p.grad = given
                    raise
        if window.closing is None:  # else an earlier try has stepped some, and what is left has another norm
            window.closing = window.factor(self.param_groups[0].get(RUNNING, 0.0))
            if window.clip is not None and window.exact:
                window.norm = self._total({unit.site.name: self._size(unit) for unit in self._all_with_gradients()})
                window.closing = window.factor(window.norm)
        for p in list(self._pending()):
            self._step_one(p, window.closing)
        if window.clip is not None and not window.exact:
            units = [unit for p in self.sites for unit in self._opened(p)]
            sizes = {unit.site.name: unit.state.pop(SIZE) for unit in units if SIZE in unit.state}
            window.norm = self._total(sizes)
            # What was dropped may have been the largest, and an overflow would stop all that follow.
            last = self.param_groups[0].get(RUNNING, 0.0) if window.incomplete or not sizes else 0.0
            for group in self.param_groups if isfinite(window.norm) else ():
                group[RUNNING] = max(last, window.norm)
        if window.incomplete:
            self._count_skipped()
        window.stepped.clear()
        window.checked = window.incomplete = False
        window.closing = None
        self._clear_gradients()

    def _step_one(self, p: Tensor, factor: float) -> None:
        """Step a parameter by its gradients of this window, multiplied by this; where that fails it is as it was."""
        before, written = self._saved(p), set[str]()
        try:
            self._step_scaled(p, factor, written)
        except BaseException:
            self._put_back(p, before, written)
            raise

    def _step_scaled(self, p: Tensor, factor: float, written: set[str]) -> None:
        window, site = self._window, self.sites[p]
        assert window is not None
        for unit in self._with_gradients(p) if window.clip is not None and not window.exact else ():
            unit.state[SIZE] = self._size(unit)
        if factor < 1:
            self._rescale(p, factor)
        for unit in self._with_gradients(p):
            del unit.state[WINDOW]
            unit.state.pop(REST, None)
        if not site.plain:
            self._write(p, written)
            return
        p.grad = self.state[p].pop(CORE)
        try:
            self._step_dense([p], self.param_groups[self._group_index[p]])
        finally:
            p.grad = None

    def _with_gradients(self, p: Tensor) -> list[Unit]:
        return [unit for unit in self._opened(p) if CORE in unit.state]

    def _all_with_gradients(self) -> Iterator[Unit]:
        return (unit for p in self.sites for unit in self._with_gradients(p))

    def _pending(self) -> Iterator[Tensor]:
        return (p for p in self.sites if self._with_gradients(p))

    def _finite(self, gradient: Tensor, name: str, window: Window) -> bool:
        """Whether a gradient is; one host synchronization."""
        if bool(norm(gradient).isfinite()) or bool(gradient.isfinite().all()):  # a norm may overflow
            return True
        if self.on_nonfinite == "skip":
            return False
        done = f"{len(window.stepped)} parameters have been stepped in this window before it" if window.stepped else ""
        raise RuntimeError(
            f"non-finite gradient in {name}: {done or 'nothing was stepped'}. Look for a diverging loss, or pass "
            f'on_nonfinite="skip" to drop such gradients'
        )

    # -------------------------------------------------------------------------------------------------------- clipping

    @staticmethod
    def _total(sizes: Mapping[str, Tensor]) -> float:
        """The norm of all, by one reading of the device."""
        if not sizes:
            return 0.0
        first = next(iter(sizes.values()))
        return float(norm(torch.stack([size.to(first.device, torch.float32) for size in sizes.values()])))

    @staticmethod
    def _size(unit: Unit) -> Tensor:
        """The norm of a unit's gradients of this window, with what was fed back."""
        core = unit.state[CORE]
        if not unit.site.projected:
            return norm(core)
        if REST not in unit.state:
            raise RuntimeError(
                f"{unit.site.name} has gradients of a window that began without clip, and no norm of them"
            )
        return unit.group["residual"].size(core, unit.state[REST], unit.state)

    def _rescale(self, p: Tensor, factor: float) -> None:
        """Multiply a parameter's gradients of this window, core and rest alike."""
        for unit in self._with_gradients(p):
            working = unit.unpacked()
            if unit.site.projected:
                residual, core = unit.group["residual"], working.state[CORE]
                residual.rescale(factor, core, working.standing(), working.state, unit.group["codec"])
            working.state[CORE] = working.state[CORE] * factor
            working.state.pop(HELD_NORM, None)
            commit(unit.state, working.packed(unit.state, moved=False))

    # --------------------------------------------------------------------------------------------------------- refusals

    def _check_hooks(self, clip: float | None) -> None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ValueError(
                f"step_in_backward() is refused with {distributed.get_world_size()} processes: gradients reach the "
                f"hooks before they are averaged over them"
            )
        full = [site.name for p, site in self.sites.items() if p.grad is not None and not isinstance(p.grad, TakenUp)]
        if full:
            raise RuntimeError(f"{', '.join(full[:5])} has a gradient already: call step() or zero_grad() first")
        for group in self.param_groups if clip is not None else ():
            self._check_clip(clip, group)

    @staticmethod
    def _check_clip(clip: float | None, group: Mapping[str, Any]) -> None:
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

    def _check_closed(self) -> None:
        """Raise for gradients that a window has taken up and only stepping in the backward pass would finish."""
        open_ = [site.name for p, site in self.sites.items() if self._in_window(self.state.get(p, {}), site)]
        if open_:
            raise RuntimeError(
                f"{', '.join(open_[:5])}: the state was saved in the middle of a window of step_in_backward(), which "
                f"has to be called before this step, or its gradients would be lost"
            )

    @staticmethod
    def _in_window(state: Mapping[str, Any], site: Site) -> bool:
        return any(WINDOW in block for block in state.values()) if site.blocks else WINDOW in state

    # --------------------------------------------------------------------------------------------------------- copies

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a deep copy takes along: the window too, but for the hooks."""
        window = None if self._window is None else replace(self._window, hooks=[])
        return super().__getstate__() | {"window": window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a deep copy, with hooks on its own parameters, or take over loaded groups."""
        copied, window = "window" in state, state.get("window")
        super().__setstate__({key: value for key, value in state.items() if key != "window"})
        if copied and window is not None:
            self._window = window
            self._hook_into(self.sites)


def _clear(p: Tensor, _: Tensor | None = None) -> None:
    """Take away what stands for a gradient, as before the next one is accumulated."""
    if isinstance(p.grad, TakenUp):
        p.grad = None
