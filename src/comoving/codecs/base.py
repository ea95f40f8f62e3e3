"""What the engine asks of a codec."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class Spec(NamedTuple):
    """Shape and dtype of one stored tensor.

    ``scalar`` marks numbers that stay where the step count is; ``seed`` those of them that random numbers are drawn
    from: they begin as :func:`comoving.draws.scramble` of the optimizer's seed, the parameter and the name, those of
    frames as their layout decides. ``own`` marks other integers of which every row of a batch has its own, as it has of
    seeds; all rows share those that are not marked. ``kept`` marks what an encoding finds as the last one left it, and
    goes on from; zero before the first, and where the shape has changed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    scalar: bool = False
    seed: bool = False
    own: bool = False
    kept: bool = False


class Codec(Protocol):
    """Stores one tensor as several named ones; a frozen dataclass without tensors. No block crosses rows of mode 0.

    Complex tensors are stored as pairs of reals. A codec that rounds stochastically keeps a number "seed", which every
    encoding advances and nothing else touches.

    A batch stacks such tensors, all of one shape, along a dimension in front, and so is what is stored of it: a
    member's is the same as if it were alone, its seed among them. Shapes that are given are those of one member.
    """

    batched: ClassVar[bool]
    """Whether batches can be stored: only then is the number of dimensions in front ever other than 0."""

    @property
    def signed(self) -> bool:
        """Whether signs are stored; a codec without them serves second moments alone."""
        ...

    @property
    def positive(self) -> "Codec":
        """The codec of this kind for second moments: real, not negative, and divided by, so that none may become 0."""
        ...

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """The stored tensors for a tensor of this shape and dtype; all zero, they decode to zero."""
        ...

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor, contiguous: of :class:`comoving.codecs.Full` the storage itself, else a new one.

        Of what is stored of a batch (*rows, *shape).
        """
        ...

    def decode_onto(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """x plus the stored tensor, contiguous and new: x and what is stored stay as they are."""
        ...

    def encode(self, x: Tensor, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Write x into the stored tensors, in place, and return its Frobenius norm, or that of each member, (*rows).

        Args:
            x: (*rows, *shape); may be overwritten.
            stored: of as many members.
            rows: how many dimensions in front count members, 0 or 1.
        """
        ...

    def scaled(self, stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """What is stored of the tensor times a factor > 0: by its step where there is one, without rounding anew.

        The given tensors stay as they are; what does not change is the same tensor.
        """
        ...

    def error(self, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """An upper bound, real, (*rows), on the Frobenius norm of what the last encoding lost."""
        ...


def as_real(x: Tensor) -> Tensor:
    """x itself if real, else the pairs (re, im) along a new last dimension, sharing storage."""
    return torch.view_as_real(x) if x.is_complex() else x
