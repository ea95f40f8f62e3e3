"""Numbers of at most about 1 in blocks of 4 bits, by the mu-law."""

from math import log1p

import torch
from torch import Tensor

from . import nibbles
from .grid import Grid

_TOP = 7
_TINY = torch.finfo(torch.float32).tiny


def compress(x: Tensor, mu: float, cut: Grid, rows: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and steps of x, blockwise: c = sgn(x) log(1 + mu |x|) / log(1 + mu) to the nearest of -7, ..., 7 steps.

    step = max |c| / 7. Steps are even in c, hence finest near 0 where mu |x| is large, and as good as even in x where
    it is small: unlike a table of levels, what is companded depends on the size of x, and 1 is the largest it is for.

    Args:
        x: (*rows, ...), real or complex; as pairs of reals.
        mu: > 0.
        cut: of x, or of a member of it.
        rows: how many dimensions in front count members.

    Returns:
        codes (*rows, R, B, ceil(W/2)) uint8, two a byte, and steps (*rows, R, B, 1) float32.
    """
    values = cut.cut(x, rows)
    c = values.abs().mul_(mu).log1p_().div_(log1p(mu)).mul_(values.sgn())
    step = (c.abs().amax(-1, keepdim=True) / _TOP).clamp_min_(_TINY).float()
    codes = c.div_(step).round_().clamp_(-_TOP, _TOP).add_(_TOP)
    return nibbles.pack(codes.to(torch.uint8)), step


def expand(codes: Tensor, step: Tensor, mu: float, cut: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The inverse, x of this shape and dtype, (*rows, *shape)."""
    real = dtype.to_real() if dtype.is_complex else dtype
    c = (nibbles.unpack(codes, cut.width).to(real).sub_(_TOP)).mul_(step)
    return cut.join(_expanded(c, mu), shape, dtype)


def gaps(codes: Tensor, step: Tensor, mu: float) -> Tensor:
    """How far x may be from what it became, entry by entry, (*rows, R, B, W'): half a step up, where gaps are wider."""
    level = nibbles.unpack(codes, 2 * codes.shape[-1]).float().sub_(_TOP).abs_()
    # All codes zero, before anything was stored: steps of zero.
    return _expanded((level + 0.5) * step, mu) - _expanded(level * step, mu)


def _expanded(c: Tensor, mu: float) -> Tensor:
    return c.abs().mul_(log1p(mu)).expm1_().div_(mu).mul_(c.sgn())
