"""Bytes in the low bits of float32 numbers, beside the number that they round to.

Of a number's 23 bits of mantissa the lowest ``width`` hold what is kept there, and the others the number, rounded
stochastically: to one of its neighbours, the nearer the likelier, so that changes much smaller than their distance are
made on average. The number is read with the low bits as they are, which makes it larger by less than 2^(width - 23) of
itself.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import nibbles

CHECK = 4
"""Bytes that tell whether somebody else has changed the numbers since."""
_MIX, _STEP, _PLACE = (-2048144789, -1028477387), 0x9E3779B1, 0x27D4EB2F
_PERIOD = 2**16


@dataclass(frozen=True)
class Mantissa:
    """Where so many bytes are within so many numbers: in planes of 8 bits, then of 4, then of single bits.

    Args:
        entries: numbers, >= 1.
        bytes: that are kept in them, ``CHECK`` of our own not counted.
    """

    entries: int
    bytes: int

    @cached_property
    def planes(self) -> tuple[int, int, int]:
        """How many planes of 8, of 4, and of 1 bit there are."""
        whole, rest = divmod(self.bytes + CHECK, self.entries)
        half = int(rest >= self.entries // 2 > 0)
        rest -= half * (self.entries // 2)
        return whole, half, -(-8 * rest // self.entries)

    @property
    def width(self) -> int:
        """How many bits of every number are taken."""
        whole, half, single = self.planes
        return 8 * whole + 4 * half + single

    def take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers without what is kept in them, and this: zeros where the numbers are not as :meth:`put` left them.

        Args:
            x: float32, (*rows, entries), with at most one dimension of rows.

        Returns:
            Numbers like x, and uint8 (*rows, bytes).
        """
        bits = x.contiguous().view(torch.int32)
        numbers, kept = bits & -(1 << self.width), self._gather(bits)
        stands = (kept[..., -CHECK:] == _check(numbers)).all(-1, keepdim=True)
        return numbers.view(torch.float32), kept[..., :-CHECK] * stands

    def put(self, x: Tensor, kept: Tensor, step: int | Tensor) -> Tensor:
        """Numbers rounded to what the high bits hold, with bytes in the low ones, in a new tensor.

        Args:
            x: float32, (*rows, entries).
            kept: uint8, (*rows, bytes).
            step: what the random bits of the rounding follow from, beside a number's place; those of all rows do alike.
        """
        low = (1 << self.width) - 1
        random = _scattered(self.entries, step, x.device) & low
        numbers = (x.contiguous().view(torch.int32) + random).bitwise_and_(~low)
        self._spread(torch.cat([kept, _check(numbers)], -1), numbers)
        return numbers.view(torch.float32)

    def _spread(self, kept: Tensor, numbers: Tensor) -> None:
        """Put bytes into the low bits of int32, (*rows, entries), which are zero."""
        n, (whole, half, single) = self.entries, self.planes
        for i, byte in enumerate(_bytes_of(numbers)[:whole]):
            byte.copy_(kept[..., i * n : (i + 1) * n])
        at, shift = whole * n, 8 * whole
        if half:
            codes = nibbles.unpack(kept[..., at : at + n // 2], n - n % 2)
            numbers[..., : n - n % 2] |= codes.int() << shift
            at, shift = at + n // 2, shift + 4
        bits = (kept[..., at:, None] >> _eight(kept)).bitwise_and_(1).flatten(-2)
        for i in range(single):
            plane = bits[..., i * n : (i + 1) * n]
            numbers[..., : plane.shape[-1]] |= plane.int() << shift + i

    def _gather(self, bits: Tensor) -> Tensor:
        """The inverse: uint8 (*rows, bytes and check)."""
        n, (whole, half, single) = self.entries, self.planes
        parts = _bytes_of(bits)[:whole]
        at, shift = whole * n, 8 * whole
        if half:
            parts.append(nibbles.pack((bits[..., : n - n % 2] >> shift & 15).to(torch.uint8)))
            at, shift = at + n // 2, shift + 4
        left = 8 * (self.bytes + CHECK - at)
        planes = [(bits[..., : left - i * n] >> shift + i & 1).to(torch.uint8) for i in range(single)]
        if planes:
            own = torch.cat(planes, -1).unflatten(-1, (-1, 8))
            parts.append((own << _eight(own)).sum(-1, dtype=torch.uint8))
        return torch.cat(parts, -1)


def _bytes_of(bits: Tensor) -> list[Tensor]:
    """The bytes of int32, the lowest first, as views."""
    return [*bits.view(torch.uint8).unflatten(-1, (-1, 4)).unbind(-1)]


def _eight(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _check(numbers: Tensor) -> Tensor:
    """Four bytes that follow from the sum of int32 numbers; of zeros, zeros."""
    pairs = numbers.shape[-1] % 2 == 0  # half the work, and no copy as int64
    total = (numbers.view(torch.int64) if pairs else numbers).sum(-1)
    total = total ^ total >> 32
    shifts = torch.arange(0, 8 * CHECK, 8, device=numbers.device)
    return (total[..., None] >> shifts & 255).to(torch.uint8)


def _scattered(entries: int, step: int | Tensor, device: torch.device) -> Tensor:
    """Pseudo-random int32 of place and step, by MurmurHash3's finalizer; the same again every 2^16 places."""
    start = step.to(device, torch.int32) * _signed(_STEP) if isinstance(step, Tensor) else _signed(step * _STEP)
    x = torch.arange(min(entries, _PERIOD), dtype=torch.int32, device=device) * _signed(_PLACE) + start
    for factor, shift in zip(_MIX, (16, 13), strict=True):
        x = (x ^ x >> shift) * factor
    x = x ^ x >> 16
    return x if entries <= _PERIOD else x.repeat(-(-entries // _PERIOD))[:entries]


def _signed(value: int) -> int:
    """The int32 of these 32 bits."""
    return (value + 2**31) % 2**32 - 2**31
