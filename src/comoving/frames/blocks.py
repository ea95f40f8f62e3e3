"""Independent frames for the blocks along one mode: experts of a mixture, heads of an attention."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..codecs import Spec
from ..validate import check_int
from .base import Frame, Layout, Rank, Ranks, Side
from .modes import Modes


@dataclass(frozen=True)
class Blocks:
    """Every slice along a mode has a frame, moments, feedback and step count of its own.

    A slice is stepped only when its gradient is not zero: the experts of a mixture that saw no token keep weights and
    moments as they are and cost no time, and those that never saw one have no state. Which slices are idle is read on
    the host, once per parameter and step.

    Args:
        mode: along which the blocks lie, >= 0.
        inner: the layout of each block's frame.
    """

    batched: ClassVar[bool] = False

    mode: int = 0
    inner: Layout = field(default_factory=Modes)

    def __post_init__(self) -> None:
        check_int("mode", self.mode, 0)
        lays_out = ("ranks", "core_shape", "load", "start")
        if isinstance(self.inner, type) or not all(hasattr(self.inner, name) for name in lays_out):
            raise TypeError(f"inner must be a layout of frames, such as Modes(), got {self.inner!r}")
        if isinstance(self.inner, Blocks):
            raise ValueError(f"inner must be a layout of one frame, got {self.inner!r}: blocks have no blocks")

    @property
    def makes(self) -> type:
        """The type of each block's frame."""
        return self.inner.makes

    @property
    def modal(self) -> bool:
        """Whether the modes of a block's core stay what they are."""
        return self.inner.modal

    def count(self, shape: tuple[int, ...]) -> int:
        """The number of blocks.

        Raises:
            ValueError: a mode that the tensor does not have, blocks of fewer than two modes, or none, or empty ones.
        """
        if self.mode >= len(shape) or len(shape) < 3:
            raise ValueError(
                f"blocks along mode {self.mode} need a tensor of that mode and two more, got shape {shape}; "
                f"a matrix can be seen as heads"
            )
        if 0 in shape:
            raise ValueError(f"blocks along mode {self.mode} of shape {shape} are empty")
        return shape[self.mode]

    def block_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one block."""
        self.count(shape)
        return shape[: self.mode] + shape[self.mode + 1 :]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The blocks of x, as views."""
        return x.unbind(self.mode)

    def ranks(self, shape: tuple[int, ...], rank: Rank, side: Side = "auto") -> Ranks:
        """Those of every block."""
        return self.inner.ranks(self.block_shape(shape), rank, side)

    def core_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """The cores of all blocks, stacked."""
        return (self.count(shape), *self.inner.core_shape(self.block_shape(shape), ranks))

    def mass_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """Stacked likewise."""
        return (self.count(shape), *self.inner.mass_shape(self.block_shape(shape), ranks))

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """Each block's, behind its number."""
        own = self.inner.schema(self.block_shape(shape), ranks, dtype)
        return {f"{b}.{name}": spec for b in range(self.count(shape)) for name, spec in own.items()}

    def load(self, state: Mapping[str, Tensor], shape: tuple[int, ...], like: Tensor | None = None) -> Frame:
        """Refused: a frame belongs to a block."""
        raise TypeError("the blocks of a tensor have frames, the tensor has none")

    def start(self, like: Tensor, ranks: Ranks, older: Any, seed: int) -> Frame:
        """Refused: a frame belongs to a block."""
        raise TypeError("the blocks of a tensor have frames, the tensor has none")
