"""Blockwise 4-bit storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from ..linalg import norm
from ..validate import check_choice, check_int
from . import nibbles
from .base import Part
from .grid import grid
from .root import Root


@dataclass(frozen=True)
class Int4:
    """x ~ step * level: two codes a byte and one float32 step a block (at least 1.2e-38), rounded to the nearest level.

    linear      levels -7, ..., 7 and step = max|x| / 7
    normal      16 levels in [-1, 1], 0 among them, and step = max|x|: quantiles of a normal distribution, as in QLoRA's
                NF4 (arXiv 2305.14314)

    Rows of mode 0 are cut as for :class:`comoving.codecs.Int8`.

    Args:
        block: largest number of reals in a block, >= 8.
        table: "linear" or "normal", which tracks moments in full precision better (weights off by 10 to 35% of their
            way after 30 steps, against 14 to 60%).
    """

    block: int = 64
    table: Literal["linear", "normal"] = "normal"

    def __post_init__(self) -> None:
        check_int("block", self.block, 8)
        check_choice("table", self.table, ("linear", "normal"))

    @property
    def positive(self) -> Root:
        """Roots in as many bits."""
        return Root(self.block, bits=4)

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """Tensors "codes" (rows, blocks, ceil(width/2)) uint8 and "step" (rows, blocks, 1) float32."""
        cut = grid(shape, dtype, self.block)
        codes = Part((cut.rows, cut.blocks, nibbles.width(cut.width)), torch.uint8)
        return {"codes": codes, "step": Part((cut.rows, cut.blocks, 1), torch.float32)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """step * level, a new tensor."""
        cut = grid(shape, dtype, self.block)
        codes = nibbles.unpack(parts["codes"], cut.width)
        real = dtype.to_real() if dtype.is_complex else dtype
        if self.table == "linear":
            levels = codes.to(real).sub_(7)
        else:
            levels = _table(_normal(), real, codes.device)[codes.int()]
        return cut.join(levels.mul_(parts["step"]), shape, dtype)

    def decode_onto(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """x plus the stored tensor."""
        return self.decode(parts, tuple(x.shape), x.dtype).add_(x)

    def encode(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Round to the nearest level."""
        step, size = parts["step"], norm(x)
        values = grid(tuple(x.shape), x.dtype, self.block).cut(x)
        largest = torch.maximum(values.amax(-1, keepdim=True), values.amin(-1, keepdim=True).neg())
        top = 7 if self.table == "linear" else 1
        step.copy_(largest.div_(top).clamp_min_(torch.finfo(torch.float32).tiny))
        scaled = values / step
        if self.table == "linear":
            codes = scaled.round_().clamp_(-7, 7).add_(7)
        else:
            # In the values' own precision: a middle between two levels belongs to the lower one.
            codes = torch.bucketize(scaled, _table(_middles(), scaled.dtype, scaled.device))
        parts["codes"].copy_(nibbles.pack(codes.to(torch.uint8)))
        return size

    def scale(self, parts: Mapping[str, Tensor], factor: float) -> None:
        """Multiply what is stored by a factor > 0."""
        parts["step"].mul_(factor)

    def error(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Half a step, or half the wider gap beside its level, for each entry."""
        step, codes = parts["step"], parts["codes"]
        if self.table == "linear":
            return torch.linalg.vector_norm(step) * (sqrt(2 * codes.shape[-1]) / 2)
        gaps = _table(_half_gaps(), torch.float32, step.device)
        return norm(gaps[nibbles.unpack(codes, 2 * codes.shape[-1]).int()].mul_(step))


@cache
def _table(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sixteen numbers on a device, brought there once: at every step it would wait for them."""
    return torch.tensor(numbers, dtype=dtype, device=device)


@cache
def _normal() -> tuple[float, ...]:
    """Eight levels from 0 up to 1 at equally likely quantiles, seven from -1 below 0, and 0."""
    edge = 0.9677083  # between the outermost probabilities of 15 and of 16 equal bins
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64, device="cpu"))[:-1]
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64, device="cpu"))[:-1]
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64, device="cpu")]) / above[0]
    return tuple(levels.sort().values.tolist())


@cache
def _middles() -> tuple[float, ...]:
    levels = _normal()
    return tuple((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False))


@cache
def _half_gaps() -> tuple[float, ...]:
    levels = _normal()
    gaps = [0.0, *((b - a) / 2 for a, b in zip(levels, levels[1:], strict=False)), 0.0]
    return tuple(max(a, b) for a, b in zip(gaps, gaps[1:], strict=False))
