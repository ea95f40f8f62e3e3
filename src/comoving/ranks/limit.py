"""What a budget is given as: bytes, text with a unit, or a share of AdamW's state."""

from collections.abc import Iterable
from math import floor

from torch import Tensor

from ..units import UNITS, parse_bytes


def parse_budget(value: object) -> int | float | None:
    """An int of bytes, or a float in (0, 1], the share of AdamW's state; None as it is.

    Args:
        value: an int of bytes; text with a unit, ``"400MB"``, or in percent, ``"25%"``; a float in (0, 1].

    Raises:
        TypeError: of another type.
        ValueError: not positive, a share above 1, or text that is no size; with the known units.
    """
    if value is None:
        return None
    if isinstance(value, str) and value.strip().endswith("%"):
        return _share(_number(value.strip()[:-1], value) / 100, value)
    if isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"budget must be a size, {value!r} is none: {error}; or a share, such as '25%'") from None
    if isinstance(value, float):
        return _share(value, value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"budget must be bytes, a size with a unit, or a share of AdamW's state, got {value!r}")
    if value < 1:
        raise ValueError(f"budget must be >= 1 byte, got {value}")
    return value


def _number(text: str, value: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"budget must be a number before its %, or a size in one of {', '.join(UNITS)}, got {value!r}"
        ) from None


def _share(share: float, value: object) -> float:
    if not 0 < share <= 1:
        raise ValueError(
            f"budget must be a share of AdamW's state in (0, 1], or bytes as an int or with a unit, got {value!r}"
        )
    return share


def adamw_bytes(params: Iterable[Tensor]) -> int:
    """Bytes of torch's AdamW state in float32: two real or two complex numbers an entry, and the step count."""
    return sum(4 + p.numel() * (16 if p.is_complex() else 8) for p in params)


def limit_bytes(budget: int | float, params: Iterable[Tensor]) -> int:
    """The bytes that a parsed budget allows these projected parameters; a share is rounded down."""
    return budget if isinstance(budget, int) else floor(budget * adamw_bytes(params))
