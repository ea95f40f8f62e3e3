"""A step without data: the optimizer's own code run on the meta device, with its storages and operations counted."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cadence import Cadence, When
from ..cadence.base import Slots
from ..codecs import Spec
from ..distributed.traffic import Traffic
from ..optimizer import LowRankOptimizer
from . import flops
from .tracker import StorageTracker

_NEVER = 10**9
_ROLES = ("finder", "precondition", "rule", "residual")
_MOST_STEPS = 12


@dataclass(frozen=True)
class Rehearsal:
    """What the steps of some parameters were seen to need, in bytes and real operations.

    Args:
        state: bytes of their state after a step.
        first: the most beside weights and gradients during the first step, the state that it makes included.
        step: the most beside weights, gradients and state during a step between refreshes.
        refresh: likewise during a step with a refresh.
        step_flops: operations of a step between refreshes, a mean where some do more than others.
        refresh_flops: what a refresh adds.
        step_bytes: bytes that a process sends in a step between refreshes, where parameters are shared; a mean.
        refresh_bytes: what a refresh adds.
        waiting: what of ``step`` stays from the backward pass to the step, where gradients are taken up before.
        waiting_refresh, waiting_first: likewise of ``refresh`` and ``first``.
    """

    state: int
    first: int
    step: int
    refresh: int
    step_flops: int
    refresh_flops: int
    step_bytes: int = 0
    refresh_bytes: int = 0
    waiting: int = 0
    waiting_refresh: int = 0
    waiting_first: int = 0


@dataclass(frozen=True, eq=False)
class _Called:
    """Stands for a cadence, with its slots and its work, but refreshes at periods below a limit, and at no other step.

    It is equal to the cadence, which groups may not be edited to differ from.
    """

    cadence: Cadence

    def __eq__(self, other: object) -> bool:
        return self.cadence == other

    __hash__ = object.__hash__

    @property
    def batched(self) -> bool:
        return self.cadence.batched

    @property
    def alone(self) -> bool:
        return self.cadence.alone

    @property
    def compares(self) -> tuple[type, ...]:
        return self.cadence.compares

    def schema(self) -> dict[str, Spec]:
        return self.cadence.schema()

    def due(self, slots: Slots, when: When) -> bool:
        return when.every < _NEVER

    def refreshed(self, slots: Slots, last: Any, new: Any, when: When) -> dict[str, Tensor]:
        return self.cadence.refreshed(slots, last, new, when)


class Watcher(StorageTracker):
    """Follows storages, counts operations, and answers what the host asks of tensors without data: yes, or one."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            device = (kwargs or {}).get("device")
            if device is not None and torch.device(device).type != "meta":
                return torch.ones(args[0].shape, dtype=(kwargs or {}).get("dtype") or args[0].dtype, device=device)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.flops += flops.count(func, args, result)
        return result


def rehearse(
    optimizer: LowRankOptimizer,
    params: Sequence[Tensor],
    device: str,
    traffic: Traffic | None = None,
    take: Callable[[Mapping[Tensor, Tensor]], None] | None = None,
) -> Rehearsal:
    """Step parameters of one group on the meta device, as if it were another.

    The step is the optimizer's own, :meth:`comoving.LowRankOptimizer.step`, with gradients for these parameters alone:
    once for the first time, then with and without a refresh, as often as the parts need to come to everything that they
    do every so many steps. The optimizer is left as it was.

    Args:
        optimizer: with parameters on the meta device, not stepped so far.
        params: of one group.
        device: "cpu" counts what is drawn on the host too, and steps dense parameters one by one; "cuda" neither, as
            torch's AdamW has it by default.
        traffic: counts what is sent.
        take: takes gradients of projected parameters up before the step.
    """
    traffic = Traffic() if traffic is None else traffic
    group = next(g for g in optimizer.param_groups if any(p is params[0] for p in g["params"]))
    watcher = Watcher() if device == "cpu" else Watcher("meta")
    period = _period(group)
    with _prepared(optimizer, group, params, device):
        present = watcher.watch(p.grad for p in params if p.grad is not None).watch(params).live
        given = dict[Tensor, Tensor]()
        if take is not None:
            given = {p: p.grad for p in params if p.grad is not None and optimizer.sites[p].projected}
            for p in given:
                p.grad = None

        def step(every: int) -> tuple[int, int, int, int]:
            group["refresh_every"] = max(every, group["finder"].ahead)  # none may be shorter
            watcher.reset_peak()
            before, watcher.flops, sent = watcher.live, 0, traffic.bytes
            with watcher, torch.no_grad():
                if take is not None and given:
                    take(given)
                waiting = watcher.live - before
                optimizer.step()
            return watcher.peak - before, watcher.flops, traffic.bytes - sent, waiting

        first, _, _, waiting_first = step(1)
        state = watcher.live - present
        plain = [step(_NEVER) for _ in range(period)]
        moving = any(optimizer.sites[p].projected for p in params)
        turning = [step(1) for _ in range(period)] if moving else plain
    work, sent = ([sum(step[i] for step in steps) // len(steps) for steps in (plain, turning)] for i in (1, 2))
    return Rehearsal(
        state,
        first,
        max(step[0] for step in plain),
        max(step[0] for step in turning),
        work[0],
        max(0, work[1] - work[0]),
        sent[0],
        max(0, sent[1] - sent[0]),
        max(step[3] for step in plain),
        max(step[3] for step in turning),
        waiting_first,
    )


def _period(group: dict[str, Any]) -> int:
    """Steps after which every part of a group has done all that it does now and then."""
    periods = [
        getattr(group[role], field.name)
        for role in _ROLES
        if is_dataclass(group[role])
        for field in fields(group[role])
        if field.name in {"every", "recalibrate"}
    ]
    return min(_MOST_STEPS, max([1, *periods]))


@contextmanager
def _prepared(
    optimizer: LowRankOptimizer, group: dict[str, Any], params: Sequence[Tensor], device: str
) -> Generator[None]:
    """Gradients, one phase, a cadence that waits to be called, and torch's choice of kernels; all of it undone."""
    sites = {p: optimizer.sites[p] for p in params}
    whole = {p: optimizer.roster.placements.pop(p) for p, site in sites.items() if site.owner is not None}
    kept = {key: group[key] for key in ("cadence", "refresh_every", "foreach")}
    group["cadence"] = _Called(group["cadence"])
    for p, site in sites.items():
        p.grad = torch.empty_like(p)
        optimizer.sites[p] = replace(site, phase=0, owner=None)  # whoever steps it
    if device != "cpu" and group["foreach"] is None and not group["fused"]:
        group["foreach"] = True
    optimizer.engine.forget()
    try:
        yield
    finally:
        group.update(kept)
        optimizer.sites.update(sites)
        optimizer.roster.placements |= whole
        optimizer.engine.forget()
        for p in params:
            p.grad = None
            optimizer.state.pop(p, None)
