"""Storage by row and column sums."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import norm
from ..validate import check_choice
from .base import Spec, as_real

_MOST = 2.0**126


@dataclass(frozen=True)
class RankOne:
    """x ~ S (r c^T): signs, and a rank-one matrix of the absolute values, of SMMF (arXiv 2412.08894).

    The entries in their order are seen as a matrix a x b, as nearly square as their number allows (a >= b; complex
    ones as pairs of reals). With |X| its absolute values

    r = |X| 1,   c = |X|^T 1,   x ~ S * r c^T / (1^T |X| 1)

    the best such matrix with X's row and column sums. S has a bit a number, eight a byte. Lossy beyond any bound on
    single entries; the rows of mode 0 are not apart from one another. Entries above 2^126/(ab), infinity too, count as
    that, so that no sum overflows.

    Args:
        signed: whether signs are stored; False for x >= 0.
    """

    batched: ClassVar[bool] = True

    signed: bool = True

    def __post_init__(self) -> None:
        check_choice("signed", self.signed, (True, False))

    @property
    def positive(self) -> "RankOne":
        """Without signs."""
        return RankOne(signed=False)

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """Tensors "rows" (a,) and "columns" (b,), real, and "signs" (ceil(ab/8),) uint8."""
        a, b = _sides(shape, dtype)
        real = dtype.to_real() if dtype.is_complex else dtype
        found = {"rows": Spec((a,), real), "columns": Spec((b,), real)}
        return found | {"signs": Spec((-(-a * b // 8),), torch.uint8)} if self.signed else found

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """S * r c^T, a new tensor."""
        left, right = stored["rows"], stored["columns"]
        if left.ndim == 1:
            values = torch.outer(left, right).view(-1)
        else:
            shape = (*left.shape[:-1], *shape)
            values = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
        if self.signed:
            values = torch.where(_unpacked(stored["signs"], values.shape[-1]), values, -values)
        return torch.view_as_complex(values.view(*shape, 2)) if dtype.is_complex else values.view(shape)

    def decode_onto(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """x plus the stored tensor."""
        return self.decode(stored, tuple(x.shape)[stored["rows"].ndim - 1 :], x.dtype).add_(x)

    def encode(self, x: Tensor, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """The sums, the shorter of them divided by that of all entries; the sign of 0 is negative."""
        a, b = _sides(tuple(x.shape)[rows:], x.dtype)
        matrix = as_real(x).reshape(*x.shape[:rows], a, b)
        sizes = (matrix.abs() if self.signed else matrix).clamp_max_(_MOST / (a * b))
        left, right = stored["rows"].copy_(sizes.sum(-1)), stored["columns"].copy_(sizes.sum(-2))
        total = left.sum(-1, keepdim=True)
        right.div_(torch.where(total > 0, total, 1))
        if self.signed:
            stored["signs"].copy_(_packed(matrix.flatten(-2) > 0))
        return norm(x, rows)

    def scaled(self, stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """What is stored times a factor > 0."""
        return {**stored, "rows": stored["rows"] * factor}

    def error(self, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """From entries that are not negative: |X - r c^T|^2 <= |X|^2 + |r c^T|^2, |X| <= the norm of the sums."""
        left, right = norm(stored["rows"], rows), norm(stored["columns"], rows)
        sums = torch.minimum(left, right * stored["rows"].sum(-1))
        return torch.hypot(sums, left * right)


def _sides(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """(a, b) with ab the number of reals, a >= b, and b as large as that allows."""
    size = prod(shape) * (2 if dtype.is_complex else 1)
    b = next((k for k in range(isqrt(size), 0, -1) if size % k == 0), 1)
    return size // b, b


def _bits(device: torch.device) -> Tensor:
    """1, 2, 4, ..., 128, made on the device: to bring them there it would be waited for."""
    return torch.bitwise_left_shift(1, torch.arange(8, dtype=torch.uint8, device=device))


def _packed(bits: Tensor) -> Tensor:
    """(..., n) bool as (..., ceil(n/8)) bytes, the first bit lowest."""
    missing = -bits.shape[-1] % 8
    octets = torch.nn.functional.pad(bits.to(torch.uint8), (0, missing)).unflatten(-1, (-1, 8))
    return (octets * _bits(bits.device)).sum(-1, dtype=torch.uint8)


def _unpacked(octets: Tensor, count: int) -> Tensor:
    bits = octets.unsqueeze(-1) & _bits(octets.device)
    return bits.ne(0).flatten(-2)[..., :count]
