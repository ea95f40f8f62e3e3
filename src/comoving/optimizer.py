"""The optimizer: what is built, stepped, saved and loaded."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar, overload
from weakref import proxy

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import diagnostics as error_control
from . import state as slots
from .cadence import Cadence, Every
from .codecs import Codec, Full
from .contents import Contents
from .decay import Decay
from .drivers import Backward, Driver, Guard, Whole
from .drivers.backward import Window, check_clip, check_hooks
from .drivers.graphs import CudaRecorder, Graphs
from .engine import Engine
from .finders import Finder, Power
from .frames import Layout, Modes
from .frames.base import Rank, Side
from .groups import check_options, joining, params_of
from .precision import full_precision
from .precondition import Plain, Precondition
from .ranks import Fixed, Policy
from .ranks.assignment import ROLES, settled
from .ranks.limit import parse_budget
from .residual import Discard, Residual
from .roster import Roster
from .rounding import Rounding
from .rules import Adam, Rule
from .rules.turn import compiled
from .sites import Site
from .transport import Rotate, Transport
from .validate import check_choice, check_float, check_int, names_unknown, plain
from .views import Heads, ViewName

_Driver = TypeVar("_Driver", bound=Driver)


class LowRankOptimizer(Optimizer):
    """Adam-like optimization in a frame that follows the gradient, with state that is carried along.

    One step of a projected parameter p with gradient g, frame F (old) and F' (new):

    1. see the gradient as it is best seen, and precondition it;
    2. g~ = g + e, what the residual part kept;
    3. when due: F' from rho F m/c1 + (1 - rho) g~, and the moments carried from F to F';
    4. z = F'^H g~; the residual part keeps what is lost;
    5. the rule turns z into a direction d in the core;
    6. lift: F' d, scaled; the residual part adds what it wants from outside the frame;
    7. p <- (1 - lr weight_decay) p - lr rate scale F' d.

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
        select: "auto" lets names decide what stays dense; "shape" ignores them; with "all" nothing stays dense: what no
            frame compresses, vectors and single numbers too, is stepped by the group's rule in the whole frame.
        reasons: parameter name -> why it stays dense, for those that shall.
        roles: parameter name -> its role (:mod:`comoving.roles`); names and shapes say that of others.
        rate: factor > 0 of the learning rate, but not of the weight decay lr weight_decay: what a role's rate is made
            of, so that one schedule of ``lr`` serves all groups.
        rounding: "nearest" or "stochastic", how updates are rounded into bfloat16 parameters, projected or dense.
            Stochastic rounding is right in the mean, so that updates and weight decay far below the spacing of bfloat16
            survive without a float32 copy of the weights; see :mod:`comoving.rounding`. Dense parameters then have
            moments in float32. Nothing changes for float32 and wider; float16 and complex32 are refused.
        decay: "all", or "cautious": only entries decay that the update moves toward zero, or not at all (arXiv
            2510.12402), dense ones too. It takes a copy of the weights of what is stepped together.
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
        roles: dict[str, str] | None = None,
        rate: float = 1.0,
        rounding: Rounding = "nearest",
        decay: Decay = "all",
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
            diagnostics=diagnostics, select=select, reasons=reasons, roles=roles, rate=rate,
            rounding=rounding, decay=decay,
        )  # fmt: skip
        defaults = {key: plain(value) for key, value in defaults.items()}
        check_options(settled(defaults))
        self.on_nonfinite, self.seed, self.budget = on_nonfinite, seed, parse_budget(budget)
        self._begin()
        self._complete = False  # the budget is shared out once, over all groups
        super().__init__(params_of(params), defaults)
        self._complete = True
        self.roster.sites |= self.roster.assigned(self.sites, self.roster.group_of)
        self.engine.forget()

    def _begin(self) -> None:
        """What is made anew of a copy too."""
        me: LowRankOptimizer = proxy(self)  # a cycle would keep state alive until the collector comes
        self.roster = Roster(me, self.budget, lambda: me.engine.forget())  # noqa: PLW0108  (there is none so far)
        self.engine = Engine(me, self.roster, self.seed)
        self._contents = Contents(me, self.roster, self.engine)
        self._guard = Guard(self.engine, self.on_nonfinite)
        self._whole, self._backward = Whole(self.engine, self._guard), None
        self._complete = True
        self._agreed: set[Tensor] = set()

    _backward: Backward | None
    _stepped = False
    _driver: Driver | None = None
    """What brings gradients in place of ``p.grad``; see :meth:`driven_by`."""

    @property
    def sites(self) -> dict[Tensor, Site]:
        """What was decided about each parameter; see :func:`comoving.explain`."""
        return self.roster.sites

    @property
    def stacked_entries(self) -> int:
        """Up to how many entries a parameter, or a block of one, is stepped together with those like it; 0 for none.

        Not part of the state; see :mod:`comoving.batches`.
        """
        return self.engine.stacked_entries

    @stacked_entries.setter
    def stacked_entries(self, entries: int) -> None:
        check_int("stacked_entries", entries, 0)
        self.engine.stacked_entries = entries

    @property
    def refresh_scope(self) -> Callable[[], AbstractContextManager[Any]]:
        """Called at each refresh for a context to run it in: a timer or profiler range. Not part of the state.

        Where frames are searched ahead (:class:`comoving.finders.Delayed`) also at the beginning of each search.
        """
        return self.engine.refresh_scope

    @refresh_scope.setter
    def refresh_scope(self, scope: Callable[[], AbstractContextManager[Any]]) -> None:
        self.engine.refresh_scope = scope

    # ------------------------------------------------------------------------------------------------------- stepping

    def compile(self, **options: Any) -> None:
        """Compile the rule's arithmetic in the core: Adam's, Lion's or momentum's, one graph a shape and dtype.

        Complex cores, which torch generates no code for, are stepped as before. What the host decides, when to refresh
        above all, stays uncompiled, as do decompositions and products: hence a refresh compiles nothing anew.
        ``torch.compile(optimizer.step)`` is allowed and changes nothing.

        Args:
            **options: for :func:`torch.compile`.
        """
        self.engine.turn = compiled(**options)

    def capture(self) -> None:
        """From now on replay steps between refreshes as CUDA graphs, one launch for a batch or a large parameter.

        The training loop stays as it is. A step with a refresh is made as ever, and so is every step of what draws
        random numbers, decomposes at every step, or keeps weights in codes (:attr:`comoving.kind.Kind.replays`), of the
        blocks of experts and heads, and with ``on_nonfinite="skip"`` of large parameters. Dense parameters are stepped
        by torch's AdamW, as before; give it ``fused=True``. What a graph reads must stay where it is: call
        ``zero_grad(set_to_none=False)``, so that gradients of large parameters do (those of stacked ones are copied);
        where one has moved, its graph is recorded anew, and where one moves at every step, none is. Learning rates may
        change at every step; other rates make a new recording. Nothing is replayed while stepping in the backward pass,
        and a copy of the optimizer has to be captured itself. Where a recording fails, the step raises, with nothing
        changed of what was recorded; from then on that is stepped as before.

        Raises:
            RuntimeError: no parameter is on a CUDA device.
        """
        self._check_undriven("capture()")
        if not any(p.is_cuda for p in self.sites):
            raise RuntimeError("capture() records CUDA graphs: move the model to a CUDA device first")
        self.engine.replays = Graphs(self.engine, CudaRecorder())

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
        self._agree()
        self._stepped = True
        with full_precision():
            if self._driver is not None:
                self._driver.step()
            elif self._backward is not None:
                self._backward.finish()
            else:
                self._whole.step()
        return loss

    def _agree(self) -> None:
        """Compare this optimizer, once, with those of the processes that share parameters."""
        if self.roster.placements.keys() == self._agreed:
            return
        from .distributed.agreement import agree  # noqa: PLC0415  (torch's processes take their time)

        for group in self.roster.comms:
            if group is not None:
                agree(self, group)
        self._agreed = {*self.roster.placements}

    @torch.no_grad()
    def absorb(self, p: Tensor, gradient: Tensor) -> None:
        """Steps 1-4 for one parameter that torch's AdamW does not serve: take a gradient into core and feedback.

        Several calls before :meth:`apply`, or :meth:`step`, add up; the frame is refreshed at the first of them only.
        Where anything raises, the parameter's state is as it was.

        Raises:
            RuntimeError: a parameter that torch's AdamW steps, or one process for all that share it.
            ValueError: another optimizer's parameter, or one that was cast; a gradient of another layout, shape, dtype
                or placement.
        """
        site = self._served(p)
        if gradient.layout is not torch.strided or gradient.shape != p.shape or gradient.dtype is not p.dtype:
            raise ValueError(
                f"the gradient of {site.name} must be dense, {p.dtype} and of shape {tuple(p.shape)}, got "
                f"{gradient.layout}, {gradient.dtype} and {tuple(gradient.shape)}"
            )
        gradient = self.roster.part_here(p, gradient)
        # The caller may clear its gradient before apply().
        copied = not site.projected or self.roster.group_of(p)["residual"].holds
        with full_precision():
            self.engine.take(p, gradient.clone() if copied else gradient)

    @torch.no_grad()
    def apply(self, p: Tensor) -> None:
        """Steps 5-7 for one parameter: turn what was absorbed into an update, and write it.

        Where anything raises before that is written, parameter and state are as they were; of a parameter with blocks
        those that were reached before it have been stepped.

        Raises:
            RuntimeError: nothing was absorbed; experts that saw no token are no reason.
        """
        site = self._served(p)
        if not site.blocks and not self.engine.waiting(p):
            raise RuntimeError(f"{site.name} has no gradient to apply: call absorb() first")
        with full_precision():
            self.engine.write(p)

    def _served(self, p: Tensor) -> Site:
        self.roster.check_kept(p)
        self.roster.check_edits()
        site = self.sites[p]
        if site.plain:
            raise RuntimeError(f"{site.name} is stepped by torch's AdamW: only step() serves it")
        if site.owner is not None:
            raise RuntimeError(f"{site.name} is stepped by one process for all that share it: only step() serves it")
        return site

    # ----------------------------------------------------------------------------------------------- the backward pass

    def step_in_backward(
        self, accumulate: int = 1, clip: float | None = None, norm: str = "exact", model: torch.nn.Module | None = None
    ) -> None:
        """From now on take up each gradient inside ``backward()``, as soon as it is accumulated, and free it.

        The training loop stays as it is: ``accumulate`` times ``loss.backward()``, then ``step()``, then the
        scheduler's. Gradients are accumulated **in the subspace**: of a projected parameter only the core and what the
        residual keeps are stored (a frame stays as it is during the window), so at no time is there more than one
        parameter's full gradient; of a dense one, and where the residual needs the whole gradient (Fira, Channel,
        Sign), the sum itself. Divide the loss by ``accumulate`` where the mean is meant, as ever.
        Until ``step()`` ``p.grad`` holds a :class:`comoving.drivers.taken.TakenUp`, a tensor without numbers: what
        would read gradients there, such as ``clip_grad_norm_``, raises instead of finding none.

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
            model: the DistributedDataParallel that averages the gradients over processes; they are taken up at the end
                of the backward pass then, once that is done. The model gets a communication hook. None for one
                process, and for sharded parameters.

        Raises:
            ValueError: a value outside its interval; a residual or preconditioner that cannot be clipped so; several
                processes, whose gradients would not be averaged yet, or a model that does not average them all.
            TypeError: a model that is no DistributedDataParallel.
            RuntimeError: a gradient is there already, or this was called before. Later, inside ``backward()``: a
                sparse or non-finite gradient (parameters that were reached before it have been stepped, but with exact
                clipping; with ``on_nonfinite="skip"`` it alone is dropped), or more gradients than the window has.
        """
        check_int("accumulate", accumulate, 1)
        check_choice("norm", norm, ("exact", "running"))
        if clip is not None:
            check_float("clip", clip, 0.0, open_low=True)
        self._check_undriven("step_in_backward()")
        if self._backward is not None:
            raise RuntimeError("already stepping in the backward pass; call step_after_backward() first")
        check_hooks(self.engine, clip, model is not None)
        self._agree()
        window = Window(accumulate, clip, norm == "exact")
        if model is not None:
            from .distributed.averaging import averaging, take_averaged  # noqa: PLC0415  (it imports this)

            ddp = averaging(model, self.sites)
            self._backward = Backward(self, self._guard, window, averaged=True)
            take_averaged(ddp, self._backward)
        else:
            self._backward = Backward(self, self._guard, window)
        self._backward.begin_running()

    def step_after_backward(self) -> None:
        """Undo :meth:`step_in_backward`.

        Raises:
            RuntimeError: in the middle of a window.
        """
        if self._backward is not None:
            self._backward.remove()
            self._backward = None

    @property
    def steps_in_backward(self) -> bool:
        """Whether gradients are taken up inside the backward pass."""
        return self._backward is not None

    @property
    def gradient_norm(self) -> float | None:
        """The norm of the last finished window before clipping; None without clipping, and before the first."""
        return None if self._backward is None else self._backward.window.norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a window of :meth:`step_in_backward` is not emptied, what another driver has taken up is left."""
        if self._driver is not None:
            self._driver.drop()
        if self._backward is not None:
            self._backward.clear()
        super().zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler.step() first of all.

        Raises:
            RuntimeError: while stepping in the backward pass.
        """
        self._check_undriven("GradScaler")
        if self._backward is not None:
            raise RuntimeError(
                "GradScaler is refused while stepping in the backward pass: it would unscale gradients, and look for "
                "infinities, after they have been used. Train in bfloat16, which needs no scaling"
            )
        return False

    # --------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, or (name, parameter) pairs, with hyper-parameters of their own.

        While stepping in the backward pass the new parameters are stepped there, too.

        Raises:
            ValueError: an empty group, a duplicate parameter, or a hyper-parameter that does not fit.
            TypeError: an unknown hyper-parameter.
        """
        self._check_undriven("add_param_group()")
        if self._backward is not None and self._backward.averaged:
            raise RuntimeError(
                "add_param_group() is refused after step_in_backward(model=...), which averages no other parameters' "
                "gradients: build the model and the optimizer anew"
            )
        pairs, given = joining(param_group, self.defaults, self.sites)
        if self._backward is not None and self._backward.window.clip is not None:
            check_clip(self._backward.window.clip, self.defaults | given)
        group = settled(self.defaults | given)
        check_options(group)
        params, sites = [p for _, p in pairs], self.roster.decided(pairs, self.defaults | given, group)
        if self._complete:
            sites = self.roster.join(params, sites, group)
        own = {role: group[role] for role in ROLES}
        super().add_param_group({**given, **own, "params": pairs if pairs[0][0] is not None else params})
        self.roster.place(params, sites, len(self.param_groups) - 1)
        if self._backward is not None:
            self._backward.begin_running()
            self._backward.hook_into(params)

    def remove_param_group(self, index: int) -> None:
        """Take a group away again, with the state of its parameters; those of later groups move up by one.

        Raises:
            IndexError: there is no such group.
        """
        self._check_undriven("remove_param_group()")
        params = self.param_groups.pop(index)["params"]
        for p in params:
            self.state.pop(p, None)
        self.roster.remove(params, index)
        if self._backward is not None:
            self._backward.leave(params)

    def driven_by(self, make: Callable[[Guard], _Driver]) -> _Driver:
        """From now on ``step()`` is that of a driver which brings gradients of its own; a copy has none.

        Args:
            make: the driver, from what counts skipped steps.

        Raises:
            RuntimeError: there is one already, or gradients are taken up in the backward pass, or steps replayed.
        """
        self.check_undriven("another driver")
        self._driver = driver = make(self._guard)
        return driver

    def check_undriven(self, what: str) -> None:
        """Raise if gradients come otherwise than by ``p.grad``.

        Args:
            what: does not go with that.

        Raises:
            RuntimeError: they are taken up in the backward pass, replayed, or those of another driver.
        """
        self._check_undriven(what)
        if self._backward is not None:
            raise RuntimeError(f"{what} is refused after step_in_backward(): call step_after_backward() first")
        if self.engine.replays is not None:
            raise RuntimeError(f"{what} is refused after capture(): build the optimizer anew")

    def _check_undriven(self, what: str) -> None:
        if self._driver is not None:
            raise RuntimeError(f"{what} is refused: gradients are those of {self._driver}, which takes no others")

    def _check_settled(self) -> None:
        if self._driver is not None and self._driver.waiting:
            raise RuntimeError(
                "gradients of the last backward pass wait for the step, and no state holds them: call step() first, or "
                "zero_grad() to drop them"
            )

    def limit(self) -> int | None:
        """The bytes that the budget allows the state of the projected parameters that are here; None without one."""
        return self.roster.limit()

    def report_validation(self, loss: float) -> None:
        """Tell the rank policies of a validation loss; part of the state. See :class:`comoving.ranks.Temperature`.

        Raises:
            TypeError: not a number.
            ValueError: not finite.
        """
        check_float("loss", loss, float("-inf"))
        for group in self.param_groups:
            group[slots.VALIDATION] = tuple(group["ranks"].heard(self.roster.record(group), float(loss)))

    # ------------------------------------------------------------------------------------------------------- readings

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for a non-finite gradient since construction; reads the device."""
        return 0 if self._guard.skipped is None else int(self._guard.skipped)

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Name -> {"captured", "overlap", "defect", "error", "bound"} of each projected parameter.

        The figures are those of :mod:`comoving.diagnostics` after the last step; each parameter's, or block's, are read
        at once. There is no "bound" where the residual has none (:class:`comoving.residual.MomentumBuffer`).
        """
        return {
            row.site.name: error_control.reading(row.state[error_control.SLOT], row.kind.parts.residual)
            for p in self.state
            for row in self.engine.rows_of(p)
            if error_control.SLOT in row.state
        }

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain data, parts as names and fields: loads with ``weights_only=True``.

        Later steps change nothing of it but the tensors of dense parameters, which are torch's AdamW's own.

        Raises:
            RuntimeError: another driver has taken up gradients, and waits for the step.
        """
        if self._backward is not None and self._backward.window.held:
            raise RuntimeError(
                "state_dict() is refused in the middle of a window of step_in_backward(): the gradients of parameters "
                "that one process steps for all are in no state. Call step() first"
            )
        self._check_settled()
        self.engine.searches.settle()
        return self._contents.packed(super().state_dict(), self._driver, self._stepped or bool(self.state))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, of this recipe at any rank, or of torch's AdamW. Dtypes stay as saved.

        Learning rate, decay rates and the like are taken from the checkpoint; what makes the recipe must agree. Moments
        of other ranks, and AdamW's, are carried into this optimizer's frames at the next step.

        Raises:
            ValueError: a checkpoint of another recipe, other groups or other shapes, or no optimizer's; nothing has
                changed then.
        """
        self._check_settled()
        self.engine.searches.settle()
        admitted, groups, found = self._contents.admitted(state_dict, self._driver)
        packed = super().state_dict()["param_groups"]
        packed = [group | {"params": ids["params"]} for group, ids in zip(groups, packed, strict=True)]
        # Torch's own loading serves the groups and hooks; it would cast the state to the parameters' dtypes.
        super().load_state_dict({"state": {}, "param_groups": packed})
        self._contents.put(admitted)
        self._whole.forget()
        if self._driver is not None:
            self._driver.adopt(found)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a deep copy takes along: a window of one process too, but neither hooks nor a driver."""
        self._check_settled()
        self.engine.searches.settle()
        own = {name: getattr(self, name) for name in ("on_nonfinite", "seed", "budget", "stacked_entries")}
        own |= {"sites": self.sites, "index": self.roster.index, "fixed": self.roster.fixed}
        window = None if self._backward is None or self._backward.averaged else self._backward.copied()
        return super().__getstate__() | own | {"skipped": self._guard.skipped, "window": window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a deep copy, with hooks on its own parameters, or take over loaded groups."""
        if "sites" not in state:
            super().__setstate__(state)
            return
        own = {name: state.pop(name) for name in ("sites", "index", "fixed", "skipped", "window", "stacked_entries")}
        self.on_nonfinite, self.seed, self.budget = (state[name] for name in ("on_nonfinite", "seed", "budget"))
        self._begin()
        super().__setstate__(state)
        self.roster.restore(own["sites"], own["index"], own["fixed"])
        self._guard.skipped, self.stacked_entries = own["skipped"], own["stacked_entries"]
        self.engine.sorting.recount()
        if own["window"] is not None:
            self._backward = Backward(self, self._guard, own["window"])
