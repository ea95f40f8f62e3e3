"""What the decompositions accept: dtypes in which LAPACK and cuSOLVER work, sizes inside their interval."""

from math import prod

import torch
from torch import Tensor

_ACCEPTED = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def require_dtype(name: str, *tensors: Tensor) -> None:
    """All tensors in one accepted dtype.

    Raises:
        TypeError: for half precision, integers or a mixture.
    """
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1:
        raise TypeError(f"{name}: one dtype for all tensors, not {', '.join(sorted(map(str, dtypes)))}")
    if not dtypes <= set(_ACCEPTED):
        raise TypeError(f"{name}: float32, float64, complex64 or complex128, not {dtypes.pop()}; cast it up first")


def require_within(name: str, value: int, low: int, high: int) -> int:
    """``value`` itself where low <= value <= high.

    Raises:
        ValueError: otherwise, with the value and the interval.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} = {value} is outside [{low}, {high}]")
    return value


def require_order(name: str, x: Tensor, order: int | None, least: int) -> int:
    """How many of the last dimensions of x are tensor modes: all of them unless ``order`` says otherwise.

    Raises:
        ValueError: where order is outside [least, x.ndim] or a mode is empty.
    """
    order = require_within(f"{name}: order", x.ndim if order is None else order, least, x.ndim)
    if 0 in x.shape[x.ndim - order :]:
        raise ValueError(f"{name}: modes of size 0 in {tuple(x.shape)}")
    return order


def per_mode(name: str, values: int | tuple[int, ...] | list[int], highs: list[int]) -> list[int]:
    """One integer for each entry of ``highs``, within [1, high]; a single integer stands for all.

    Raises:
        ValueError: for a wrong count or a value outside its interval.
    """
    listed = [values] * len(highs) if isinstance(values, int) else list(values)
    if len(listed) != len(highs):
        raise ValueError(f"{name}: {len(listed)} values for {len(highs)} places")
    return [require_within(f"{name}[{n}]", v, 1, h) for n, (v, h) in enumerate(zip(listed, highs, strict=True))]


def train_rank_limits(sizes: list[int] | torch.Size) -> list[int]:
    """The largest rank of each of the N - 1 unfoldings (d_1 ... d_k, d_{k+1} ... d_N)."""
    return [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes))]


def trouble(flag: Tensor) -> bool:
    """Whether a flag of trouble, one boolean, is raised; reads it on the host.

    A tensor without data, on the device "meta", raises none: a step that is rehearsed for its memory
    (:mod:`comoving.memory`) goes the usual way.
    """
    return not flag.is_meta and bool(flag)
