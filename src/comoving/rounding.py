"""How an update is rounded into a parameter that holds less than the working precision."""

from collections.abc import Iterable, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor

from .draws import scramble

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")

SEED = "rounding.seed"
"""The slot, on the host, of what the random bits of the last write were seeded with."""
_LARGEST = torch.finfo(torch.bfloat16).max


def advance(slots: MutableMapping[str, Any]) -> list[int]:
    """Replace the seed in a compartment, or that of each row, (*rows), by the next one, and return them."""
    seeds: Tensor | None = slots.get(SEED)
    if seeds is None:
        return []
    following = [scramble(int(seed)) for seed in seeds.view(-1)]
    slots[SEED] = torch.tensor(following, dtype=torch.int64, device="cpu").view(seeds.shape)
    return following


def generator(device: torch.device, seeds: Iterable[int]) -> torch.Generator:
    """A generator on a device, seeded from one or more seeds; on the host where nothing has data."""
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(scramble(*seeds))


def stochastic_bfloat16(x: Tensor, random: torch.Generator) -> Tensor:
    """x, float32, rounded to one of the two neighbours in bfloat16, so that the mean is x.

    The neighbour of larger magnitude has the probability (|x| - low) / (high - low); what bfloat16 holds exactly stays
    as it is. Beyond the largest finite bfloat16, and for NaN and infinity, there is nothing to choose between: nearest.

    Args:
        x: any shape, float32.
        random: on x's device; one draw of 16 bits for each entry.
    """
    # A float's magnitude, read as an integer, is linear between neighbours: adding 16 random bits below the cut carries
    # into it with just that probability.
    bits = _sixteen_bits(x, random).add_(x.contiguous().view(torch.int32)).bitwise_right_shift_(16)
    rounded = bits.to(torch.int16).view(torch.bfloat16)
    return torch.where(x.abs() <= _LARGEST, rounded, x.to(torch.bfloat16))


def _sixteen_bits(like: Tensor, random: torch.Generator) -> Tensor:
    """Integers in [0, 2^16), int32, of this shape: four from each draw of 64 bits, which takes half as long."""
    count = like.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=random)
    return draws.view(torch.int16)[:count].to(torch.int32).bitwise_and_(2**16 - 1).view(like.shape)
