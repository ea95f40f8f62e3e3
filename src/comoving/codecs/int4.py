"""Blockwise 4-bit storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import each_row, norm
from ..validate import check_choice, check_int
from . import nibbles, tables
from .base import Spec
from .grid import grid
from .root import Root, root
from .rounding import ROUNDINGS, SEED, Rounding, advanced, one_by_one, seeds, to_integers, to_levels

_RANGE = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Int4:
    """x ~ step * level: two codes a byte and one float32 step a block, from 1.2e-38 to 3.4e38.

    linear      levels -7, ..., 7 and step = max|x| / 7
    normal      16 levels in [-1, 1], 0 among them, and step = max|x|: quantiles of a normal distribution, as in QLoRA's
                NF4 (arXiv 2305.14314)

    Rows of mode 0 are cut as for :class:`comoving.codecs.Int8`. What is too large for any step, as float64 can be, is
    stored as the outermost level.

    Args:
        block: largest number of reals in a block, >= 8.
        table: "linear" or "normal", which tracks moments in full precision better (weights off by 10 to 35% of their
            way after 30 steps, against 14 to 60%).
        rounding: "nearest" or "stochastic", as for :class:`comoving.codecs.Int8`.
    """

    batched: ClassVar[bool] = True
    signed = True

    block: int = 64
    table: Literal["linear", "normal"] = "normal"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        check_int("block", self.block, 8)
        check_choice("table", self.table, ("linear", "normal"))
        check_choice("rounding", self.rounding, ROUNDINGS)

    @property
    def positive(self) -> Root:
        """Roots in as many bits."""
        return root(self.block, bits=4, rounding=self.rounding)

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """Tensors "codes" (rows, blocks, ceil(width/2)) uint8 and "step" (rows, blocks, 1) float32.

        With stochastic rounding a "seed" beside them, one int64.
        """
        cut = grid(shape, dtype, self.block)
        codes = Spec((cut.rows, cut.blocks, nibbles.width(cut.width)), torch.uint8)
        return {"codes": codes, "step": Spec((cut.rows, cut.blocks, 1), torch.float32), **seeds(self.rounding)}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """step * level, a new tensor."""
        cut = grid(shape, dtype, self.block)
        codes = nibbles.unpack(stored["codes"], cut.width)
        real = dtype.to_real() if dtype.is_complex else dtype
        if self.table == "linear":
            levels = codes.to(real).sub_(7)
        else:
            levels = tables.table(tables.normal(), real, codes.device).levels[codes.int()]
        return cut.join(levels.mul_(stored["step"]), shape, dtype)

    def decode_onto(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """x plus the stored tensor."""
        return self.decode(stored, tuple(x.shape)[stored["codes"].ndim - 3 :], x.dtype).add_(x)

    def encode(self, x: Tensor, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Round to levels."""
        if rows and SEED in stored:
            return one_by_one(self.encode, x, stored)
        step, size = stored["step"], norm(x, rows)
        values = grid(tuple(x.shape)[rows:], x.dtype, self.block).cut(x, rows)
        largest = torch.maximum(values.amax(-1, keepdim=True), values.amin(-1, keepdim=True).neg())
        top = 7 if self.table == "linear" else 1
        step.copy_(largest.div_(top).clamp_(_RANGE.tiny, _RANGE.max))
        scaled, generator = values / step, advanced(stored, x.device)
        if self.table == "linear":
            codes = to_integers(scaled, generator).clamp_(-7, 7).add_(7)
        else:
            # In the values' own precision: a middle between two levels belongs to the lower one.
            codes = to_levels(scaled, tables.table(tables.normal(), scaled.dtype, scaled.device), generator)
        stored["codes"].copy_(nibbles.pack(codes.to(torch.uint8)))
        return size

    def scaled(self, stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """What is stored times a factor > 0."""
        return {**stored, "step": stored["step"] * factor}

    def error(self, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Half a step, or half the wider gap beside its level, for each entry; all of it where rounding is stochastic.

        Bytes that hold one code count as two.
        """
        step, codes, share = stored["step"], stored["codes"], 0.5 if self.rounding == "nearest" else 1.0
        if self.table == "linear":
            own = torch.linalg.vector_norm(each_row(step, rows), dim=-1) if rows else torch.linalg.vector_norm(step)
            return own * (sqrt(2 * codes.shape[-1]) * share)
        gaps = tables.table(tables.normal(), torch.float32, step.device).gaps
        return norm(gaps[nibbles.unpack(codes, 2 * codes.shape[-1]).int()].mul_(step), rows) * share
