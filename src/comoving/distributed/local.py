"""Local steps: processes train by themselves for a while, and send one another cores of how far they have moved."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..codecs.base import as_real
from ..frames.base import Rank
from ..frames.modes import check_rank
from ..grouping import param_groups
from ..linalg import trouble
from ..optimizer import LowRankOptimizer
from ..precision import full_precision
from ..residual import Feedback
from ..rules import Momentum
from ..validate import check_choice, check_float, check_int
from ..weights import codes_of
from .agreement import agree
from .comms import Replicas
from .copies import Apart
from .cores import drive
from .wires import WIRES, Floats, Piece, WireName

_TOGETHER = 2**24
"""Entries that are sent as one buffer, unless a single parameter has more."""
FORGETFUL = Feedback(decay=0.7)
"""What keeps the rest of a process. What was not sent is found again by the next round, which begins from weights that
have not moved there: with all of it kept, it counts several times over, and training diverges."""
_OURS = {"lr", "betas", "weight_decay", "rule", "scale", "maximize", "rounding"}
"""What makes the outer optimizer that of DiLoCo."""
_BITS = {4: torch.int32, 8: torch.int64}


class LocalSteps:
    """DiLoCo (arXiv 2311.08105) that sends cores: a round of H inner steps on each process, then one outer step of all.

    theta_i = inner steps of process i from theta,   Delta_i = theta - theta_i,   Delta = mean of Delta_i
    b <- momentum b + Delta,   theta <- theta - lr (Delta + momentum b),   theta_i <- theta

    Of projected parameters each process sends the core of Delta_i + e_i in a frame that all share, found in the mean of
    them; b is kept in the core, and carried along when the frame changes; e_i, one buffer on each process, keeps what
    its core does not hold, rounding on the wire included, and forgets it in a few rounds. Dense parameters are sent
    whole. At rank 1.0 all of them are, and this is DiLoCo as published.

    Gradients are not averaged: the model must not be wrapped. Between rounds nothing is sent. Building this is a
    collective call, and so is the step that ends a round: all processes make equally many steps.

    ::

        local = comoving.distributed.LocalSteps(model, inner, every=50)
        for batch in loader:
            model(batch).loss.backward()
            local.step()
            local.zero_grad()
        local.average()  # the steps since the last round

    Buffers of the model, such as the statistics of BatchNorm, stay those of each process.

    Args:
        model: the same weights on all processes.
        inner: an optimizer of its parameters, comoving's or torch's; its state is each process's own. Schedulers of its
            learning rate work as ever.
        every: H, inner steps in a round.
        lr: of the outer step.
        momentum: of the outer step, Nesterov's, in [0, 1). None for 0.9 at rank 1.0, as published, and 0.7 where cores
            are sent.
        rank: of the cores; see :meth:`comoving.frames.Modes.ranks`.
        refresh_every: rounds between changes of a frame.
        wire: of cores: "same", in their own dtype; "bfloat16"; "int8", in bytes with a float32 step every 128.
        group: the processes; None for all of them.
        on_nonfinite: where weights of one process are not finite when a round ends, "raise" on all processes, with
            nothing changed; or "skip" the round on all, which go back to the weights that it began from. The inner
            optimizer keeps its state then, and one that takes up non-finite gradients does not recover.
        seed: of the random directions that a first frame may start from.
        **options: for :func:`comoving.param_groups` (``project``, ``dense``, ``experts`` ...) and for the projected
            groups of the outer optimizer (``finder``, ``side``, ``codec`` of e_i, ``moments`` of b, ``residual``, which
            keeps e_i and is ``Feedback(decay=0.7)`` ...).

    Attributes:
        outer: the optimizer of the weights that a round begins from. Only projected parameters are stepped by it.
        dense: torch's SGD, of the others.
        sent: a count of what this process has put into sums.
        taken: inner steps since the last round.
        skipped_rounds: how many were.

    Raises:
        TypeError, ValueError: a value outside its interval; a model, an optimizer or an option that does not fit.
        RuntimeError: processes that disagree, naming the parameter or the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: Optimizer,
        every: int = 50,
        lr: float = 0.7,
        momentum: float | None = None,
        rank: Rank = 0.25,
        *,
        refresh_every: int = 4,
        wire: WireName = "bfloat16",
        group: dist.ProcessGroup | None = None,
        on_nonfinite: str = "raise",
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_int("every", every, 1)
        check_float("lr", lr, 0.0)
        check_rank(rank)
        if momentum is None:
            momentum = 0.9 if isinstance(rank, float) and rank == 1.0 else 0.7
        check_float("momentum", momentum, 0.0, 1.0, open_high=True)
        check_choice("wire", wire, WIRES)
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        if taken := sorted(_OURS & options.keys()):
            raise TypeError(
                f"{', '.join(taken)}: the outer step has lr and momentum, and no weight decay or other rule"
            )
        self.inner, self.every, self.on_nonfinite, self.wire = inner, every, on_nonfinite, wire
        self.taken = self.skipped_rounds = 0
        self._group, self._agreed = group, False
        groups = _groups(model, inner, rank, {"residual": FORGETFUL, "refresh_every": refresh_every} | options)
        self._weights: dict[Tensor, nn.Parameter] = {}
        for own in groups:
            own["params"] = [(name, self._begun(p)) for name, p in own["params"]]
        # Momentum is an average there, where DiLoCo's is a sum.
        self.outer = LowRankOptimizer(
            groups, lr, betas=(momentum, 0.999), weight_decay=0.0, rule=Momentum(nesterov=True),
            scale=1 / (1 - momentum), seed=seed,
        )  # fmt: skip
        self._driver, self.sent = drive(self.outer, wire, group, Apart(), "LocalSteps")
        sites = self.outer.sites
        dense = [start for start, site in sites.items() if not site.projected]
        self._cores = _cut([start for start, site in sites.items() if site.projected])
        self._whole = _cut(dense)
        self.dense = torch.optim.SGD(dense, lr, momentum, nesterov=momentum > 0) if dense else None
        self._agree()

    def _begun(self, p: Tensor) -> nn.Parameter:
        """The weights that a round begins from; in float32 at least, where small outer steps add up."""
        start = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        self._weights[p] = made = nn.Parameter(start)
        return made

    # -------------------------------------------------------------------------------------------------------- training

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the inner optimizer; where it is the last of a round, the round's end.

        Args:
            closure: for the inner optimizer.

        Returns:
            What the inner optimizer does.

        Raises:
            RuntimeError: as :meth:`average`.
        """
        loss = self.inner.step() if closure is None else self.inner.step(closure)
        self.taken += 1
        if self.taken >= self.every:
            self.average()
        return loss

    @torch.no_grad()
    def average(self) -> None:
        """End the round now: all processes have the same weights afterwards. A collective call.

        Where no step was made since the last round, it does nothing.

        Raises:
            RuntimeError: weights that are not finite on any process, with "raise"; nothing has changed then.
        """
        if not self.taken:
            return
        with full_precision():
            if not self._agreed:
                self._agree()
            if self._bad():
                self.skipped_rounds += 1
            else:
                self._move()
        for p, start in self._weights.items():
            p.copy_(start)
        self.taken = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """That of the inner optimizer."""
        self.inner.zero_grad(set_to_none)

    def _move(self) -> None:
        """The outer step; nothing is stepped before everything has arrived but the cores."""
        moved: dict[Tensor, Tensor] = {start: p for p, start in self._weights.items()}
        self.outer.roster.check()
        try:
            for some in self._cores:
                self._driver.take({start: _difference(start, moved[start]) for start in some}, False)
            self._driver.leave_stand_ins()
            sendings = [
                Floats().start(
                    [Piece(_difference(start, moved[start])) for start in some], self._group, self.sent.dense
                )
                for some in self._whole
            ]
            means = [sending.wait() for sending in sendings]
            if self._cores:
                self.outer.step()
        except BaseException:
            self.outer.zero_grad()
            raise
        if self.dense is not None:
            for some, own in zip(self._whole, means, strict=True):
                for start, mean in zip(some, own, strict=True):
                    start.grad = mean
            self.dense.step()
            self.dense.zero_grad()

    def _bad(self) -> bool:
        """Whether weights of any process are not finite; read on the host once.

        Raises:
            RuntimeError: they are, and shall be raised.
        """
        sums = [as_real(p).sum(dtype=torch.float64) for p in self._weights]
        flag = ~torch.stack([x.to(sums[0].device) for x in sums]).isfinite().all()
        if not trouble(Replicas(self._group, traffic=self.sent.cores).largest(flag.float())):
            return False
        if self.on_nonfinite == "skip":
            return True
        names = [self.outer.sites[start].name for p, start in self._weights.items() if not bool(p.isfinite().all())]
        where = f"{', '.join(names[:5])} of this process" if names else "weights of another process, which names them"
        raise RuntimeError(
            f"non-finite numbers at the end of a round in {where}: nothing was averaged. Look for a diverging "
            f'loss, and load a checkpoint; or pass on_nonfinite="skip" to go back to the weights of the last round'
        )

    def _agree(self) -> None:
        """Raise on every process unless all have the same outer optimizer, arguments and weights to begin from."""
        agree(self.outer, self._group)
        names = [f"the weights of {self.outer.sites[start].name}" for start in self._weights.values()]
        sums = [as_real(start.detach()) for start in self._weights.values()]
        sums = [x.view(_BITS[x.element_size()]).sum(dtype=torch.int64).cpu() for x in sums]
        mine = {"every": self.every, "wire": self.wire, "on_nonfinite": self.on_nonfinite}
        mine |= dict(zip(names, torch.stack(sums).tolist(), strict=True))
        given: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(given, mine, group=self._group)
        for rank, other in enumerate(given):
            for what, here in given[0].items():
                if other[what] == here:
                    continue
                if what in names:
                    raise RuntimeError(
                        f"processes disagree about {what}: those on rank {rank} of the group are not those on rank 0. "
                        f"Seed all processes alike before the model is built, and load a checkpoint's weights after "
                        f"LocalSteps is built; or send those of rank 0 to all by dist.broadcast()"
                    )
                raise RuntimeError(
                    f"processes disagree about {what}: {here!r} on rank 0 of the group, {other[what]!r} on rank "
                    f"{rank}. Give all of them the same"
                )
        self._agreed = True

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What this process goes on from, in the middle of a round too, beside ``model.state_dict()``.

        Each process saves its own, of both: weights between rounds, inner states and feedback differ.
        """
        return {
            "inner": self.inner.state_dict(),
            "outer": self.outer.state_dict(),
            "dense": None if self.dense is None else self.dense.state_dict(),
            "start": {self.outer.sites[start].name: start.detach().clone() for start in self._weights.values()},
            "taken": self.taken,
            "skipped_rounds": self.skipped_rounds,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; the model loads its own. Processes are compared when a round ends.

        Raises:
            ValueError: a state of other parameters, or of none; nothing has changed but, where it is the outer
                optimizer's that does not fit, the inner one's.
        """
        own = {self.outer.sites[start].name: start for start in self._weights.values()}
        given: dict[str, Tensor] = state_dict.get("start", {})
        for name in dict.fromkeys((*own, *given)):
            if name not in own or name not in given or own[name].shape != given[name].shape:
                raise ValueError(
                    f"{name} is not in both, or of another shape: a state of LocalSteps fits the model that it was "
                    f"saved with, got keys {', '.join(map(str, state_dict))}"
                )
        if (state_dict["dense"] is None) != (self.dense is None):
            raise ValueError("the state was saved at another rank: build LocalSteps with the same")
        self.inner.load_state_dict(state_dict["inner"])
        self.outer.load_state_dict(state_dict["outer"])
        if self.dense is not None:
            self.dense.load_state_dict(state_dict["dense"])
        for name, start in own.items():
            start.copy_(given[name])
        self.taken, self.skipped_rounds = state_dict["taken"], state_dict["skipped_rounds"]
        self._agreed = False


def _difference(start: Tensor, p: Tensor) -> Tensor:
    """How far p has moved from the weights that its round began from, which had its dtype."""
    return start.to(p.dtype).to(start.dtype) - p


def _cut(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters that are sent together."""
    found, size = list[list[Tensor]](), 0
    for p in params:
        if not found or size + p.numel() > _TOGETHER:
            found.append([])
            size = 0
        found[-1].append(p)
        size += p.numel()
    return found


def _groups(model: nn.Module, inner: Optimizer, rank: Rank, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of the trainable parameters that the inner optimizer steps, as :func:`comoving.param_groups` makes them.

    Raises:
        TypeError, ValueError: a model or parameters that cannot be trained so.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "DistributedDataParallel averages gradients at every step, which LocalSteps is there to spare: give it the "
            "model itself, and train that"
        )
    names = {p: name for name, p in model.named_parameters()}
    stepped = [p for own in inner.param_groups for p in own["params"]]
    if foreign := sum(p not in names for p in stepped):
        raise ValueError(
            f"{foreign} parameters of the inner optimizer are not the model's: build it of this model's own"
        )
    _check(names[p] for p in stepped if hasattr(p, "placements"))
    if coded := [names[p] for p in stepped if codes_of(p) is not None]:
        raise ValueError(f"{', '.join(coded[:5])}: LocalSteps takes no weights in codes: train them without it")
    found, chosen = param_groups(model, rank, **options), set(stepped)
    for own in found:
        own["params"] = [(name, p) for name, p in own["params"] if p in chosen]
    if found := [own for own in found if own["params"]]:
        return found
    raise ValueError("the inner optimizer has no parameter that requires a gradient: there is nothing to average")


def _check(sharded: Iterable[str]) -> None:
    names = list(sharded)
    if names:
        raise ValueError(
            f"{', '.join(names[:5])}: LocalSteps needs whole parameters on every process, and these are sharded or "
            f"DTensors: train them without it"
        )
