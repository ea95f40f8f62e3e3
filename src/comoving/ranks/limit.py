"""What a budget is given as: bytes, text with a unit, or a share of AdamW's state."""

from collections.abc import Iterable
from math import floor, inf

from torch import Tensor

from ..units import UNITS, parse_bytes


def parse_budget(value: object, least: int = 1) -> int | float | None:
    """An int of bytes, or a float in (0, 1], the share of AdamW's state; None as it is.

    Args:
        value: an int of bytes; text with a unit, ``"400MB"``, in percent, ``"25%"``, or as a fraction, ``"1/8"``; a
            float in (0, 1].
        least: bytes, 0 or 1; where it is 0, ``"0"`` and ``0.0`` are no bytes, too.

    Raises:
        TypeError: of another type.
        ValueError: fewer bytes, a share outside its interval, or text that is no size; with the known units.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"budget must be bytes, a size with a unit, or a share of AdamW's state, got {value!r}")
    if least == 0 and value in {0, "0"}:
        return 0
    if isinstance(value, str):
        return _read(value)
    if isinstance(value, float):
        return _share(value, value)
    if value < least:
        raise ValueError(f"budget must be >= {least} {'byte' if least == 1 else 'bytes'}, got {value}")
    return value


def _read(text: str) -> int | float:
    if text.strip().endswith("%"):
        return _share(_number(text.strip()[:-1], text) / 100, text)
    if text.count("/") == 1:
        above, below = (_number(part, text) for part in text.split("/"))
        return _share(above / below if below else inf, text)
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(
            f"budget must be a size, {text!r} is none: {error}; or a share, such as '25%' or '1/8'"
        ) from None


def _number(text: str, value: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"budget must be a number before its %, a fraction of two, or a size in one of {', '.join(UNITS)}, got "
            f"{value!r}"
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
