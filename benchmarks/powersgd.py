"""What torch's PowerSGD hook sends."""

from collections.abc import Iterable

from torch import Tensor


def compressed(p: Tensor, rank: int) -> bool:
    """Whether the hook sends two factors in place of a gradient: where that halves the bytes."""
    rows = p.shape[0] if p.ndim else 1
    return p.ndim > 1 and 2 * rank * (rows + p.numel() // rows) < p.numel()


def sent_bytes(params: Iterable[Tensor], rank: int) -> int:
    """Bytes that a process puts into sums in a step: factors of rank ``rank``, and gradients that are left whole."""
    total = 0
    for p in params:
        rows = p.shape[0] if p.ndim else 1
        numbers = rank * (rows + p.numel() // rows) if compressed(p, rank) else p.numel()
        total += numbers * p.element_size()
    return total


def equal_rank(params: Iterable[Tensor], size: int) -> int:
    """The rank up to which the hook sends no more than so many bytes a step, at least 1."""
    known, low, high = [*params], 1, 1
    while sent_bytes(known, high) <= size and high < max(max(p.shape, default=1) for p in known):
        high *= 2
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sent_bytes(known, middle) <= size else (low, middle - 1)
    return low
