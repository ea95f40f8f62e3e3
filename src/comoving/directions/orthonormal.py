"""Pairs of orthonormal bases (U, V) of a matrix: drawn, checked, and what a matrix has inside of them."""

import torch
from torch import Tensor

from ..draws import gaussian
from ..linalg import orthogonality_defect, orthonormalize

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_HALF_TOLERANCE = 3e-2  # a column's rounding errors of 2^-9 add up


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, float32 for half precision."""
    return dtype if dtype in _TOLERANCE else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def random_directions(shape: tuple[int, ...], like: Tensor, *key: int) -> Tensor:
    """Orthonormal columns of a uniformly random span, (*batch, d, r), in like's working dtype and on its device.

    Args:
        shape: (*batch, d, r) with r <= d.
        like: says where.
        key: integers that seed the draw; the global generators stay as they are.
    """
    return orthonormalize(gaussian(shape, like.new_empty(0, dtype=working_dtype(like.dtype)), *key))


def check_directions(name: str, basis: Tensor, length: int) -> None:
    """Raise unless ``basis`` is (length, r), 0 <= r <= length, with orthonormal columns.

    Raises:
        TypeError: no tensor of real floating-point numbers.
        ValueError: another shape, or columns that are not orthonormal.
    """
    if not isinstance(basis, Tensor) or not basis.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(basis, 'dtype', type(basis).__name__)}")
    if basis.ndim != 2 or basis.shape[0] != length or basis.shape[1] > length:
        raise ValueError(f"{name} must be ({length}, r) with r in [0, {length}], got {tuple(basis.shape)}")
    if basis.shape[1] == 0:
        return
    defect = float(orthogonality_defect(basis.detach().to(working_dtype(basis.dtype))))
    limit = _TOLERANCE.get(basis.dtype, _HALF_TOLERANCE)
    if not defect <= limit:  # NaN too
        raise ValueError(
            f"{name} must have orthonormal columns: max |U^T U - I| must lie in [0, {limit:g}], is {defect:g}"
        )


def inside(x: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
    """U^T X V, (r, k); U^T X without V. X is cast to the dtype of U."""
    left = u.mT @ x.to(u.dtype)
    return left if v is None else left @ v


def add_lifted(x: Tensor, u: Tensor, core: Tensor, v: Tensor | None, factor: float = 1.0) -> None:
    """x <- x + factor U C V^T, in place; half precision is rounded once."""
    lifted = u @ core if v is None else (u @ core) @ v.mT
    x.copy_(x.to(u.dtype).add(lifted, alpha=factor)) if x.dtype != u.dtype else x.add_(lifted, alpha=factor)
