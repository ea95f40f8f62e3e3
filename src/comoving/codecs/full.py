"""Plain storage, in the working precision or in bfloat16."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import each_row, norm
from .base import Spec, as_real


@dataclass(frozen=True)
class Full:
    """The tensor itself, in its own dtype: lossless, and decoded without a copy."""

    batched: ClassVar[bool] = True
    signed = True

    @property
    def positive(self) -> "Full":
        """Itself."""
        return self

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """One tensor, "value"."""
        return {"value": Spec(shape, dtype)}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The storage itself."""
        return stored["value"]

    def decode_onto(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """x plus the storage, a new tensor."""
        value = stored["value"]
        return torch.add(value, x, out=torch.empty_like(value))

    def encode(self, x: Tensor, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Copy x, unless x is the storage."""
        if x is not stored["value"]:
            stored["value"].copy_(x)
        return norm(x, rows)

    def scaled(self, stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """What is stored times a factor > 0."""
        return {"value": stored["value"] * factor}

    def error(self, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Zero."""
        value = stored["value"]
        return torch.zeros(value.shape[:rows] if rows else (), device=value.device)


@dataclass(frozen=True)
class BFloat16:
    """The tensor rounded to bfloat16: 2 bytes a real number, relative error at most 2^-8 an entry."""

    batched: ClassVar[bool] = True
    signed = True

    @property
    def positive(self) -> "BFloat16":
        """Itself: it has float32's exponents."""
        return self

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """One tensor, "value"; complex as pairs."""
        return {"value": Spec((*shape, 2) if dtype.is_complex else shape, torch.bfloat16)}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Cast up."""
        value = stored["value"]
        if members := value.ndim - len(shape) - dtype.is_complex:
            shape = (*value.shape[:members], *shape)
        out = torch.empty(shape, dtype=dtype, device=value.device)
        as_real(out).copy_(value)
        return out

    def decode_onto(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """x plus the tensor cast up."""
        return self.decode(stored, tuple(x.shape), x.dtype).add_(x)

    def encode(self, x: Tensor, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """Round to nearest."""
        stored["value"].copy_(as_real(x))
        return norm(x, rows)

    def scaled(self, stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """What is stored times a factor > 0."""
        return {"value": stored["value"] * factor}

    def error(self, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """2^-8 of the norm of what is stored."""
        value = each_row(stored["value"], rows) if rows else stored["value"]
        return torch.linalg.vector_norm(value, dim=-1 if rows else None, dtype=torch.float32) * 2.0**-8
