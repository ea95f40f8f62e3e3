"""FOAM: what the frame leaves of a gradient, added to both moments of one update."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..codecs import Codec, Spec
from ..frames.base import Spreading
from ..rules.adam import FIRST, SECOND
from ..transport import mass_of
from .base import HELD, Holding, Update


@dataclass(frozen=True)
class Folded(Holding):
    """The rest of the gradient joins the moments, which do not remember it (FOAM, arXiv 2512.07112).

    R = g - F z
    u = sqrt(c2) / c1 (F m + R) / (sqrt(|F|^2 v + |R|^2) + eps)
    w <- shrink w - lr scale u

    with Adam's m, v, c1 and c2 in the frame, and |F|^2 entry by entry: in a frame of
    :class:`comoving.frames.Pooled` F m and |F|^2 v are, over each run, the averages of the mean of the gradient and of
    the square of that mean, as in the paper (its authors' code averages the mean of the squares instead). eps counts as
    in torch's Adam, beside the corrected root. Every entry of the part of R is at most sqrt(c2) / c1. Where the
    transport carries a mass of v, v over its mass stands in place of v / c2. Several gradients of one step add up;
    there is no state.
    """

    batched: ClassVar[bool] = True
    reads: ClassVar[bool] = True

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """None."""
        return {}

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """w <- shrink w + factor u."""
        gradient, frame = state.pop(HELD), cast("Spreading", update.frame)
        rest = frame.add_lift(gradient.clone(memory_format=torch.contiguous_format), update.core, -1.0)
        root = update.clock.weight2**0.5
        # Not |R|^2, which leaves the range of float32 where R does not.
        size = torch.hypot(frame.lift_squares(corrected(update)).sqrt().mul_(root), rest.abs())
        scale = size.add_(update.eps * root).clamp_min_(torch.finfo(size.dtype).tiny)
        joint = frame.add_lift(rest, update.moments[FIRST], 1.0)
        update.move(weights, joint.div_(scale).mul_(root / update.clock.weight1))


def corrected(update: Update) -> Tensor:
    """v / c2 of Adam, (*rows, r_1, ..., r_N); v over its mass where the transport carries one."""
    v, mass = update.moments[SECOND], update.moments.get(mass_of(SECOND))
    return v / update.clock.weight2 if mass is None else v / mass.clamp_min(torch.finfo(v.dtype).tiny)
