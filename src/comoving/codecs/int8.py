"""Blockwise linear 8-bit storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..validate import check_int
from .base import Part, as_real


@dataclass(frozen=True)
class Int8:
    """x ~ step * code: one signed byte a real number and one float32 step = max|x| / 127 a block.

    Each row of mode 0 is cut into ceil(n / block) blocks of nearly equal width; a last short block is filled up with
    zeros. Rounding is to nearest, so an entry is off by at most step / 2.

    Args:
        block: largest number of reals in a block, >= 8.
    """

    block: int = 256

    def __post_init__(self) -> None:
        check_int("block", self.block, 8)

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """Tensors "codes" (rows, blocks, width) int8 and "step" (rows, blocks, 1) float32."""
        rows, blocks, width, _ = self._grid(shape, dtype)
        return {"codes": Part((rows, blocks, width), torch.int8), "step": Part((rows, blocks, 1), torch.float32)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """step * codes, a new tensor."""
        rows, _, _, length = self._grid(shape, dtype)
        real = dtype.to_real() if dtype.is_complex else dtype
        # Cast first: a product of mixed dtypes takes a path that is many times slower on the CPU.
        values = parts["codes"].to(real).mul_(parts["step"]).view(rows, -1)[:, :length].contiguous()
        return torch.view_as_complex(values.view(*shape, 2)) if dtype.is_complex else values.view(shape)

    def encode(self, x: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Round to the nearest code; overwrites x."""
        codes, step = parts["codes"], parts["step"]
        rows, blocks, width = codes.shape
        values = as_real(x).reshape(rows, -1)
        missing = blocks * width - values.shape[1]
        grid = (pad(values, (0, missing)) if missing else values).view(codes.shape)
        # Two reductions without a full-sized |x|.
        largest = torch.maximum(grid.amax(-1, keepdim=True), grid.amin(-1, keepdim=True).neg_())
        step.copy_(largest / 127)
        codes.copy_(grid.div_(torch.where(step > 0, step, 1)).round_().clamp_(-127, 127))

    def error(self, parts: Mapping[str, Tensor]) -> Tensor:
        """sqrt(sum over blocks of width * (step / 2)^2)."""
        return torch.linalg.vector_norm(parts["step"]) * (sqrt(parts["codes"].shape[-1]) / 2)

    def _grid(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int, int, int]:
        """Rows, blocks a row, width of a block, reals a row."""
        rows = shape[0]
        length = prod(shape[1:]) * (2 if dtype.is_complex else 1)
        blocks = max(1, -(-length // self.block))
        return rows, blocks, max(1, -(-length // blocks)), length
