"""What the engine asks of a frame, and of the part that says how frames are laid out on a tensor."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ..codecs import Spec
from .overlap import Overlap

Rank = int | float | tuple[int | None, ...]
Side = Literal["auto", "left", "right", "both"]
SIDES: tuple[Side, ...] = ("auto", "left", "right", "both")
Ranks = tuple[int | None, ...]


class Frame(Protocol):
    """An orthonormal set of directions F in the space of a tensor: F^H F = I. A value; its tensors are not changed."""

    @property
    def ranks(self) -> Ranks:
        """What was asked of the layout's ``start``: entries per mode or bond, None where all is whole."""
        ...

    def project(self, x: Tensor) -> Tensor:
        """The coordinates F^H x, of the core's shape."""
        ...

    def lift(self, z: Tensor) -> Tensor:
        """The tensor F z."""
        ...

    def add_lift(self, out: Tensor, z: Tensor, alpha: float, beta: float = 1.0) -> Tensor:
        """out <- beta out + alpha F z, in place."""
        ...

    def overlap(self, older: Any) -> Overlap:
        """F^H F_older."""
        ...

    def defect(self) -> Tensor:
        """The largest entry of |F^H F - I| over the stored factors, a real scalar, or one for each row."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What the optimizer's state stores, by names that begin with "frame."."""
        ...


class Spreading(Frame, Protocol):
    """A frame of explicit factors, whose entries each have a share of the variances in the core."""

    def lift_squares(self, v: Tensor) -> Tensor:
        """|F|^2 v, entry by entry: the variances of F z for independent z of the real variances v."""
        ...


class Layout(Protocol):
    """How a frame lies on a tensor; a frozen dataclass of hyper-parameters, without tensors."""

    batched: ClassVar[bool]
    """Whether its frames may be stacked: tensors with rows in front, each framed as it would be alone."""

    @property
    def makes(self) -> type:
        """The type of its frames: finders that do not fill it are refused at construction."""
        ...

    @property
    def modal(self) -> bool:
        """Whether the modes of the core are those of the tensor."""
        ...

    def ranks(self, shape: tuple[int, ...], rank: Rank, side: Side = "auto") -> Ranks:
        """The ranks for a tensor of this shape; all None where no mode is worth compressing.

        Raises:
            ValueError: a rank outside its interval, a tuple that does not fit.
            TypeError: a rank of another type.
        """
        ...

    def core_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """The shape of the coordinates."""
        ...

    def mass_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """The core's shape, but 1 along modes that no change of frame mixes."""
        ...

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """What a frame of these ranks stores."""
        ...

    def load(self, state: Mapping[str, Tensor], shape: tuple[int, ...], like: Tensor | None = None) -> Frame:
        """The frame whose tensors are in the state; whole where there are none.

        Args:
            state: of the parameter.
            shape: of the tensor that is framed.
            like: a tensor of the core's shape, in the dtype and on the device to work in, for frames that do not
                store their directions; None where the state has no core yet.
        """
        ...

    def start(self, like: Tensor, ranks: Ranks, older: Any, seed: int) -> Frame:
        """An orthonormal frame of these ranks to search from.

        Args:
            like: a tensor of the shape, dtype and device to be framed.
            ranks: of :meth:`ranks`.
            older: the frame so far, whose leading directions are kept, or None.
            seed: of the Gaussian directions that fill up; drawn on the CPU, hence equal on all devices and processes.
        """
        ...
