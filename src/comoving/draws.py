"""Random numbers that are the same on every device and process, and leave the global generators alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_DRAWN = {torch.float32, torch.float64, torch.complex64, torch.complex128}


def scramble(*numbers: int) -> int:
    """A seed in [0, 2^63) from integers: neighbours lead to unrelated seeds (Steele et al., SplitMix64, 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator(*key: int) -> torch.Generator:
    """A generator on the CPU, seeded from these integers."""
    return torch.Generator("cpu").manual_seed(scramble(*key))


def sent(x: Tensor, like: Tensor) -> Tensor:
    """x, which is on the host, in like's dtype and on its device, for which the host does not wait."""
    return x.to(like.device, like.dtype, non_blocking=True)


def gaussian(shape: tuple[int, ...], like: Tensor, *key: int) -> Tensor:
    """Standard normal entries in like's dtype, real or complex, and on its device; drawn on the CPU, in like's dtype.

    Half precision is drawn in single.
    """
    return sent(_drawn(shape, like, *key), like)


def gaussian_rows(shape: tuple[int, ...], like: Tensor, seeds: Sequence[int]) -> Tensor:
    """What :func:`gaussian` draws from each of these seeds, (rows, *shape), sent to the device at once."""
    return sent(torch.stack([_drawn(shape, like, seed) for seed in seeds]), like)


def _drawn(shape: tuple[int, ...], like: Tensor, *key: int) -> Tensor:
    dtype = like.dtype if like.dtype in _DRAWN else torch.float32
    return torch.randn(shape, dtype=dtype, generator=generator(*key), device="cpu")
