"""Two codes of four bits in a byte."""

import torch
from torch import Tensor


def width(count: int) -> int:
    """Bytes for so many codes."""
    return (count + 1) // 2


def pack(codes: Tensor) -> Tensor:
    """Codes 0 to 15, (..., n) uint8, as (..., ceil(n/2)) bytes: the first of each pair in the low half."""
    low, high = codes[..., ::2], codes[..., 1::2]
    packed = low.clone()
    packed[..., : high.shape[-1]] |= high << 4
    return packed


def unpack(packed: Tensor, count: int) -> Tensor:
    """The inverse: (..., count) uint8."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :count]
