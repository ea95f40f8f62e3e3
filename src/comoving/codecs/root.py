"""Blockwise storage of second moments by their roots."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import norm
from ..validate import check_choice, check_int
from . import nibbles, tables
from .base import Spec
from .grid import grid
from .rounding import ROUNDINGS, SEED, Rounding, advanced, one_by_one, seeds, to_levels, up

_LEAST, _MOST = 2.0**-63, 2.0**63  # their squares are normal float32 numbers


@dataclass(frozen=True)
class Root:
    """x ~ (step * level)^2 for real x >= 0: 8 or 4 bits a number and one float32 step a block.

    linear      levels 1, ..., 255, or 15 for 4 bits, and step = sqrt(max x) / 255 or 15
    dynamic     255 levels from 3.3e-7 to 1 and step = sqrt(max x): the unsigned dynamic tree of 8-bit optimizers (arXiv
                2110.02861; :func:`comoving.codecs.tables.dynamic_positive`). The paper stores x itself in it, 0 among
                the levels; roots reach over 13 decades of x instead of 7, and are what is divided by

    No level is 0: what is divided by its root must not become 0 where others of its block are large. An entry far
    below its block's largest therefore comes out too large, as the square of the least level, which makes a step
    smaller, never larger. The step of a block that is not zero is at least 2^-63, so that step^2 is a normal number.
    What is above 2^126, infinity too, is stored as 2^126: an infinite step would decode to NaN.

    Args:
        block: largest number of entries in a block, >= 8.
        bits: 8, or 4: two codes a byte.
        table: "linear", or "dynamic" with 8 bits.
        rounding: "nearest": the root to the nearest level; or "stochastic": to one of the two levels beside it, so that
            E[decoded] = x (not of the root) above the square of the least level, from a seed that is stored with the
            codes.
    """

    batched: ClassVar[bool] = True

    block: int = 256
    bits: Literal[8, 4] = 8
    table: Literal["linear", "dynamic"] = "linear"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        check_int("block", self.block, 8)
        check_choice("bits", self.bits, (8, 4))
        check_choice("table", self.table, ("linear", "dynamic") if self.bits == 8 else ("linear",))
        check_choice("rounding", self.rounding, ROUNDINGS)

    signed = False

    @property
    def positive(self) -> "Root":
        """Itself."""
        return self

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """Tensors "codes" (rows, blocks, width), half as wide for 4 bits, uint8, and "step" (rows, blocks, 1) float32.

        With 4 bits an odd width has a last half byte that stays 0. With stochastic rounding a "seed" beside them, one
        int64.
        """
        cut = grid(shape, dtype, self.block)
        width = cut.width if self.bits == 8 else nibbles.width(cut.width)
        codes = Spec((cut.rows, cut.blocks, width), torch.uint8)
        return {"codes": codes, "step": Spec((cut.rows, cut.blocks, 1), torch.float32), **seeds(self.rounding)}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(step * level)^2, a new tensor."""
        cut = grid(shape, dtype, self.block)
        codes = stored["codes"] if self.bits == 8 else nibbles.unpack(stored["codes"], cut.width)
        levels = self._levels(dtype, codes.device)
        roots = codes.to(dtype) if levels is None else levels.levels[codes.int()]
        return cut.join(roots.mul_(stored["step"]).square_(), shape, dtype)

    def decode_onto(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """x plus the stored tensor."""
        return self.decode(stored, tuple(x.shape)[stored["codes"].ndim - 3 :], x.dtype).add_(x)

    def encode(self, x: Tensor, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Round the roots to levels."""
        if rows and SEED in stored:
            return one_by_one(self.encode, x, stored)
        roots = grid(tuple(x.shape)[rows:], x.dtype, self.block).cut(x, rows).sqrt().clamp_max_(_MOST)
        largest, generator = roots.amax(-1, keepdim=True), advanced(stored, x.device)
        top = 2**self.bits - 1 if self.table == "linear" else 1
        step = stored["step"].copy_(torch.where(largest > 0, (largest / top).clamp_min(_LEAST), 0))
        scaled = roots / step.clamp_min(_LEAST)
        levels = self._levels(scaled.dtype, scaled.device)
        if levels is not None:
            codes = to_levels(scaled, levels, generator, power=2)
        elif generator is None:
            codes = scaled.round_().clamp_(1, top)
        else:
            below = scaled.floor().clamp_(1, top - 1)
            share = (scaled.square_() - below.square()).div_(2 * below + 1)
            codes = below.add_(up(share, generator))
        codes = codes.to(torch.uint8)
        stored["codes"].copy_(codes if self.bits == 8 else nibbles.pack(codes))
        return norm(x, rows)

    def scaled(self, stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """What is stored times a factor > 0."""
        return {**stored, "step": stored["step"] * factor**0.5}

    def error(self, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Of level c with gaps of at most h beside it an entry is off by step^2 (c h + h^2 / 4) at most.

        By step^2 (2 c h + h^2) where rounding is stochastic; by step^2 c^2 where it was raised to the least level.
        """
        packed, share = stored["codes"], 0.5 if self.rounding == "nearest" else 1.0
        codes = packed if self.bits == 8 else nibbles.unpack(packed, 2 * packed.shape[-1])
        levels = self._levels(torch.float32, codes.device)
        if levels is None:
            lost = codes.float().mul_(2 * share).add_(share * share)
        else:
            gaps = levels.gaps * share
            squares = gaps * (2 * levels.levels + gaps)
            squares[0] = torch.maximum(squares[0], levels.levels[0].square())
            lost = squares[codes.int()]
        return norm(lost.mul_(stored["step"].square()), rows)

    def _levels(self, dtype: torch.dtype, device: torch.device) -> tables.Table | None:
        """The table; None where levels are the codes themselves."""
        return None if self.table == "linear" else tables.table(tables.dynamic_positive(), dtype, device)


@cache
def root(
    block: int, bits: Literal[8, 4] = 8, table: Literal["linear", "dynamic"] = "linear", rounding: Rounding = "nearest"
) -> Root:
    """The codec of these fields, checked once: it is asked for at every step."""
    return Root(block, bits, table, rounding)
