"""Blockwise linear 8-bit storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ..linalg import norm
from ..validate import check_int
from .base import Part, as_real
from .grid import grid
from .root import Root

_CACHED = 2**18  # real numbers: a megabyte in float32


@dataclass(frozen=True)
class Int8:
    """x ~ step * code: one signed byte a real number and one float32 step = max|x| / 127 a block (at least 1.2e-38).

    Each row of mode 0 is cut into ceil(n / block) blocks of nearly equal width; a last short block is filled up with
    zeros. Rounding is to nearest, so an entry is off by at most step / 2.

    Args:
        block: largest number of reals in a block, >= 8.
    """

    block: int = 256

    def __post_init__(self) -> None:
        check_int("block", self.block, 8)

    @property
    def positive(self) -> Root:
        """Roots in as many bits."""
        return Root(self.block)

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """Tensors "codes" (rows, blocks, width) int8 and "step" (rows, blocks, 1) float32."""
        cut = grid(shape, dtype, self.block)
        return {"codes": Part(cut.shape, torch.int8), "step": Part((cut.rows, cut.blocks, 1), torch.float32)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """step * codes, a new tensor."""
        real = dtype.to_real() if dtype.is_complex else dtype
        # Cast first: a product of mixed dtypes takes a path that is many times slower on the CPU.
        return grid(shape, dtype, self.block).join(parts["codes"].to(real).mul_(parts["step"]), shape, dtype)

    def decode_onto(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """x + step * codes, in one pass where rows are not padded."""
        codes, step = parts["codes"], parts["step"]
        real = as_real(x)
        if not real.is_contiguous() or codes.numel() != real.numel():
            return self.decode(parts, tuple(x.shape), x.dtype).add_(x)
        given, out = real.view(codes.shape), torch.empty(codes.shape, dtype=real.dtype, device=x.device)
        for rows in _row_slices(codes):
            values = out[rows].copy_(codes[rows])
            torch.addcmul(given[rows], values, step[rows].to(real.dtype), out=values)
        return torch.view_as_complex(out.view(real.shape)) if x.is_complex() else out.view(x.shape)

    def encode(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Round to the nearest code; overwrites x."""
        codes, step = parts["codes"], parts["step"]
        values = grid(tuple(x.shape), x.dtype, self.block).cut(x)
        norms: list[Tensor] = []
        for rows in _row_slices(codes):
            block, own = values[rows], step[rows]
            norms.append(norm(block))
            # Two reductions without a full-sized |x|. The floor keeps zero blocks and denormals out of the division; it
            # is stored, so that decoding agrees.
            largest = torch.maximum(block.amax(-1, keepdim=True), block.amin(-1, keepdim=True).neg_())
            own.copy_(largest.div_(127).clamp_min_(torch.finfo(torch.float32).tiny))
            codes[rows].copy_(block.div_(own).round_())
        return norm(torch.stack(norms))

    def scale(self, parts: Mapping[str, Tensor], factor: float) -> None:
        """Multiply what is stored by a factor > 0."""
        parts["step"].mul_(factor)

    def error(self, parts: Mapping[str, Tensor]) -> Tensor:
        """sqrt(sum over blocks of width * (step / 2)^2)."""
        return torch.linalg.vector_norm(parts["step"]) * (sqrt(parts["codes"].shape[-1]) / 2)


def _row_slices(codes: Tensor) -> list[slice]:
    """All rows at once, or as many at a time as stay in a CPU's cache while several passes go over them."""
    rows = codes.shape[0]
    step = max(1, _CACHED * rows // max(1, codes.numel())) if codes.device.type == "cpu" else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]
