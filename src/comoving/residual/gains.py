"""By how much the rule scales a gradient, and how fast the norm of an update may grow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Codec, Spec
from ..linalg import abs_squared, each_row, over
from ..validate import check_choice, check_float
from .base import Holding, Update

LAST = "scaled.norm"
"""The slot for the norm of the last scaled part."""
_SMALL = 1e-8


def gains(update: Update, per: str, size: Tensor, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """phi = |d| / (stretch (|z| + u |g|) + 1e-8), real, with as many modes as z; 0 where one of the norms overflows.

    Of a batch, with its members in front.

    u is the unit of rounding, machine epsilon: a channel of z below u |g| may hold nothing, where d, of earlier
    gradients, does, and a quotient of both would be without limit.

    Args:
        update: d and z, and the frame that they are coordinates in.
        per: "channel", one phi for every index along the whole modes, each of norms over the compressed ones (for a
            matrix with one compressed side GaLore's columns or rows); "tensor", one phi. Where no mode is whole, or
            the frame is not mode-wise, both are one phi.
        size: |g|, (*rows).
        stretch: the factor of z.

    Returns:
        phi, (*rows) where it is one of each tensor, and |d| of all channels together, (*rows).
    """
    d, z, rows = update.direction, update.core, update.rows
    everything = tuple(range(rows, z.ndim))
    modes = everything if per == "tensor" or update.compressed is None else update.compressed
    if rows and modes is not everything:
        modes = tuple(n + rows for n in modes)
    own, length = _norms(z, modes), _norms(d, modes)
    floor = over((size * (stretch * torch.finfo(own.dtype).eps)).add_(_SMALL), own)
    phi = (length / torch.add(floor, own, alpha=stretch)).nan_to_num_(0.0, posinf=0.0)
    if modes == everything:  # a core of blocks has another order than its tensor
        return phi.reshape(z.shape[:rows]), length.reshape(z.shape[:rows])
    return phi, torch.linalg.vector_norm(each_row(length, rows), dim=-1) if rows else torch.linalg.vector_norm(length)


def _norms(x: Tensor, modes: tuple[int, ...]) -> Tensor:
    if len(modes) == x.ndim:
        return torch.linalg.vector_norm(x, dim=modes, keepdim=True)
    # Torch's own norms along leading modes are many times slower on the CPU.
    return abs_squared(x).sum(modes, keepdim=True).sqrt_()


def brake(size: Tensor, last: Tensor, growth: float, first: Tensor) -> tuple[Tensor, Tensor]:
    """The factor that keeps the norm of an update below growth (last + 1e-8), and the next ``last``, the norm after it.

    Before the first update that is not zero the limit is ``first``; the papers have none there. One that is zero leaves
    the limit as it was: in the papers a single zero gradient would stop all later steps, which could grow from 1e-8 by
    one percent each. What is below the root of machine epsilon times ``first`` counts as zero: it may be the rounding
    of a gradient that lies in the frame.

    Args:
        size: the norm before, real, (*rows), as are all of these.
        last: of the last update, 0 before the first.
        growth: >= 1.
        first: the limit of the first update.
    """
    after = torch.where(last > 0, (last + _SMALL) * growth, first).minimum(size)
    factor = after / size  # NaN for a size that is zero or NaN
    counts = size * factor > first * torch.finfo(size.dtype).eps ** 0.5  # not where 0 times infinity is NaN
    return factor.nan_to_num_(1.0), torch.where(counts, after, last)


@dataclass(frozen=True)
class Scaled(Holding):
    """What residuals share that scale part of the gradient by :func:`gains`, within the limit of :func:`brake`.

    The state is |s_last|, one number, in the slot "scaled.norm".

    Args:
        per: "channel" or "tensor"; see :func:`gains`.
        growth: by how much |s| may grow in a step, >= 1; None for no limit, not even the first one: what keeps |s|
            finite then is the floor under |z| alone.
    """

    per: str = "channel"
    growth: float | None = 1.01

    def __post_init__(self) -> None:
        check_choice("per", self.per, ("channel", "tensor"))
        if self.growth is not None:
            check_float("growth", self.growth, 1.0)

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """|s_last|, where growth is limited."""
        return {} if self.growth is None else {LAST: Spec((), dtype.to_real())}
