"""How numbers become codes: to the nearest level, or to one of the two beside, drawn so that the mean is the number."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from ..draws import scramble
from .base import Spec
from .tables import Table

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
SEED = "seed"


def seeds(rounding: Rounding) -> dict[str, Spec]:
    """What stochastic rounding keeps beside the codes: the seed of the last draw."""
    return {SEED: Spec((), torch.int64, scalar=True, seed=True)} if rounding == "stochastic" else {}


def advanced(stored: Mapping[str, Tensor], device: torch.device) -> torch.Generator | None:
    """A generator on the device from the next seed, which takes the last one's place; None where none is kept."""
    if SEED not in stored:
        return None
    seed = scramble(int(stored[SEED]))
    stored[SEED].fill_(seed)
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


def one_by_one(
    encode: Callable[[Tensor, Mapping[str, Tensor]], Tensor], x: Tensor, stored: Mapping[str, Tensor]
) -> Tensor:
    """Encode each member of a batch by itself, into tensors of its own; returns a norm of each, (members,).

    What is drawn for a member follows from its own seed and size: no draw for all at once has the same bits.
    """
    return torch.stack(
        [encode(member, {name: own[i] for name, own in stored.items()}) for i, member in enumerate(x.unbind())]
    )


def up(share: Tensor, generator: torch.Generator) -> Tensor:
    """True with this probability, entry by entry: never at 0, always at 1."""
    return torch.rand(share.shape, generator=generator, device=share.device, dtype=torch.float32) < share


def to_integers(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """x rounded to integers, in place: to nearest, or up with the probability of its fraction."""
    if generator is None:
        return x.round_()
    below = x.floor()
    return below.add_(up(x.sub_(below), generator))


def to_levels(x: Tensor, table: Table, generator: torch.Generator | None, power: int = 1) -> Tensor:
    """The index of a level for each entry, int32: of the nearest, or of one beside it.

    Args:
        x: contiguous, in the table's dtype; what lies beyond the outermost levels gets these.
        table: the levels.
        generator: of the draws; None for the nearest, the lower one at equal distances.
        power: 2 for levels that are roots, where E[level^2] = x^2.
    """
    if generator is None:
        return torch.bucketize(x, table.middles, out_int32=True)
    levels = table.levels
    lower = torch.bucketize(x, levels, right=True, out_int32=True).sub_(1).clamp_(0, levels.shape[0] - 2)
    below, above, at = levels[lower], levels[lower + 1], x
    if power == 2:
        below, above, at = below.square(), above.square(), x.square()
    return lower.add_(up((at - below).div_(above.sub_(below)), generator))
