"""Sizes of memory as people write them: ``"24GB"`` to bytes and back."""

from __future__ import annotations

import math
import re

__all__ = ["UNITS", "parse_bytes", "show_bytes"]

UNITS: dict[str, int] = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
"""Bytes per unit: decimal ``KB, MB, GB, TB`` and binary ``KiB, MiB, GiB, TiB``."""

_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]+)\s*")
_BY_FOLDED = {name.lower(): size for name, size in UNITS.items()}


def parse_bytes(text: str | int) -> int:
    """Return the bytes of a size such as ``"400MB"``, ``"1.5 GiB"`` or a plain count of bytes.

    Units are those of :data:`UNITS`, in any case (``"24gb"`` is ``24 * 10**9``); an integer is a count of bytes.
    A fraction of a byte is dropped.

    Raises:
        ValueError: no unit, an unknown unit (``"400Mb"`` reads as MB; ``"400M"`` is refused), or no positive number.
        TypeError: neither text nor an integer.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a size must be text such as '400MB' or an integer of bytes, not {type(text).__name__}")
    if isinstance(text, int):
        if text <= 0:
            raise ValueError(f"a size must be a positive number of bytes, not {text}")
        return text
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read {text!r} as a size: write a positive number and a unit ({', '.join(UNITS)})")
    number, unit = match.groups()
    size = _BY_FOLDED.get(unit.lower())
    if size is None:
        raise ValueError(f"unknown unit {unit!r} in {text!r}: use one of {', '.join(UNITS)}")
    count = math.floor(float(number) * size)
    if count < 1:
        raise ValueError(f"a size must be at least one byte, not {text!r}")
    return count


def show_bytes(count: float, *, digits: int = 2) -> str:
    """Return a count of bytes in the largest decimal unit that is at most it: ``22000000000 -> '22.00 GB'``.

    Bytes below 1 KB have no decimals; a negative count (a saving, a lack) keeps its sign.

    Raises:
        ValueError: a count that is not finite.
    """
    if not math.isfinite(count):
        raise ValueError(f"a count of bytes must be finite, not {count}")
    size = abs(count)
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= UNITS[unit]:
            return f"{count / UNITS[unit]:.{digits}f} {unit}"
    return f"{count:.0f} B"
