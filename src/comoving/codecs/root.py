"""Blockwise storage of second moments by their roots."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import norm
from ..validate import check_int
from .base import Part
from .grid import grid


@dataclass(frozen=True)
class Root:
    """x ~ (step * code)^2 for real x >= 0: one byte a number and one float32 step = sqrt(max x) / 255 a block.

    Codes are 1 to 255: what is divided by its root must not become 0 where others of its block are large. An entry far
    below its block's largest therefore comes out too large, (step)^2 at least, which makes a step smaller, never
    larger. Roots are rounded to nearest.

    Args:
        block: largest number of entries in a block, >= 8.
    """

    block: int = 256

    def __post_init__(self) -> None:
        check_int("block", self.block, 8)

    @property
    def positive(self) -> "Root":
        """Itself."""
        return self

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """Tensors "codes" (rows, blocks, width) uint8 and "step" (rows, blocks, 1) float32."""
        cut = grid(shape, dtype, self.block)
        return {"codes": Part(cut.shape, torch.uint8), "step": Part((cut.rows, cut.blocks, 1), torch.float32)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(step * codes)^2, a new tensor."""
        values = parts["codes"].to(dtype).mul_(parts["step"]).square_()
        return grid(shape, dtype, self.block).join(values, shape, dtype)

    def decode_onto(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """x plus the stored tensor."""
        return self.decode(parts, tuple(x.shape), x.dtype).add_(x)

    def encode(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Round the roots to the nearest code."""
        roots = grid(tuple(x.shape), x.dtype, self.block).cut(x).sqrt()
        step = parts["step"]
        step.copy_(roots.amax(-1, keepdim=True).div_(255))
        scaled = roots / step.clamp_min(torch.finfo(torch.float32).tiny)
        parts["codes"].copy_(scaled.round_().clamp_(1, 255))
        return norm(x)

    def error(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Of code c an entry is off by step^2 (c + 1/4) at most, by step^2 where it was raised to the first code."""
        codes = parts["codes"].float().add_(0.25)
        return norm(codes.mul_(parts["step"].square()))
