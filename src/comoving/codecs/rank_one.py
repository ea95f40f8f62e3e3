"""Storage by row and column sums."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

from ..linalg import norm
from ..validate import check_choice
from .base import Part, as_real

_MOST = 2.0**126
_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


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

    signed: bool = True

    def __post_init__(self) -> None:
        check_choice("signed", self.signed, (True, False))

    @property
    def positive(self) -> "RankOne":
        """Without signs."""
        return RankOne(signed=False)

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """Tensors "rows" (a,) and "columns" (b,), real, and "signs" (ceil(ab/8),) uint8."""
        a, b = _sides(shape, dtype)
        real = dtype.to_real() if dtype.is_complex else dtype
        parts = {"rows": Part((a,), real), "columns": Part((b,), real)}
        return parts | {"signs": Part((-(-a * b // 8),), torch.uint8)} if self.signed else parts

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """S * r c^T, a new tensor."""
        values = torch.outer(parts["rows"], parts["columns"]).view(-1)
        if self.signed:
            values = torch.where(_unpacked(parts["signs"], values.numel()), values, -values)
        return torch.view_as_complex(values.view(*shape, 2)) if dtype.is_complex else values.view(shape)

    def decode_onto(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """x plus the stored tensor."""
        return self.decode(parts, tuple(x.shape), x.dtype).add_(x)

    def encode(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The sums, the shorter of them divided by that of all entries; the sign of 0 is negative."""
        a, b = _sides(tuple(x.shape), x.dtype)
        matrix = as_real(x).reshape(a, b)
        sizes = (matrix.abs() if self.signed else matrix).clamp_max_(_MOST / (a * b))
        rows, columns = parts["rows"].copy_(sizes.sum(1)), parts["columns"].copy_(sizes.sum(0))
        total = rows.sum()
        columns.div_(torch.where(total > 0, total, 1))
        if self.signed:
            parts["signs"].copy_(_packed(matrix.reshape(-1) > 0))
        return norm(x)

    def scaled(self, parts: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """What is stored times a factor > 0."""
        return {**parts, "rows": parts["rows"] * factor}

    def error(self, parts: Mapping[str, Tensor]) -> Tensor:
        """From entries that are not negative: |X - r c^T|^2 <= |X|^2 + |r c^T|^2, |X| <= the norm of the sums."""
        rows, columns = norm(parts["rows"]), norm(parts["columns"])
        total = parts["rows"].sum()
        sums = torch.minimum(rows, columns * total)
        return torch.hypot(sums, rows * columns)


def _sides(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """(a, b) with ab the number of reals, a >= b, and b as large as that allows."""
    size = prod(shape) * (2 if dtype.is_complex else 1)
    b = next((k for k in range(isqrt(size), 0, -1) if size % k == 0), 1)
    return size // b, b


def _packed(bits: Tensor) -> Tensor:
    """(n,) bool as (ceil(n/8),) bytes, the first bit lowest."""
    missing = -bits.numel() % 8
    octets = torch.nn.functional.pad(bits.to(torch.uint8), (0, missing)).view(-1, 8)
    return (octets * torch.tensor(_BITS, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def _unpacked(octets: Tensor, count: int) -> Tensor:
    bits = octets.unsqueeze(1) & torch.tensor(_BITS, dtype=torch.uint8, device=octets.device)
    return bits.ne(0).view(-1)[:count]
