"""How a parameter is seen: as it is, as a matrix, or real pairs as complex numbers."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .validate import check_choice, check_int

ViewName = Literal["tensor", "matrix", "pairs"]
VIEWS: tuple[ViewName, ...] = ("tensor", "matrix", "pairs")


@dataclass(frozen=True)
class Heads:
    """An attention weight seen by heads.

    rows      (h size, d_in) as (h, size, d_in): query, key and value projections, fused or not
    columns   (d_out, h size) as (d_out, h, size): the output projection

    Args:
        size: rows or columns of one head, >= 1.
        side: "rows" or "columns".
    """

    size: int
    side: Literal["rows", "columns"] = "rows"

    def __post_init__(self) -> None:
        check_int("size", self.size, 1)
        check_choice("side", self.side, ("rows", "columns"))

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The view's shape.

        Raises:
            ValueError: not a matrix, or a side that heads of this size do not fill.
        """
        place = 0 if self.side == "rows" else 1
        if len(stored) != 2 or stored[place] % self.size:
            raise ValueError(f"heads of {self.size} {self.side} do not fill a tensor of shape {stored}")
        return (*stored[:place], stored[place] // self.size, self.size, *stored[place + 1 :])


_WORKING = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex32: torch.complex64,
}


@dataclass(frozen=True)
class View:
    """The shape and field in which the engine sees a parameter.

    tensor   (d_1, ..., d_N) as stored
    matrix   (d_1, d_2 ... d_N): all modes but the first as one, for convolution kernels
    pairs    (d_1, ..., d_{N-1}) complex, from a real tensor whose last mode holds real and imaginary part

    or by heads, see :class:`Heads`.

    Half precision is worked on in float32, complex32 in complex64.

    Args:
        name: one of the three, or heads.
        shape: the parameter's own shape.
        dtype: the parameter's own dtype.
    """

    name: ViewName | Heads
    stored_shape: tuple[int, ...]
    stored_dtype: torch.dtype

    def __post_init__(self) -> None:
        check_view(self.name)
        if self.name == "matrix" and len(self.stored_shape) < 2:
            raise ValueError(f'view "matrix" needs at least two modes, got shape {self.stored_shape}')
        if self.name == "pairs" and (
            len(self.stored_shape) < 2 or self.stored_shape[-1] != 2 or self.stored_dtype.is_complex
        ):
            raise ValueError(
                f'view "pairs" needs a real tensor with a last mode of 2, got {self.stored_dtype} {self.stored_shape}'
            )

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape that the engine sees."""
        if isinstance(self.name, Heads):
            return self.name.shape(self.stored_shape)
        if self.name == "matrix":
            first, *rest = self.stored_shape
            return (first, int(torch.Size(rest).numel()))
        return self.stored_shape[:-1] if self.name == "pairs" else self.stored_shape

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the engine works in."""
        working = _WORKING.get(self.stored_dtype, self.stored_dtype)
        return working.to_complex() if self.name == "pairs" else working

    def see(self, x: Tensor) -> Tensor:
        """x, of the parameter's shape, in the engine's shape and working dtype; shares storage where it can."""
        x = x.to(_WORKING[x.dtype]) if x.dtype in _WORKING else x
        x = x.resolve_conj() if x.is_complex() else x  # autograd hands out lazily conjugated gradients
        seen = self._shared(x)
        return self._own(x) if seen is None else seen

    def see_storage(self, x: Tensor) -> Tensor | None:
        """x in the engine's shape and sharing x's storage, to be written to; None where :meth:`see` must copy."""
        return None if x.dtype in _WORKING or x.is_conj() else self._shared(x)

    def _shared(self, x: Tensor) -> Tensor | None:
        """x in the engine's shape without a copy; None where strides, or an odd offset of pairs, forbid it."""
        if self.name == "tensor":
            return x
        try:
            return torch.view_as_complex(x) if self.name == "pairs" else x.view(self.shape)
        except RuntimeError:
            return None

    def _own(self, x: Tensor) -> Tensor:
        """A copy of x in the engine's shape."""
        x = x.clone(memory_format=torch.contiguous_format)
        return torch.view_as_complex(x) if self.name == "pairs" else x.view(self.shape)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`see`, in working precision: x in the parameter's own shape."""
        return torch.view_as_real(x) if self.name == "pairs" else x.reshape(self.stored_shape)


def check_view(view: object) -> None:
    """Raise unless it is a view's name or heads."""
    if not isinstance(view, Heads):
        check_choice("view", view, VIEWS)
