"""How blockwise codecs cut a tensor: rows of mode 0 into blocks of nearly equal width.

Those of a batch are cut alike, behind the dimension that counts its members.
"""

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

    def cut(self, x: Tensor, members: int = 0) -> Tensor:
        """x as real numbers in blocks, (*members, rows, blocks, width): a view where no row is filled up.

        Args:
            x: (*members, ...), each member of the shape that is cut.
            members: how many dimensions in front count them.
        """
        shape = (*x.shape[:members], *self.shape) if members else self.shape
        values = as_real(x).reshape(*shape[:-2], self.length)
        missing = self.blocks * self.width - self.length
        return (pad(values, (0, missing)) if missing else values).view(shape)

    def join(self, values: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The inverse, contiguous: (*members, *shape)."""
        if values.ndim > 3:
            shape = (*values.shape[:-3], *shape)
        if self.blocks * self.width != self.length:
            values = values.flatten(-2)[..., : self.length].contiguous()
        return torch.view_as_complex(values.view(*shape, 2)) if dtype.is_complex else values.view(shape)


def grid(shape: tuple[int, ...], dtype: torch.dtype, block: int) -> Grid:
    """The cut of a tensor of this shape into blocks of at most this many real numbers."""
    rows = shape[0] if shape else 1
    length = prod(shape[1:]) * (2 if dtype.is_complex else 1)
    blocks = max(1, -(-length // block))
    return Grid(rows, blocks, max(1, -(-length // blocks)), length)
