"""Weight decay where the update agrees with it."""

from typing import Literal

import torch
from torch import Tensor

Decay = Literal["all", "cautious"]
DECAYS: tuple[Decay, ...] = ("all", "cautious")


def decay_agreeing(new: Tensor, old: Tensor, amount: float | Tensor) -> Tensor:
    """new - amount * old at the entries that moved toward zero, or not at all; in place, and returned.

    That is Re(conj(u) w) >= 0 for w = old, u = old - new: cautious weight decay (arXiv 2510.12402), one number deciding
    for the two parts of a complex entry.

    Args:
        new: the weights after an update without decay.
        old: those before it, of the same shape.
        amount: lr weight_decay; without dimensions where it is a tensor.
    """
    # Of their signs: products of small entries would be zero.
    agreement = (old - new).sgn_().mul_(old.sgn().conj())
    agrees = (agreement.real if old.is_complex() else agreement) >= 0
    return new.sub_(torch.where(agrees, old, 0).mul_(amount))
