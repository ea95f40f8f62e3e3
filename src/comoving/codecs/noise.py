"""How much a codec's rounding adds to a tensor, before there is one: for entries that are Gaussian."""

from functools import cache
from math import erf, pi, sqrt

import torch

from . import nibbles
from .base import Codec
from .full import BFloat16, Full
from .grid import grid
from .int4 import Int4
from .int8 import Int8
from .root import Root

_DRAWS = 64  # quantiles of a block's largest entry that the mean is taken over


def noise(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """rho = E|x - decode(encode(x))|^2 / E|x|^2 of one rounding, x of independent Gaussian entries.

    A blockwise codec rounds an entry to the nearest of the levels M l_k, l_k in [-1, 1], M = max|x| over the w entries
    of a block. The largest entry is a level itself; given M the others are Gaussian between -M and M. So for unit
    variance

    rho = (w - 1)/w  E_M [ sum_k  int_{M a_k}^{M b_k} (x - M l_k)^2 phi(x) dx / (2 Phi(M) - 1) ]
    P(M < y) = (2 Phi(y) - 1)^w

    with a_k, b_k half way to the neighbours of l_k; for levels that are even and close it is E[M^2] / (12 n^2), n of
    them on either side of 0. :class:`comoving.codecs.Root` stores x^2, and rho is that of the root |x|. bfloat16 has
    2^7 steps between powers of two:

    rho = 2^-14 / 12  sum_e 4^e P(2^e <= |x| < 2^(e+1))

    Args:
        codec: Full, BFloat16, Int8, Int4 or Root.
        shape: of the tensor, which is cut into blocks by it.
        dtype: complex numbers count as pairs of reals.

    Raises:
        TypeError: another codec.
    """
    if isinstance(codec, Full):
        return 0.0
    if isinstance(codec, BFloat16):
        return 2.0**-14 / 12 * sum(4.0**e * (_inside(2.0 ** (e + 1)) - _inside(2.0**e)) for e in range(-20, 4))
    if isinstance(codec, Int8 | Int4 | Root):
        return _blockwise(_levels(codec), grid(shape, dtype, codec.block).width)
    raise TypeError(f"the noise of {codec!r} is not known")


def _inside(x: float) -> float:
    """P(|X| < x) of a standard normal X."""
    return erf(x / sqrt(2))


@cache
def _levels(codec: Int8 | Int4 | Root) -> tuple[float, ...]:
    """The levels l_k, rising, as fractions of a block's largest entry; those of |x| on both sides for roots."""
    if isinstance(codec, Root):
        top = 2**codec.bits - 1
        return tuple(k / top for k in range(-top, top + 1) if k != 0)
    if isinstance(codec, Int8):
        return tuple(k / 127 for k in range(-127, 128))
    if codec.table == "linear":
        return tuple(k / 7 for k in range(-7, 8))
    codes = nibbles.pack(torch.arange(16, dtype=torch.uint8, device="cpu").view(2, 1, 8))
    step = torch.ones(2, 1, 1, device="cpu")
    return tuple(codec.decode({"codes": codes, "step": step}, (2, 8), torch.float64).flatten().tolist())


@cache
def _blockwise(levels: tuple[float, ...], width: int) -> float:
    """The formula of :func:`noise`, as a mean over quantiles of M."""
    if width == 1:
        return 0.0
    level = torch.tensor(levels, dtype=torch.float64, device="cpu")
    middle = (level[1:] + level[:-1]) / 2
    inside = ((torch.arange(_DRAWS, dtype=torch.float64, device="cpu") + 0.5) / _DRAWS) ** (1 / width)
    largest = torch.special.ndtri((1 + inside) / 2).unsqueeze(1)
    ends = largest * torch.cat([-middle.new_ones(1), middle, middle.new_ones(1)])
    density, mass = torch.exp(-ends.square() / 2) / sqrt(2 * pi), torch.special.ndtr(ends)
    center = largest * level
    # int (x - c)^2 phi = [ (1 + c^2) Phi - (x - 2 c) phi ]
    value = (1 + center.square()) * mass.diff() - (ends * density).diff() + 2 * center * density.diff()
    return float((value.sum(1) / inside).mean()) * (width - 1) / width
