"""Fira: what lies outside the frame, scaled as the rule scales what lies inside."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec
from ..linalg import norm, over
from .base import HELD, Update
from .gains import LAST, Scaled, brake, gains


@dataclass(frozen=True)
class Fira(Scaled):
    """The rest of the gradient goes into the update too, without moments of its own (Fira, arXiv 2410.01623).

    s = phi (g - F z),   phi = |d| / (|z| + u |g| + 1e-8)   channel by channel, u machine epsilon
    s <- s min(1, growth (|s_last| + 1e-8) / |s|)
    w <- shrink w - lr (scale F d + s)

    The floor u |g| is ours, and so is the limit of the first s, |s| <= |d| sqrt((full - core) / core), as large in each
    direction outside of the frame as d is inside. Where the first gradients lie in the frame, as those of a few live
    rows do, s is zero, and the next one may have channels with |z| = 0 but a d of the earlier ones.

    The group's ``scale`` is that of F d alone, as in the paper (its alpha). Several gradients of one step add up. The
    state is |s_last|, one number, in the slot "scaled.norm"; see :func:`comoving.residual.gains.brake` for zeros.

    Args:
        per: "channel" or "tensor"; see :func:`comoving.residual.gains.gains`.
        growth: by how much |s| may grow in a step, >= 1; None for no limit, that of the first s neither: |s| may then
            be up to |d| / u.
    """

    batched: ClassVar[bool] = True

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """w <- shrink w + factor F d + rate s."""
        gradient = state.pop(HELD)
        size = norm(gradient, update.rows) if update.size is None else update.size
        rest = update.frame.add_lift(gradient.clone(memory_format=torch.contiguous_format), update.core, -1.0)
        phi, length = gains(update, self.per, size)
        rest.mul_(over(phi, rest) if update.rows else phi)
        if self.growth is not None:
            first = length * (rest.numel() / update.core.numel() - 1) ** 0.5
            factor, state[LAST] = brake(norm(rest, update.rows), state[LAST], self.growth, first)
            rest.mul_(over(factor, rest))
        update.write(weights)
        update.add(weights, rest)
