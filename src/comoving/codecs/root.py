"""Blockwise storage of second moments by their roots."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import norm
from ..validate import check_choice, check_int
from . import nibbles
from .base import Part
from .grid import grid

_LEAST = 2.0**-63  # its square is float32's smallest normal number


@dataclass(frozen=True)
class Root:
    """x ~ (step * code)^2 for real x >= 0: 8 or 4 bits a number and one float32 step = sqrt(max x) / 255 or 15 a block.

    Codes are 1 to 255, or 15: what is divided by its root must not become 0 where others of its block are large. An
    entry far below its block's largest therefore comes out too large, step^2 at least, which makes a step smaller,
    never larger. Roots are rounded to nearest. The step of a block that is not zero is at least 2^-63, so that step^2
    is a normal number.

    Args:
        block: largest number of entries in a block, >= 8.
        bits: 8, or 4: two codes a byte.
    """

    block: int = 256
    bits: Literal[8, 4] = 8

    def __post_init__(self) -> None:
        check_int("block", self.block, 8)
        check_choice("bits", self.bits, (8, 4))

    signed: ClassVar[bool] = False

    @property
    def positive(self) -> "Root":
        """Itself."""
        return self

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """Tensors "codes" (rows, blocks, width), half as wide for 4 bits, uint8, and "step" (rows, blocks, 1) float32.

        With 4 bits an odd width has a last half byte that stays 0.
        """
        cut = grid(shape, dtype, self.block)
        width = cut.width if self.bits == 8 else nibbles.width(cut.width)
        codes = Part((cut.rows, cut.blocks, width), torch.uint8)
        return {"codes": codes, "step": Part((cut.rows, cut.blocks, 1), torch.float32)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(step * code)^2, a new tensor."""
        cut = grid(shape, dtype, self.block)
        codes = parts["codes"] if self.bits == 8 else nibbles.unpack(parts["codes"], cut.width)
        return cut.join(codes.to(dtype).mul_(parts["step"]).square_(), shape, dtype)

    def decode_onto(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """x plus the stored tensor."""
        return self.decode(parts, tuple(x.shape), x.dtype).add_(x)

    def encode(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Round the roots to the nearest code."""
        top = 2**self.bits - 1
        roots = grid(tuple(x.shape), x.dtype, self.block).cut(x).sqrt()
        largest = roots.amax(-1, keepdim=True)
        step = parts["step"].copy_(torch.where(largest > 0, (largest / top).clamp_min(_LEAST), 0))
        codes = (roots / step.clamp_min(_LEAST)).round_().clamp_(1, top).to(torch.uint8)
        parts["codes"].copy_(codes if self.bits == 8 else nibbles.pack(codes))
        return norm(x)

    def scale(self, parts: Mapping[str, Tensor], factor: float) -> None:
        """Multiply what is stored by a factor > 0."""
        parts["step"].mul_(factor**0.5)

    def error(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Of code c an entry is off by step^2 (c + 1/4) at most, by step^2 where it was raised to the first code."""
        stored = parts["codes"]
        codes = stored if self.bits == 8 else nibbles.unpack(stored, 2 * stored.shape[-1])
        return norm(codes.float().add_(0.25).mul_(parts["step"].square()))
