"""Learning-rate schedulers that were made before a group was added, or removed."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

_SCALED = ("base_lrs", "_last_lr", "min_lrs")
_SAME = ("lr_lambdas",)
_OTHER = {"_schedulers", "_milestones", "_schedule_phases"}


def check(scheduler: Any, optimizer: Optimizer) -> None:
    """Raise unless the scheduler can be extended: torch's of which all lists over groups are known.

    Raises:
        TypeError: not one of torch's schedulers.
        ValueError: a scheduler of another optimizer, or one that keeps other figures of each group.
    """
    if not hasattr(scheduler, "optimizer") or not hasattr(scheduler, "step"):
        raise TypeError(f"scheduler must be a learning-rate scheduler of torch, got {type(scheduler).__name__}")
    count = len(optimizer.param_groups)
    for one in _flat(scheduler):
        if one.optimizer is not optimizer:
            raise ValueError("scheduler belongs to another optimizer")
        lists = [key for key, value in vars(one).items() if isinstance(value, list) and len(value) == count]
        unknown = sorted(set(lists) - set(_SCALED) - set(_SAME) - _OTHER)
        if unknown:
            raise ValueError(
                f"scheduler: {type(one).__name__} keeps {', '.join(unknown)} of each group, which have no known value "
                f"for a new one; make it after the extraction"
            )


def extend(scheduler: Any, sources: Sequence[int], boost: float) -> None:
    """Give new groups at the end the schedule of these groups, with learning rates ``boost`` times theirs."""
    for one in _flat(scheduler):
        for key in (*_SCALED, *_SAME):
            values = vars(one).get(key)
            if isinstance(values, list):
                factor = boost if key in _SCALED else None
                new = [values[i] if factor is None else factor * values[i] for i in sources]
                setattr(one, key, [*values, *new])


def shrink(scheduler: Any, removed: Sequence[int]) -> None:
    """Forget the groups of these numbers."""
    for one in _flat(scheduler):
        for key in (*_SCALED, *_SAME):
            values = vars(one).get(key)
            if isinstance(values, list):
                setattr(one, key, [value for i, value in enumerate(values) if i not in removed])


def _flat(scheduler: Any) -> list[Any]:
    """The scheduler and those inside of it."""
    return [scheduler, *(one for inner in getattr(scheduler, "_schedulers", ()) for one in _flat(inner))]
