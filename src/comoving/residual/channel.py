"""APOLLO: the gradient itself, scaled as the rule scales its projection."""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec
from ..linalg import norm, over, pairs
from .base import HELD, Update
from .gains import LAST, Scaled, brake, gains


@dataclass(frozen=True)
class Channel(Scaled):
    """The frame serves to measure a scale only: the update is the whole gradient (APOLLO, arXiv 2412.05270).

    s = phi g    channel by channel, or with one phi of the tensor (APOLLO-Mini)
    phi = |d| / (sqrt(full / core) (|z| + u |g|) + 1e-8),   u machine epsilon
    s <- s min(1, growth (|s_last| + 1e-8) / |s|)
    w <- shrink w - lr scale s

    F d is not used. The paper projects with a Gaussian matrix of variance 1/r, which keeps the size of a column on
    average; an orthonormal frame shrinks it by sqrt(r/d), in general by sqrt(core/full). The root in phi makes up for
    that, so that ``scale`` is the paper's. (d does not change with the size of z, but for eps.) An entry of the update
    is then of size sqrt(core/full), and of size 1 with scale "match".

    The floor u |g| is ours, and so is the limit of the first s, |s| <= |d|, its size where the frame holds the average
    share of g: one drawn at random may hold next to nothing of a gradient of low rank, another nothing of a channel.

    Several gradients of one step add up. The state is |s_last|, one number, in the slot "scaled.norm"; see
    :func:`comoving.residual.gains.brake` for zeros.

    Args:
        per: "channel" or "tensor"; see :func:`comoving.residual.gains.gains`.
        growth: by how much |s| may grow in a step, >= 1; None for no limit, that of the first s neither.
    """

    batched: ClassVar[bool] = True

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """w <- shrink w + factor s."""
        gradient = state.pop(HELD)
        size = norm(gradient, update.rows) if update.size is None else update.size
        phi, length = gains(update, self.per, size, sqrt(gradient.numel() / update.core.numel()))
        if self.growth is not None:
            size = _scaled_norm(gradient, phi, size, update.rows)
            factor, state[LAST] = brake(size, state[LAST], self.growth, length)
            phi = phi * over(factor, phi)
        update.decay(weights)
        phi = over(phi, gradient) if update.rows else phi
        if gradient.is_complex():
            weights, gradient, phi = pairs(weights), pairs(gradient), phi.unsqueeze(-1)
        if isinstance(update.factor, Tensor):
            weights.addcmul_(gradient, (phi * update.factor).to(gradient.dtype))
        else:
            weights.addcmul_(gradient, phi.to(gradient.dtype), value=update.factor)


def _scaled_norm(gradient: Tensor, phi: Tensor, size: Tensor, rows: int) -> Tensor:
    """|phi g|, (*rows), without the product where torch is fast without it; ``size`` is |g|, likewise."""
    if phi.ndim <= rows or phi.numel() == size.numel():
        return phi.reshape(size.shape) * size
    shared = [n for n in range(rows, gradient.ndim) if phi.shape[n] == 1]
    if gradient.ndim - 1 in shared and gradient.is_contiguous():
        return norm(phi * torch.linalg.vector_norm(gradient, dim=shared, keepdim=True), rows)
    return norm(gradient * phi, rows)
