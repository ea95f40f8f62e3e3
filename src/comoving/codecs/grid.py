"""How blockwise codecs cut a tensor: rows of mode 0 into blocks of nearly equal width."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import as_real


class Grid(NamedTuple):
    """(rows, blocks, width) of real numbers; a row has ``length`` of them, and the last block is filled up with zeros.

    No block crosses rows, so that sharding mode 0 cuts none.
    """

    rows: int
    blocks: int
    width: int
    length: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, blocks, width)."""
        return self.rows, self.blocks, self.width

    def cut(self, x: Tensor) -> Tensor:
        """x as real numbers in blocks: a view where no row is filled up."""
        values = as_real(x).reshape(self.rows, -1)
        missing = self.blocks * self.width - self.length
        return (pad(values, (0, missing)) if missing else values).view(self.shape)

    def join(self, values: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The inverse, contiguous."""
        rows = values.view(self.rows, -1)[:, : self.length].contiguous()
        return torch.view_as_complex(rows.view(*shape, 2)) if dtype.is_complex else rows.view(shape)


def grid(shape: tuple[int, ...], dtype: torch.dtype, block: int) -> Grid:
    """The cut of a tensor of this shape into blocks of at most this many real numbers."""
    rows = shape[0] if shape else 1
    length = prod(shape[1:]) * (2 if dtype.is_complex else 1)
    blocks = max(1, -(-length // block))
    return Grid(rows, blocks, max(1, -(-length // blocks)), length)
