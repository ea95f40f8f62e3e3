"""One case, run with every promise checked."""

import traceback
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from io import BytesIO
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizer import LowRankOptimizer
from .bounds import Bound, step_bound
from .cases import Case

__all__ = ["FAILURES", "KINDS", "Outcome", "examine", "largest"]

FAILURES = ("raised", "warned", "nonfinite", "step", "resume", "gradient", "random", "skip")
"""What a case may fail by: an exception or a warning in a step; weights or state that are not finite; a step above its
bound; a resumed run that is not bitwise the uninterrupted one; a gradient that was changed; torch's global generator
that was drawn from; a bad gradient that was to be skipped and moved weights."""
KINDS = ("passed", "refused", *FAILURES)
_SLACK = 1.005
"""For the rounding of weights and moments."""
_INFINITE = ("ranks.value",)
"""Slots that start at infinity."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Args:
        case: which.
        kind: one of :data:`KINDS`.
        detail: what was wrong, in a line.
        share: the largest update over its bound; 0 where there was none.
        trace: where it was raised.
    """

    case: Case
    kind: str
    detail: str = ""
    share: float = 0.0
    trace: str = ""

    @property
    def failed(self) -> bool:
        """Whether a promise was broken."""
        return self.kind in FAILURES

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail} | {self.case.command} | {self.case}"


class _Broken(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def examine(case: Case) -> Outcome:
    """Run a case to its end, or to the first promise that is broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = case.model()
        try:
            optimizer = case.optimizer(model)
        except (TypeError, ValueError) as error:
            return Outcome(case, "refused", _line(error))
        except Exception as error:
            return Outcome(case, "raised", f"at construction: {_line(error)}", trace=traceback.format_exc())
        run = _Run(case, model, optimizer)
        try:
            run.through()
        except _Broken as broken:
            return Outcome(case, broken.kind, str(broken), run.share)
        except Warning as warning:
            return Outcome(case, "warned", f"step {run.step}: {_line(warning)}", run.share, traceback.format_exc())
        except Exception as error:
            return Outcome(case, "raised", f"step {run.step}: {_line(error)}", run.share, traceback.format_exc())
    return Outcome(case, "passed", share=run.share)


class _Run:
    def __init__(self, case: Case, model: nn.Module, optimizer: LowRankOptimizer) -> None:
        self.case, self.model, self.optimizer = case, model, optimizer
        self.params = _params(case, model)
        self.step, self.share = 0, 0.0
        self.twin: tuple[nn.Module, LowRankOptimizer] | None = None

    def through(self) -> None:
        """All steps."""
        gradients = self.case.gradients()
        for step in range(self.case.steps):
            self.step = step
            if self.step == self.case.resume:
                self.twin = self._resumed()
            first = self.step * self.case.absorbed
            given = [[x.clone() for x in xs[first : first + self.case.absorbed]] for xs in gradients]
            if self.step == self.case.bad:
                given[0][0][(0,) * given[0][0].ndim] = torch.nan
            self._checked(given)
            if self.twin is not None:
                _take(_params(self.case, self.twin[0]), self.twin[1], given)
                self._compare(*self.twin)

    def _checked(self, given: list[list[Tensor]]) -> None:
        before = [p.detach().clone() for p in self.params.values()]
        copies = [[x.clone() for x in xs] for xs in given]
        random = torch.random.get_rng_state()
        _take(self.params, self.optimizer, given)
        if not torch.equal(random, torch.random.get_rng_state()):
            raise _Broken("random", f"step {self.step}: torch's global generator was drawn from")
        for name, xs, ys in zip(self.params, given, copies, strict=True):
            if not all(_same(x, y) for x, y in zip(xs, ys, strict=True)):
                raise _Broken("gradient", f"step {self.step}: the gradient of {name} was changed")
        bad = self.step == self.case.bad
        for (name, p), old in zip(self.params.items(), before, strict=True):
            self._finite(name, p)
            if bad and not _same(p.detach(), old):
                raise _Broken("skip", f"step {self.step}: {name} moved by a gradient that is not finite")
            if not bad:
                self._bounded(name, p, old)

    def _finite(self, name: str, p: Tensor) -> None:
        site = self.optimizer.sites[p]
        if site.view.stored_dtype == torch.float16 and self._bound(p).none:
            return  # whose largest number is 65504; and in torch's own AdamW for it eps is 0
        if not bool(p.isfinite().all()):
            raise _Broken("nonfinite", f"step {self.step}: weights of {name}")
        for slot, x in _tensors(self.optimizer.state.get(p, {})):
            if x.is_floating_point() or x.is_complex():
                if not slot.endswith(_INFINITE) and not bool(x.isfinite().all()):
                    raise _Broken("nonfinite", f"step {self.step}: state {slot} of {name}")

    def _bounded(self, name: str, p: Tensor, old: Tensor) -> None:
        share, what = largest(self.optimizer, p, old, self.step + 1, self.case.absorbed)
        self.share = max(self.share, share)
        if share > _SLACK:
            raise _Broken("step", f"step {self.step}: {name} by {what}")

    def _bound(self, p: Tensor) -> Bound:
        return step_bound(self.optimizer.sites[p], _group(self.optimizer, p), self.step + 1, self.case.absorbed)

    def _resumed(self) -> tuple[nn.Module, LowRankOptimizer]:
        """A copy of the model, with an optimizer from a checkpoint that was written and read."""
        model = deepcopy(self.model)
        for p in model.parameters():
            p.grad = None
        optimizer, file = self.case.optimizer(model), BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        return model, optimizer

    def _compare(self, model: nn.Module, optimizer: LowRankOptimizer) -> None:
        for (name, p), q in zip(self.model.named_parameters(), model.parameters(), strict=True):
            if not _same(p.detach(), q.detach()):
                raise _Broken(
                    "resume", f"step {self.step}: weights of {name} differ after a resume at {self.case.resume}"
                )
            own, other = (dict(_tensors(o.state.get(x, {}))) for o, x in ((self.optimizer, p), (optimizer, q)))
            if own.keys() != other.keys() or not all(_same(x, other[slot]) for slot, x in own.items()):
                raise _Broken(
                    "resume", f"step {self.step}: state of {name} differs after a resume at {self.case.resume}"
                )


def largest(optimizer: LowRankOptimizer, p: Tensor, old: Tensor, steps: int, absorbed: int = 1) -> tuple[float, str]:
    """The last update of a parameter over its bound, and both in words; 0 where there is no bound.

    The update (w_new - (1 - lr weight_decay) w_old) / lr is taken in double precision, block by block. What the
    weights' own dtype rounds, up to a unit in the last place of the largest, is taken off. What has not changed at all
    was not stepped, and has not decayed: the blocks without a gradient.

    Args:
        optimizer: that has made the step.
        p: the parameter after it.
        old: a copy from before it.
        steps: the number of steps so far.
        absorbed: as for :func:`comoving.fuzz.bounds.step_bound`.
    """
    site, new = optimizer.sites[p], p.detach()
    group = _group(optimizer, p)
    bound = step_bound(site, group, steps, absorbed)
    if bound.none:
        return 0.0, bound.reason
    wide = torch.complex128 if new.is_complex() else torch.float64
    lr, shrink = group["lr"] * group["rate"], 1 - group["lr"] * group["weight_decay"]
    change = torch.where(new == old, 0, (new.to(wide) - old.to(wide) * shrink) / lr)
    seen = torch.view_as_complex(change.contiguous()) if site.view.name == "pairs" else change.reshape(site.view.shape)
    rounding = torch.finfo(new.dtype).eps * float(new.abs().amax()) / lr
    share, words = 0.0, ""
    for update in (seen,) if site.block_mode is None else seen.unbind(site.block_mode):
        rms = float(torch.linalg.vector_norm(update)) / sqrt(update.numel())
        for kind, size, most in (("RMS", rms, bound.rms), ("entry", float(update.abs().amax()), bound.entry)):
            own = max(0.0, size - rounding) / most
            if own >= share:
                share, words = own, f"{kind} {size:.4g} lr, bound {most:.4g}"
    return share, words


def _group(optimizer: LowRankOptimizer, p: Tensor) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))


def _params(case: Case, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names, in the case's order."""
    return {parameter.name: model.get_parameter(parameter.name) for parameter in case.parameters}


def _take(params: Mapping[str, nn.Parameter], optimizer: LowRankOptimizer, given: list[list[Tensor]]) -> None:
    """One step with these gradients of each parameter, several of them absorbed one by one."""
    if len(given[0]) == 1:
        for p, (x,) in zip(params.values(), given, strict=True):
            p.grad = x
        optimizer.step()
        return
    for p, xs in zip(params.values(), given, strict=True):
        if optimizer.sites[p].plain:
            p.grad = sum(xs[1:], xs[0])
            continue
        p.grad = None
        for x in xs:
            optimizer.absorb(p, x)
        optimizer.apply(p)
    optimizer.step()


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state; counts as tensors."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, int | float):
            yield name, torch.tensor(value)


def _same(a: Tensor, b: Tensor) -> bool:
    """Bitwise, but that NaNs are equal and so are zeros of both signs."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
