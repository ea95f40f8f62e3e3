"""The engine: one optimizer, seven steps."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from . import diagnostics as error_control
from . import gradients
from . import rounding as rounds
from . import state as slots
from .backward import InBackward
from .batches import Batch, copy_into, sorted_out
from .cadence import Cadence, Every
from .codecs import Codec, Full
from .finders import Finder, Memory, Power
from .frames import Frame, Layout, Modes
from .frames.base import Rank, Side
from .groups import check_options, params_of
from .linalg import asks_host, trouble
from .precondition import Plain, Precondition
from .ranks import Fixed, Policy
from .ranks import budget as budgets
from .ranks.assignment import settled
from .ranks.reading import leading, read
from .residual import Discard, Residual
from .resume import WHOLE, Resume
from .rounding import Rounding
from .rules import Adam, Rule
from .rules.adam import FIRST, SECOND
from .rules.turn import compiled, turned
from .steps import Now, Unit, absorb, apply
from .transport import Rotate, Transport
from .validate import check_choice, check_float, check_int, names_unknown, plain
from .views import Heads, ViewName
from .weights import DeferringLinear, codes_of

_CAPTURABLE = ("cuda", "xpu", "hpu", "privateuseone")
"""Devices on which torch's AdamW can leave its step count."""


class LowRankOptimizer(InBackward):
    """Adam-like optimization in a frame that follows the gradient, with state that is carried along.

    One step of a projected parameter p with gradient g, frame F (old) and F' (new):

    1. see the gradient as it is best seen, and precondition it;
    2. g~ = g + e, what the residual part kept;
    3. when due: F' from rho F m/c1 + (1 - rho) g~, and the moments carried from F to F';
    4. z = F'^H g~; the residual part keeps what is lost;
    5. the rule turns z into a direction d in the core;
    6. lift: F' d, scaled; the residual part adds what it wants from outside the frame;
    7. p <- (1 - lr weight_decay) p - lr scale F' d.

    Steps 1-4 are :meth:`absorb`, 5-7 :meth:`apply`. Dense real parameters are stepped by torch's own AdamW, bit for
    bit; dense complex ones by Adam in a whole frame, with |g|^2 as second moment, and so are dense bfloat16 ones that
    are rounded stochastically. At rank 1.0 a group whose rule,
    preconditioner or codec of moments is another than Adam's has whole frames instead, for parameters of two modes or
    more: that is how full-rank methods are composed.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either; see :func:`comoving.param_groups`. With names,
            embeddings, output heads, norms and biases stay dense; without, the shape alone decides.
        lr: learning rate >= 0.
        rank: an int, a float in (0, 1], or a tuple with an entry per mode; see :meth:`comoving.frames.Modes.ranks`.
        betas: decay rates in [0, 1).
        eps: >= 0, added to the root of the second moment after bias correction.
        weight_decay: >= 0, decoupled.
        side: "auto", "left", "right" or "both", for matrices.
        view: "tensor", "matrix", "pairs" or heads; see :class:`comoving.views.View`.
        frame, finder, cadence, precondition, transport, rule, residual: the parts.
        codec: stores the residual's buffer; "auto" is 8 bits, or what a budget assigns each projected parameter.
        moments: a codec too, of the rule's moments and covariances; "auto" likewise, and full precision at rank 1.0.
        bases: a codec, of the factors of :class:`comoving.frames.Modes` and :class:`comoving.frames.SparseModes`.
            What is decoded is made orthonormal again, and in use from the refresh on that stores it.
        ranks: when ranks change: a policy of :mod:`comoving.ranks`, for frames of :class:`comoving.frames.Modes`.
        scale: "match" multiplies the lifted direction by sqrt(full/core), which gives a core of unit RMS an update of
            unit RMS, so that AdamW's learning rate carries over; "0.2-match" by 0.2 times that, or any other number; a
            plain number by itself; "auto" is 0.3-match for matrices and match for tensors, which measured best.
        refresh_every: steps between refreshes of a frame, >= 1, staggered over the parameters; what the cadence starts
            from, and with :class:`comoving.cadence.Every` keeps to.
        maximize: ascend instead.
        amsgrad, foreach, fused: for dense real parameters, as in torch; amsgrad is refused for others, fused for dense
            complex ones.
        diagnostics: measure and bound errors at every step; see :meth:`diagnostics`.
        select: "auto" lets names decide what stays dense, "shape" ignores them.
        reasons: parameter name -> why it stays dense, for those that shall.
        rounding: "nearest" or "stochastic", how updates are rounded into bfloat16 parameters, projected or dense.
            Stochastic rounding is right in the mean, so that updates and weight decay far below the spacing of bfloat16
            survive without a float32 copy of the weights; see :mod:`comoving.rounding`. Dense parameters then have
            moments in float32. Nothing changes for float32 and wider; float16 and complex32 are refused.
        on_nonfinite: "raise" checks all gradients before anything changes, with one host synchronization a step; "skip"
            leaves parameters and state as they were, but for the steps that refreshes are timed by, seeds and other
            numbers on the host, decided on the device, and counts (:attr:`skipped_steps`). Only at a refresh of frames
            that are drawn at every step (:class:`comoving.frames.Seeded`) the flag is read, so that their seed is put
            back, and where slots change their shape. A first step that is skipped leaves random frames until their next
            refresh, but on the CPU, where it leaves nothing.
        seed: of the random directions that a first frame may start from, and of stochastic rounding.
        budget: what the state of all projected parameters together never exceeds: an int of bytes; "400MB", "1.5 GiB"
            (see :data:`comoving.units.UNITS`); a float in (0, 1] or "25%", that share of the float32 state that torch's
            AdamW would keep for the projected parameters (two numbers an entry, complex ones for complex entries). A
            share follows the parameters when groups are added. See :mod:`comoving.ranks.assignment` for what is chosen
            at construction, :mod:`comoving.ranks.budget` for what adaptive ranks change later. None for no limit.

    Every argument but the last three is a default for all groups and can be set in each group.

    Raises:
        ValueError, TypeError: at construction, for anything outside its interval.
        RuntimeError: at a step, for sparse or non-finite gradients.
    """

    @names_unknown
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: Rank = 0.25,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        side: Side = "auto",
        view: ViewName | Heads = "tensor",
        frame: Layout = Modes(),  # noqa: B008  (frozen)
        finder: Finder = Power(),  # noqa: B008
        cadence: Cadence = Every(),  # noqa: B008
        precondition: Precondition = Plain(),  # noqa: B008
        transport: Transport = Rotate(),  # noqa: B008
        rule: Rule = Adam(),  # noqa: B008
        residual: Residual = Discard(),  # noqa: B008
        codec: Codec | Literal["auto"] = Full(),  # noqa: B008
        moments: Codec | Literal["auto"] = Full(),  # noqa: B008
        bases: Codec = Full(),  # noqa: B008
        ranks: Policy = Fixed(),  # noqa: B008
        scale: float | str = "auto",
        refresh_every: int = 1,
        maximize: bool = False,
        amsgrad: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        diagnostics: bool = True,
        select: str = "auto",
        reasons: dict[str, str] | None = None,
        rounding: Rounding = "nearest",
        on_nonfinite: str = "raise",
        seed: int = 0,
        budget: int | float | str | None = None,
    ) -> None:
        seed, budget = plain(seed), plain(budget)
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        check_int("seed", seed, 0)
        defaults = dict(
            lr=lr, rank=rank, betas=betas, eps=eps, weight_decay=weight_decay, side=side, view=view, frame=frame,
            finder=finder, cadence=cadence, precondition=precondition, transport=transport, rule=rule,
            residual=residual, codec=codec, moments=moments, bases=bases, ranks=ranks, scale=scale,
            refresh_every=refresh_every, maximize=maximize, amsgrad=amsgrad, foreach=foreach, fused=fused,
            diagnostics=diagnostics, select=select, reasons=reasons, rounding=rounding,
        )  # fmt: skip
        defaults = {key: plain(value) for key, value in defaults.items()}
        check_options(settled(defaults))
        super().__init__(params_of(params), defaults, on_nonfinite, seed, budget)

    # ------------------------------------------------------------------------------------------------ the seven steps

    def compile(self, **options: Any) -> None:
        """Compile the rule's arithmetic in the core: Adam's, Lion's or momentum's, one graph a shape and dtype.

        Complex cores, which torch generates no code for, are stepped as before. What the host decides, when to refresh
        above all, stays uncompiled, as do decompositions and products: hence a refresh compiles nothing anew.
        ``torch.compile(optimizer.step)`` is allowed and changes nothing.

        Args:
            **options: for :func:`torch.compile`.
        """
        self._compiled = compiled(**options)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step; gradients are left as they are.

        Args:
            closure: evaluates the model anew, with gradients, and returns the loss.

        Where anything else raises in the middle of a step (a part of one's own, memory that runs out), each parameter
        and its state is as it was before, or as it is after the step: those that came before the one that raised, and
        of one with blocks the blocks before it, have been stepped. ``step()`` with the same gradients, which are told
        by their storage and have not been written to since, then goes on with the others, as if nothing had been; with
        other gradients it steps all. Exempt are dense parameters, which torch's AdamW steps together, and whole frames
        under a rule that is ``total`` (:class:`comoving.rules.Lion` and :class:`comoving.rules.Adafactor`), where
        nothing but memory can fail.

        Raises:
            RuntimeError: a sparse gradient; a non-finite one with ``on_nonfinite="raise"``. Nothing has changed then.
            ValueError, TypeError: a parameter that was cast, or a group that was edited, since the optimizer was built,
                other than by what may be, and within its interval. Nothing has changed then either.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with gradients.full_precision():
            if self._window is not None:
                self._finish(self._window)
            else:
                self._step_all()
        return loss

    def _step_all(self) -> None:
        """Every parameter that has a gradient, and was not stepped by it already when the last step failed.

        One that has no gradient, but absorbed some, is stepped by these.
        """
        self._check_structure()
        self._check_closed()
        done, self._resume = self._resume.by_the_same_gradients(), Resume()
        opened: list[Tensor] = []
        try:
            bad = self._inspect_gradients()
            if bad is not None and any(self._changes_shape(p) for p in self._norms) and trouble(bad):
                return  # what has no state of its shape yet could not be put back
            for group in self.param_groups:
                ready = [p for p in group["params"] if p.grad is not None and (p not in done or done[p])]
                opened += [p for p in ready if p not in self.state]
                units = {p: Unit(*self._open(p)) for p in ready}
                self._step_by_rules({p: unit for p, unit in units.items() if not unit.site.plain}, bad, done)
                for p in group["params"]:
                    if p.grad is None and self._holds_core(p):
                        self._step_by_core(p, bad)
                dense = [p for p, unit in units.items() if unit.site.plain]
                for device in {p.device for p in dense}:
                    here = [p for p in dense if p.device == device]
                    with self._undone_if(bad, here):
                        self._step_dense(here, group)
                    done.update(dict.fromkeys(here, WHOLE))
        except BaseException as error:
            self._resume = Resume(done)
            for p in opened:
                if p not in done:
                    self.state.pop(p, None)
            if done:
                error.add_note(
                    f"{len(done)} parameters had been stepped before this was raised; step() with the same gradients "
                    f"goes on with the others."
                )
            raise
        finally:
            self._norms = {}

    def _step_by_rules(
        self, ready: Mapping[Tensor, Unit], bad: Tensor | None, done: dict[Tensor, frozenset[str]]
    ) -> None:
        """All seven steps: alike parameters together, others alone."""
        params, units = [*ready], [*ready.values()]
        together, alone = sorted_out((self._kind(p), unit) for p, unit in ready.items())
        for kind, places in together:
            own = [params[i] for i in places]
            self._step_together(own, self._batches.form(kind, [units[i] for i in places]), bad)
            done.update(dict.fromkeys(own, WHOLE))
        self._batches.part(units[i] for i in alone)
        for i in alone:
            self._step_by_rule(params[i], bad, done)

    def _step_together(self, params: list[Tensor], batch: Batch, bad: Tensor | None) -> None:
        """All seven steps for a batch of whole parameters; where anything raises, they and their states stay."""
        view, unit, now = batch.kind.site.view, batch.unit, self._now(params[0])
        with self._undone_if(bad, params):
            seen = torch.stack([view.see(gradients.usable(p.grad, bad)) for p in params if p.grad is not None])
            seen = seen.neg_() if unit.group["maximize"] else seen
            absorb(unit, seen, torch.stack([self._norms[p] for p in params]), now)
            storages = [view.see_storage(p) for p in params]
            given = [view.see(p) if storage is None else storage for p, storage in zip(params, storages, strict=True)]
            weights = torch.stack(given)
            rows = batch.rows(apply(unit, weights, now))
            own = weights.unbind()
            if any(storage is None for storage in storages):  # "None in" would compare tensors
                own = [self._rounded(p, view.restore(w), [r]) for p, w, r in zip(params, own, rows, strict=True)]
                given = params
            copy_into(given, own)
            for alone, row in zip(batch.units, rows, strict=True):
                slots.commit(alone.state, row)

    def _step_by_rule(self, p: Tensor, bad: Tensor | None, done: dict[Tensor, frozenset[str]]) -> None:
        """All seven steps for one parameter; its blocks that an earlier try has stepped are left out."""
        assert p.grad is not None
        before, written = self._saved(p), set(done.get(p, WHOLE))
        try:
            with self._undone_if(bad, [p]):
                now = self._now(p)
                self._take(p, gradients.usable(p.grad, bad), written, now)
                self._write(p, written, now)
        except BaseException:
            self._put_back(p, before, written)
            if written:
                done[p] = frozenset(written)
            raise
        done[p] = WHOLE
        self._settle()

    def _step_by_core(self, p: Tensor, bad: Tensor | None) -> None:
        """Steps 5-7 for a parameter that has absorbed gradients; a step that is skipped uses them up."""
        before, written = self._saved(p), set[str]()
        try:
            with self._undone_if(bad, [p]):
                self._write(p, written)
        except BaseException:
            self._put_back(p, before, written)
            raise

    @torch.no_grad()
    def absorb(self, p: Tensor, gradient: Tensor) -> None:
        """Steps 1-4 for one parameter that torch's AdamW does not serve: take a gradient into core and feedback.

        Several calls before :meth:`apply`, or :meth:`step`, add up; the frame is refreshed at the first of them only.
        Where anything raises, the parameter's state is as it was.

        Raises:
            RuntimeError: a parameter that torch's AdamW steps.
            ValueError: another optimizer's parameter, or one that was cast; a gradient of another layout, shape or
                dtype.
        """
        self._check_kept(p)
        site = self.sites[p]
        if site.plain:
            raise RuntimeError(f"{site.name} is stepped by torch's AdamW: only step() serves it")
        if gradient.layout is not torch.strided or gradient.shape != p.shape or gradient.dtype is not p.dtype:
            raise ValueError(
                f"the gradient of {site.name} must be dense, {p.dtype} and of shape {tuple(p.shape)}, got "
                f"{gradient.layout}, {gradient.dtype} and {tuple(gradient.shape)}"
            )
        # The caller may clear its gradient before apply().
        held = not site.projected or self.param_groups[self._group_index[p]]["residual"].holds
        with gradients.full_precision():
            before = self._saved(p)
            try:
                self._take(p, gradient.clone() if held else gradient)
            except BaseException:
                self._put_back(p, before)
                raise
            self._settle()

    def _take(self, p: Tensor, gradient: Tensor, but: Collection[str] = (), now: Now | None = None) -> None:
        """Steps 1-4 for one parameter, which may hold on to the gradient until step 7, but for some of its blocks."""
        site, group, state = self._open(p)
        seen = site.view.see(-gradient if group["maximize"] else gradient)  # 1
        now = now or self._now(p)
        if not site.blocks:
            absorb(Unit(site, group, state), seen, self._norms.get(p), now)
            return
        live = self._with_gradient(p, seen, but)
        together, alone = sorted_out((self._kind(p, b), unit) for b, unit, _ in live)
        for kind, places in together:
            batch = self._batches.form(kind, [live[i][1] for i in places])
            absorb(batch.unit, torch.stack([live[i][2] for i in places]), None, now)
            batch.commit()
        self._batches.part(live[i][1] for i in alone)
        for i in alone:
            absorb(live[i][1], live[i][2], None, now)

    @torch.no_grad()
    def apply(self, p: Tensor) -> None:
        """Steps 5-7 for one parameter: turn what was absorbed into an update, and write it.

        Where anything raises before that is written, parameter and state are as they were; of a parameter with blocks
        those that were reached before it have been stepped.

        Raises:
            RuntimeError: nothing was absorbed; experts that saw no token are no reason.
        """
        self._check_kept(p)
        site = self.sites[p]
        if site.plain:
            raise RuntimeError(f"{site.name} is stepped by torch's AdamW: only step() serves it")
        if not site.blocks and "core" not in self.state.get(p, {}):
            raise RuntimeError(f"{site.name} has no gradient to apply: call absorb() first")
        with gradients.full_precision():
            self._write(p, set())

    def _write(self, p: Tensor, written: set[str], now: Now | None = None) -> None:
        """Steps 5-7; the blocks whose weights have been written are added to the set."""
        site, codes = self.sites[p], codes_of(p)
        if isinstance(codes, DeferringLinear):
            return self._write_deferred(p, codes)
        storage = site.view.see_storage(p) if codes is None else None
        weights = storage if storage is not None else site.view.see(p if codes is None else codes.decode())
        now = now or self._now(p)
        if site.blocks:
            states = self._write_blocks(p, weights, now, None if storage is None else written)
        else:
            unit = Unit(*self._open(p))
            states = [(unit.state, apply(unit, weights, now))]
        if storage is None and codes is None:
            p.copy_(self._rounded(p, site.view.restore(weights), [state for _, state in states]))  # once, at the end
        elif codes is not None and states:
            codes.encode(site.view.restore(weights))
        for stored, state in states:
            slots.commit(stored, state)

    def _write_blocks(
        self, p: Tensor, weights: Tensor, now: Now, written: set[str] | None
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Steps 5-7 for the blocks of a parameter, alike ones together: the states that are still to be stored.

        Args:
            p: the parameter.
            weights: its own storage, or a copy, as they are seen; changed.
            now: what the host decided.
            written: takes the numbers of blocks whose weights and states are stored here; None where the weights are a
                copy, which the parameter is still to get.
        """
        ready, states = self._with_core(p, weights), list[tuple[dict[str, Any], dict[str, Any]]]()
        together, alone = sorted_out((self._kind(p, b), unit) for b, unit, _ in ready)
        for kind, places in [*together, *((None, [i]) for i in alone)]:
            units, parts = [ready[i][1] for i in places], [ready[i][2] for i in places]
            if kind is None:
                rows = [apply(units[0], parts[0], now)]
            else:
                batch, stacked = self._batches.form(kind, units), torch.stack(parts)
                rows = batch.rows(apply(batch.unit, stacked, now))
                copy_into(parts, stacked.unbind())
            pairs = zip([unit.state for unit in units], rows, strict=True)
            if written is None:
                states += pairs
                continue
            for stored, row in pairs:
                slots.commit(stored, row)
            written.update(b for i in places if (b := ready[i][0]) is not None)
        return states

    def _write_deferred(self, p: Tensor, codes: DeferringLinear) -> None:
        """Steps 5-7 for a weight whose change is kept beside its codes; a refresh merges it, and moves nothing else."""
        now = self._now(p)
        for _, unit, weights in self._with_core(p, codes.decode()):
            if slots.REFRESHED not in unit.state and codes.change is not None:
                state = apply(unit, weights, now)
                codes.take(weights, 1 - unit.group["lr"] * unit.group["weight_decay"])
                slots.commit(unit.state, state)
                continue
            frame: Any = unit.frame()
            (mode,) = (n for n, u in enumerate(frame.factors) if u is not None)
            before = [x.clone() for x in codes.numbers()]
            try:
                codes.merge(weights, frame.factors[mode], mode == 0)
            except BaseException:
                for x, value in zip(codes.numbers(), before, strict=True):
                    x.copy_(value)
                raise
            unit.state.pop(slots.REFRESHED, None)
            del unit.state["core"]
            unit.state["tick"] += 1

    def _rounded(self, p: Tensor, weights: Tensor, states: list[dict[str, Any]]) -> Tensor:
        """Weights as they are written to a parameter, whose own dtype does the rest."""
        if not (self.sites[p].rounded and states):
            return weights
        seeds = [rounds.advance(state) for state in states]
        return rounds.stochastic_bfloat16(weights, rounds.generator(p.device, seeds))

    def _now(self, p: Tensor) -> Now:
        """What the host decides for a step of this parameter."""
        clips = self._window is not None and self._window.clip is not None
        return Now(self.seed, partial(self._adapt, p), self.refresh_scope, clips, self._compiled or turned)

    def _adapt(self, p: Tensor, unit: Unit, seen: Tensor, memory: Memory) -> tuple[Unit, Frame | None]:
        """Before step 3: the ranks of the new frame, and what is kept of the old one; None for all of it, as it is."""
        site, group, state = unit.site, unit.group, unit.state
        policy: Policy = group["ranks"]
        if not policy.adaptive or group["rule"].momentum not in state:
            return unit, None
        old: Any = unit.frame()
        reading, directions = read(old, seen, state[group["rule"].momentum])
        if reading is not None and old.ranks == site.ranks and state["tick"] > 0:
            opened = self._record(group).opened
            ranks = policy.wanted(reading, site.ranks, site.base, site.view.shape, state["tick"], opened)
            claim = budgets.Claim(site, group, state)
            limit = self.limit()
            if limit is not None:
                others = [q for q, other in self.sites.items() if other.projected and q is not p]
                ranks, gain = budgets.grant(claim, ranks, reading, limit - self._held_by(others))
                if gain > 0:
                    self._releases.append((gain, others))
            prices = budgets.prices(claim, reading, ranks)
            state[slots.VALUE] = torch.tensor(prices, dtype=torch.float64, device="cpu")
            slots.set_ranks(state, ranks)
            site = slots.current(site, group, state)
        self._held.pop(p, None)
        if old.ranks == site.ranks:
            return Unit(site, group, state), None
        parts = group["finder"].parts(site.view.shape, site.ranks, site.view.dtype)
        stale = {name: part for name, part in parts.items() if memory[name].shape != part.shape}
        memory.update(slots.zeros(stale, seen.device, state["step"].device))
        return Unit(site, group, state), leading(old, directions, site.ranks)

    def _settle(self) -> None:
        """Ask others for the ranks that a refresh would have had, now that nothing of it can fail."""
        for gain, others in self._releases:
            budgets.release(gain, {q: self.state.get(q, {}) for q in others}, self._claim)
        self._releases.clear()

    def _changes_shape(self, p: Tensor) -> bool:
        """Whether the next step may give slots of this parameter another shape, or on the CPU their first one.

        Elsewhere the host does not wait to know whether a first step is skipped. What it has made is set back to what
        it begins as, but for the frame, which is one of zeros: random until the next refresh that is due. So do bases
        and roots of rules wait for the step at which they are due again.
        """
        site, units = self.sites[p], self._opened(p)
        if not (site.blocks or asks_host(p) or p in self.state):
            return False
        if not site.projected:
            return not units
        return len(units) < max(1, site.blocks) or any(
            not slots.at_its_ranks(unit.site, unit.group, unit.state) or (unit.group["ranks"].adaptive and unit.due())
            for unit in units
        )

    def _step_dense(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Torch's AdamW on the dense real parameters of a group."""
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        torch_adam(
            params,
            [p.grad for p in params if p.grad is not None],
            [s[FIRST] for s in states],
            [s[SECOND] for s in states],
            [s[slots.SECOND_MAX] for s in states] if group["amsgrad"] else [],
            [s["step"] for s in states],
            foreach=group["foreach"],
            fused=group["fused"],
            capturable=states[0]["step"].device.type in _CAPTURABLE and not group["fused"],
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            decoupled_weight_decay=True,
        )

    # ---------------------------------------------------------------------------------------------- checks and readings

    def _inspect_gradients(self) -> Tensor | None:
        """Refuse bad gradients before anything changes; with "skip", return a flag on the device instead."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients.check_layout(params, self.sites)
        self._norms = gradients.norms(params)
        if not params:
            return None
        bad = gradients.any_nonfinite(self._norms.values())
        if self.on_nonfinite == "skip":
            bad = bad & gradients.any_nonfinite(gradients.sums(params))
            self._count_skipped(bad)
            return bad
        if trouble(bad):
            gradients.refuse_nonfinite(params, self.sites)
        return None

    def report_validation(self, loss: float) -> None:
        """Tell the rank policies of a validation loss; part of the state. See :class:`comoving.ranks.Temperature`.

        Raises:
            TypeError: not a number.
            ValueError: not finite.
        """
        check_float("loss", loss, float("-inf"))
        for group in self.param_groups:
            group[slots.VALIDATION] = tuple(group["ranks"].heard(self._record(group), float(loss)))

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for a non-finite gradient since construction; reads the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Name -> {"captured", "overlap", "defect", "error", "bound"} of each projected parameter.

        The figures are those of :mod:`comoving.diagnostics` after the last step; each parameter's, or block's, are read
        at once. There is no "bound" where the residual has none (:class:`comoving.residual.MomentumBuffer`).
        """
        return {
            unit.site.name: error_control.reading(unit.state[error_control.SLOT], unit.group["residual"])
            for p in self.state
            for unit in self._opened(p)
            if error_control.SLOT in unit.state
        }
