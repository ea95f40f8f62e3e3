"""Two learning rates in one optimizer: that of hidden weights, and that of everything else, a multiple of it."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from comoving.race.contenders import Contender, Together, hidden_weights
from comoving.race.settings import Rank
from comoving.roles import WEIGHTS


def build_with_ratio(
    contender: Contender, model: nn.Module, lr: float, ratio: float, rank: Rank, weight_decay: float
) -> Any:
    """The contender's optimizer with rate ``lr`` for hidden weights and ``lr * ratio`` for all other parameters.

    Our recipes have groups of their own for parameters of other roles than hidden weights have (embeddings, heads,
    norms, biases), which get that rate. Groups of foreign optimizers are split by
    :func:`comoving.race.contenders.hidden_weights`, before they have any state.

    Raises:
        Refused, TypeError, ValueError: as :meth:`comoving.race.contenders.Contender.build`.
    """
    optimizer = contender.build(model, lr, rank, weight_decay)
    if ratio == 1:
        return optimizer
    if contender.foreign is None:
        for group in optimizer.param_groups:
            if all(optimizer.sites[p].role not in WEIGHTS for p in group["params"]):
                group["rate"] *= ratio
        return optimizer
    split(optimizer, {id(p) for p in hidden_weights(model).values()}, ratio)
    return optimizer


def scale_rate(group: dict[str, Any], factor: float) -> None:
    """Multiply a group's rate; a tensor is not shared with another group afterwards."""
    group["lr"] = group["lr"].clone() * factor if isinstance(group["lr"], Tensor) else group["lr"] * factor


def split(optimizer: Any, hidden: Collection[int], ratio: float) -> None:
    """Give all but the parameters with the ids ``hidden`` groups of their own, with ``ratio`` times the rate."""
    if isinstance(optimizer, Together):
        for part in optimizer.parts:
            split(part, hidden, ratio)
        optimizer.param_groups = [group for part in optimizer.parts for group in part.param_groups]
        return
    found: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        rest = [p for p in group["params"] if id(p) not in hidden]
        own = [p for p in group["params"] if id(p) in hidden]
        for params, factor in ((own, 1.0), (rest, ratio)):
            if params:
                found.append({**group, "params": params})
                scale_rate(found[-1], factor)
    optimizer.param_groups[:] = found
