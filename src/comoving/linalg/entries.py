"""Entry by entry, complex numbers as pairs of real ones: complex arithmetic of torch takes up to six times as long."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_LEAST, _ROW, _LONG = 2**5, 2**12, 2**16
_WIDE = (torch.float32, torch.float64)


def pairs(x: Tensor) -> Tensor:
    """x itself where it is real; a complex one as real pairs, (*shape, 2), which share its storage where they can."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def abs_squared(x: Tensor) -> Tensor:
    """|x|^2 entry by entry, always real: x.real^2 + x.imag^2 for complex x."""
    squares = pairs(x).square()
    return squares[..., 0] + squares[..., 1] if x.is_complex() else squares


def over(figure: Tensor, x: Tensor) -> Tensor:
    """A figure a row, (*rows), as one that broadcasts against x of shape (*rows, ...); itself without dimensions."""
    return figure.reshape(*figure.shape, *[1] * (x.ndim - figure.ndim)) if figure.ndim else figure


def each_row(x: Tensor, rows: int) -> Tensor:
    """x with all entries of a row in one dimension, (*rows, entries)."""
    return x.reshape(*x.shape[:rows], prod(x.shape[rows:]))


def largest(x: Tensor, rows: int = 0) -> Tensor:
    """The largest |entry| of each row, real, (*rows); of a complex x the largest part, at least 1/sqrt(2) of that.

    0 where there is no entry.
    """
    sizes = pairs(x).abs()
    if not sizes.numel():
        return sizes.new_zeros(x.shape[:rows])
    return each_row(sizes, rows).amax(-1) if rows else sizes.amax()


def to_unit(x: Tensor, rows: int = 0) -> Tensor:
    """x, in place, each row with a largest entry of 1, or part of a complex one.

    Products of gradients would leave the range.
    """
    return x.div_(over(largest(x, rows).clamp_min(torch.finfo(x.dtype).tiny), x))


def unit_size(x: Tensor, rows: int = 0) -> Tensor:
    """x, each row with a largest real or imaginary part of 1, or zero: its squares stay in the range of float32."""
    if rows:
        return x / over(largest(x, rows).clamp_min(torch.finfo(x.dtype).tiny), x)
    low, high = torch.aminmax(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)
    return x / torch.maximum(-low, high).clamp_min(torch.finfo(x.dtype).tiny)


def lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """a + weight (b - a), a new tensor."""
    mixed = pairs(a).lerp(pairs(b), weight)
    return torch.view_as_complex(mixed) if a.is_complex() else mixed


def lerp_(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """a + weight (b - a), in place."""
    (torch.view_as_real(a) if a.is_complex() else a).lerp_(pairs(b), weight)
    return a


def quotient(a: Tensor, scale: Tensor) -> Tensor:
    """a / scale for real numbers ``scale`` of a's shape, a new tensor."""
    if not a.is_complex():
        return a / scale
    return torch.complex(a.real / scale, a.imag / scale)


def is_short(x: Tensor) -> bool:
    """Whether :func:`norm` of x is torch's own: real, in single or double precision, and not long."""
    return x.dtype in _WIDE and x.numel() <= _LONG


def norm(x: Tensor, rows: int = 0) -> Tensor:
    """The Frobenius norm of each row, real, (*rows), on x's device, float32 (float64 for double precision).

    Squares leave the range of float32 where the norm exceeds 1.8e19, which gives inf, and are lost below 1e-19.
    """
    real = pairs(x) if x.is_complex() else x
    dtype = None if real.dtype in _WIDE else torch.float32
    if rows:
        return _norm_of_rows(real, rows, dtype)
    size = real.numel()
    if size <= _LONG or real.device.type != "cpu" or not real.is_contiguous():
        return torch.linalg.vector_norm(real, dtype=dtype)
    # On the CPU torch adds all squares in a row: of ten million equal ones it loses 1%.
    width = _row(real.shape)
    if width > 4 * _ROW:
        real, width = torch.nn.functional.pad(real.view(-1), (0, -size % _ROW)), _ROW
    partial = torch.linalg.vector_norm(real.view(-1, width), dim=1, dtype=dtype)
    return torch.linalg.vector_norm(partial)


def _norm_of_rows(real: Tensor, rows: int, dtype: torch.dtype | None) -> Tensor:
    flat = each_row(real, rows)
    size = flat.shape[-1]
    if size > _LONG and real.device.type == "cpu":
        width = _row(real.shape[rows:])
        if width > 4 * _ROW:
            flat, width = torch.nn.functional.pad(flat, (0, -size % _ROW)), _ROW
        flat = torch.linalg.vector_norm(flat.unflatten(-1, (-1, width)), dim=-1, dtype=dtype)
        dtype = None
    return torch.linalg.vector_norm(flat, dim=-1, dtype=dtype)


def _row(shape: Sequence[int]) -> int:
    """How many entries the last modes have together: as many modes as make a row of _LEAST to _ROW, where they can."""
    width = shape[-1]
    for d in reversed(shape[:-1]):
        if width * d > _ROW and width >= _LEAST:
            break
        width *= d
    return width


def sgn_(x: Tensor) -> Tensor:
    """x / |x|, in place; 0 for 0, and for complex x where torch finds no phase: |x| infinite, or no normal number."""
    if not x.is_complex():
        return x.sgn_()
    torch.view_as_real(x.sgn_()).nan_to_num_(0.0, 0.0, 0.0)
    return x


def inner(a: Tensor, b: Tensor, rows: int = 0) -> Tensor:
    """Re <a, b> of each row, the real part of the sum over conj(a) b: real, (*rows)."""
    if rows:
        return torch.linalg.vecdot(each_row(pairs(a), rows), each_row(pairs(b), rows))
    return torch.dot(pairs(a).reshape(-1), pairs(b).reshape(-1))
