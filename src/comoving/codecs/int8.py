"""Blockwise 8-bit storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import each_row, norm
from ..validate import check_choice, check_int
from . import tables
from .base import Spec, as_real
from .grid import grid
from .root import Root, root
from .rounding import ROUNDINGS, SEED, Rounding, advanced, one_by_one, seeds, to_integers, to_levels

_CACHED = 2**18  # real numbers: a megabyte in float32
_RANGE = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Int8:
    """x ~ step * level: a byte a real number and one float32 step a block, from 1.2e-38 to 3.4e38.

    linear      levels -127, ..., 127 and step = max|x| / 127
    dynamic     256 levels in [-1, 1] that are dense near 0, down to 5.5e-7: the dynamic tree of 8-bit optimizers (arXiv
                2110.02861; :func:`comoving.codecs.tables.dynamic`). Its lowest level is -0.993, so that the step is
                max(max x, -min x / 0.993): all of the block lies between the outermost levels

    Each row of mode 0 is cut into ceil(n / block) blocks of nearly equal width; a last short block is filled up with
    zeros. What is too large for any step, as float64 can be, is stored as the outermost level.

    Args:
        block: largest number of reals in a block, >= 8.
        table: "linear", whose error is the same everywhere, step / 2 at most; or "dynamic", twice as coarse near the
            block's largest entry and finer by far where entries are a tenth of it or less.
        rounding: "nearest"; or "stochastic": to one of the two levels beside x, the nearer the likelier, so that
            E[decoded] = x, from a seed that is stored with the codes.
    """

    batched: ClassVar[bool] = True
    signed = True

    block: int = 256
    table: Literal["linear", "dynamic"] = "linear"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        check_int("block", self.block, 8)
        check_choice("table", self.table, ("linear", "dynamic"))
        check_choice("rounding", self.rounding, ROUNDINGS)

    @property
    def positive(self) -> Root:
        """Roots in as many bits, of the same kind of table."""
        return root(self.block, table=self.table, rounding=self.rounding)

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """Tensors "codes" (rows, blocks, width) int8, uint8 for "dynamic", and "step" (rows, blocks, 1) float32.

        With stochastic rounding a "seed" beside them, one int64.
        """
        cut = grid(shape, dtype, self.block)
        codes = Spec(cut.shape, torch.int8 if self.table == "linear" else torch.uint8)
        return {"codes": codes, "step": Spec((cut.rows, cut.blocks, 1), torch.float32), **seeds(self.rounding)}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """step * level, a new tensor."""
        real = dtype.to_real() if dtype.is_complex else dtype
        codes = stored["codes"]
        if self.table == "linear":
            # Cast first: a product of mixed dtypes takes a path that is many times slower on the CPU.
            levels = codes.to(real)
        else:
            levels = tables.table(tables.dynamic(), real, codes.device).levels[codes.int()]
        return grid(shape, dtype, self.block).join(levels.mul_(stored["step"]), shape, dtype)

    def decode_onto(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """x + step * levels, in one pass where levels are linear and rows are not padded."""
        codes, step = stored["codes"], stored["step"]
        members = codes.ndim - 3
        real = as_real(x)
        if self.table != "linear" or not real.is_contiguous() or codes.numel() != real.numel():
            return self.decode(stored, tuple(x.shape)[members:], x.dtype).add_(x)
        if members:  # no pass below asks whose row it is
            codes, step = codes.flatten(0, members), step.flatten(0, members)
        given, out = real.view(codes.shape), torch.empty(codes.shape, dtype=real.dtype, device=x.device)
        for rows in _row_slices(codes):
            values = out[rows].copy_(codes[rows])
            torch.addcmul(given[rows], values, step[rows].to(real.dtype), out=values)
        return torch.view_as_complex(out.view(real.shape)) if x.is_complex() else out.view(x.shape)

    def encode(self, x: Tensor, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Round to levels; overwrites x."""
        codes, step = stored["codes"], stored["step"]
        if rows and (SEED in stored or (codes.device.type == "cpu" and codes[0].numel() > _CACHED)):
            return one_by_one(self.encode, x, stored)
        values = grid(tuple(x.shape)[rows:], x.dtype, self.block).cut(x, rows)
        generator = advanced(stored, x.device)
        clamped = generator is not None or values.dtype == torch.float64  # alone can exceed the largest step
        norms: list[Tensor] = []
        for few in _row_slices(codes):
            block, own = values[few], step[few]
            norms.append(norm(block, rows))
            # Two reductions without a full-sized |x|. The floor keeps zero blocks and denormals out of the division; it
            # is stored, so that decoding agrees.
            top, bottom = block.amax(-1, keepdim=True), block.amin(-1, keepdim=True).neg_()
            if self.table == "linear":
                own.copy_(torch.maximum(top, bottom).div_(127).clamp_(_RANGE.tiny, _RANGE.max))
                rounded = to_integers(block.div_(own), generator)
                codes[few].copy_(rounded.clamp_(-127, 127) if clamped else rounded)
            else:
                lowest = -tables.dynamic()[0]
                own.copy_(torch.maximum(top, bottom.div_(lowest)).clamp_(_RANGE.tiny, _RANGE.max))
                scaled = block.div_(own)
                levels = tables.table(tables.dynamic(), scaled.dtype, scaled.device)
                codes[few].copy_(to_levels(scaled.contiguous(), levels, generator))
        return torch.cat(norms) if rows else norm(torch.stack(norms))

    def scaled(self, stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """What is stored times a factor > 0."""
        return {**stored, "step": stored["step"] * factor}

    def error(self, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Half a step for each entry, or half the wider gap beside its level; all of it where rounding is stochastic.

        sqrt(sum over blocks of width * (step / 2)^2) for linear levels.
        """
        codes, step, share = stored["codes"], stored["step"], 0.5 if self.rounding == "nearest" else 1.0
        if self.table == "linear":
            own = torch.linalg.vector_norm(each_row(step, rows), dim=-1) if rows else torch.linalg.vector_norm(step)
            return own * (sqrt(codes.shape[-1]) * share)
        gaps = tables.table(tables.dynamic(), torch.float32, step.device).gaps
        return norm(gaps[codes.int()].mul_(step), rows) * share


def _row_slices(codes: Tensor) -> list[slice]:
    """All at once, or as many along dimension 0 as stay in a CPU's cache while several passes go over them."""
    rows = codes.shape[0]
    step = max(1, _CACHED * rows // max(1, codes.numel())) if codes.device.type == "cpu" else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]
