"""DistributedDataParallel and its backward pass: which gradients it averages, and when that is over."""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..sites import Site


def replicated(model: nn.Module, what: str) -> DistributedDataParallel:
    """The model, which has to be one.

    Args:
        model: any.
        what: hooks into it.

    Raises:
        TypeError: another model.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"{what} hooks into DistributedDataParallel, got a {type(model).__name__}: wrap the model in it first"
        )
    return model


def check_averages(model: DistributedDataParallel, sites: Mapping[Tensor, Site]) -> None:
    """Raise unless the model can have a hook, and averages the gradients of all these parameters.

    Raises:
        ValueError: with the reason.
    """
    if model._comm_hooks:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        raise ValueError("this model has a communication hook already, and can have one only: wrap it anew")
    present, ignored = set(model.module.parameters()), set(cast("set[str]", model.parameters_to_ignore))
    left_out = {p for name, p in model.module.named_parameters() if name in ignored}
    absent = [site.name for p, site in sites.items() if p not in present or p in left_out]
    if absent:
        raise ValueError(
            f"{', '.join(absent[:5])}: parameters of the optimizer that this model does not have, or does not average; "
            f"build the optimizer of the model's own parameters"
        )


def after_averaging(call: Callable[[], None]) -> None:
    """Call this when the backward pass is over and gradients are in ``p.grad``; from a communication hook.

    What is queued there comes before what DistributedDataParallel is about to queue, and that puts gradients into
    ``p.grad``; what is queued from there comes last.
    """
    _at_the_end(lambda: _at_the_end(call))


def _at_the_end(call: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(call)  # noqa: SLF001  # pyright: ignore
