"""GWT: what the frame leaves of a gradient, divided by the root of what it holds there."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..codecs import Codec, Spec
from ..frames.base import Spreading
from ..linalg import norm, over
from ..validate import check_float
from .base import HELD, Holding, Update
from .folded import corrected
from .gains import LAST, brake


@dataclass(frozen=True)
class Details(Holding):
    """The detail coefficients of a wavelet transform, over the roots of Adam's second moments (GWT, arXiv 2501.07237).

    R = g - F z
    s = R / (c1 (sqrt(v'') + eps)),     v'' = |F|^2 (v / c2) / |F|^2 1
    u = gamma (F d + s),                gamma = min(1, growth (|d'_last| + 1e-8) / |d'|),   d' = c1 / sqrt(c2) d
    w <- shrink w - lr scale u

    with Adam's d, v, c1 and c2 in the frame. In a frame of :class:`comoving.frames.Pooled` v'' is, over each run, that
    of its coordinate. A Haar transform of l levels has the sum of a run of 2^l over its root as approximation, and the
    paper divides all detail coefficients of the run by the same sqrt(v): so that the inverse transform of what it
    divides is R divided, and no transform has to be made. 1 / c1, Adam's correction of m, is on details too, as
    published. gamma is Fira's limiter, which the authors' code has: of d without its bias corrections, |d'_last|
    after the limit; the first passes.

    An entry of s is at most ``limit``, which is ours: where a run's gradients have had a sum near zero, R over it is
    without bound.

    Several gradients of one step add up. The state is |d'_last|, one number, in the slot "scaled.norm".

    Args:
        growth: by how much |d'| may grow in a step, >= 1; None for no limit, and no state.
        limit: > 0; None for none.
    """

    batched: ClassVar[bool] = True
    reads: ClassVar[bool] = True

    growth: float | None = 1.01
    limit: float | None = 10.0

    def __post_init__(self) -> None:
        if self.growth is not None:
            check_float("growth", self.growth, 1.0)
        if self.limit is not None:
            check_float("limit", self.limit, 0.0, open_low=True)

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """|d'_last|, where growth is limited."""
        return {} if self.growth is None else {LAST: Spec((), dtype.to_real())}

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """w <- shrink w + factor u."""
        gradient, frame, clock = state.pop(HELD), cast("Spreading", update.frame), update.clock
        rest = frame.add_lift(gradient.clone(memory_format=torch.contiguous_format), update.core, -1.0)
        variance = corrected(update)
        weight = frame.lift_squares(torch.ones_like(variance)).clamp_min_(torch.finfo(variance.dtype).tiny)
        scale = (frame.lift_squares(variance) / weight).sqrt_().add_(update.eps).mul_(clock.weight1)
        whole = frame.add_lift(limited(rest, scale, self.limit), update.direction, 1.0)
        if self.growth is not None:
            length = norm(update.direction, update.rows)
            # Where a step is recorded the clock's weights are tensors in double precision.
            size = (length * (clock.weight1 / clock.weight2**0.5)).to(length.dtype)
            factor, state[LAST] = brake(size, state[LAST], self.growth, size)
            whole.mul_(over(factor, whole))
        update.move(weights, whole)


def limited(x: Tensor, scale: Tensor, limit: float | None) -> Tensor:
    """x / scale, in place, with no entry above the limit; finite wherever x is."""
    least = torch.finfo(scale.dtype).tiny
    if limit is not None:
        scale = torch.maximum(scale, x.abs().div_(limit))
    return x.div_(scale.clamp_min(least))
