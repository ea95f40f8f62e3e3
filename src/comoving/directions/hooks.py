"""Acting on gradients between the backward pass and the step of any optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def before_step(optimizer: Optimizer, what: str, action: Callable[[], None]) -> RemovableHandle:
    """Run ``action`` whenever the gradients of a step are there: before the step, or after each call of its closure.

    Args:
        optimizer: any.
        what: begins the messages of errors.
        action: changes gradients, or looks at them.

    Raises:
        ValueError: the optimizer steps in the backward pass. Turned to that later, it raises RuntimeError at its step.
    """
    refuse_in_backward(optimizer, what)

    def hook(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if _steps_in_backward(stepped):
            raise RuntimeError(f"{what}: {_IN_BACKWARD}")
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            action()
            return None

        def closed() -> Any:
            loss = closure()
            action()
            return loss

        if len(args) > 1:
            return (args[0], closed, *args[2:]), kwargs
        return args, kwargs | {"closure": closed}

    return optimizer.register_step_pre_hook(hook)


def refuse_in_backward(optimizer: Optimizer, what: str) -> None:
    """Raise for an optimizer that takes up gradients inside ``backward()``, so that no step ever sees them.

    Raises:
        ValueError: naming the way out.
    """
    if _steps_in_backward(optimizer):
        raise ValueError(f"{what}: {_IN_BACKWARD}")


def _steps_in_backward(optimizer: Optimizer) -> bool:
    return getattr(optimizer, "steps_in_backward", False)


def group_of(optimizer: Optimizer) -> dict[Tensor, int]:
    """Parameter -> the number of its group."""
    return {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}


def check_owned(optimizer: Optimizer, wanted: Mapping[str, Tensor]) -> None:
    """Raise unless the optimizer has all these parameters.

    Raises:
        ValueError: naming those that it has not.
    """
    owned = group_of(optimizer)
    missing = [name for name, p in wanted.items() if p not in owned]
    if missing:
        raise ValueError(f"the optimizer does not hold {listed(missing)}")


def check_strided(what: str, gradient: Tensor) -> None:
    """Raise for a sparse gradient.

    Raises:
        RuntimeError: naming the layout.
    """
    if gradient.layout is not torch.strided:
        raise RuntimeError(f"{what}: a {gradient.layout} gradient; only dense gradients are supported")


def listed(names: Iterable[str]) -> str:
    """Up to four names."""
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


_IN_BACKWARD = (
    "refused while the optimizer steps in the backward pass, where gradients are used before any step begins; "
    "call step_after_backward() first"
)
