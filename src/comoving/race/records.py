"""JSON read back from disk: its shape is checked before anything is computed from it."""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from comoving.files import explained

Check = Callable[[Any, str], None]
"""Raises :class:`Misshapen` unless a value has a shape; the text says where in the file the value is."""
LONGEST = 40


class Misshapen(ValueError):
    """A file that holds something else than it should; the message names the file, the place in it, and the value."""


def read(file: Path, check: Check) -> Any:
    """The JSON in ``file``, once ``check`` has passed it.

    Raises:
        OSError: the file is not there or cannot be read.
        Misshapen: it is cut short, no JSON, or of another shape.
    """
    with explained(file):
        raw = file.read_bytes()
    try:
        value = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Misshapen(f"{file} is no JSON, or cut short: {error}") from error
    try:
        check(value, "")
    except Misshapen as error:
        raise Misshapen(f"{file} has another shape than expected: {error}") from error
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"it holds {name}")


def wrong(value: Any, where: str, wanted: str) -> Misshapen:
    """The error for a value that is not what is wanted."""
    shown = repr(value)
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."
    return Misshapen(f"{where or 'the whole'} is {shown} and must be {wanted}")


def number(value: Any, where: str) -> None:
    """An int or a float that is finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise wrong(value, where, "a finite number")


def amount(value: Any, where: str) -> None:
    """A number that is not negative."""
    number(value, where)
    if value < 0:
        raise wrong(value, where, "at least 0")


def integer(value: Any, where: str) -> None:
    """An int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(value, where, "an int")


def text(value: Any, where: str) -> None:
    """A str."""
    if not isinstance(value, str):
        raise wrong(value, where, "text")


def one_of(known: Collection[str]) -> Check:
    """One of some words."""

    def check(value: Any, where: str) -> None:
        if value not in list(known):
            raise wrong(value, where, f"one of {', '.join(known)}")

    return check


def maybe(inner: Check) -> Check:
    """Null, or what ``inner`` takes."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return check


def listed(inner: Check, least: int = 0) -> Check:
    """A list of at least so many entries that ``inner`` takes."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            raise wrong(value, where, f"a list of {least} or more" if least else "a list")
        for i, item in enumerate(value):
            inner(item, f"{where}[{i}]")

    return check


def row(*inner: Check) -> Check:
    """A list with one entry for each of ``inner``."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != len(inner):
            raise wrong(value, where, f"a list of {len(inner)}")
        for i, (item, of) in enumerate(zip(value, inner, strict=True)):
            of(item, f"{where}[{i}]")

    return check


def mapped(inner: Check) -> Check:
    """A mapping whose values ``inner`` takes."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise wrong(value, where, "an object")
        for key, item in value.items():
            inner(item, f"{where}.{key}".lstrip("."))

    return check


def anything(value: Any, where: str) -> None:
    """Whatever it is."""


def having(needed: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """A mapping with ``needed`` entries; those of ``optional`` may be null or missing, and others may be there."""

    def check(value: Any, where: str) -> None:
        mapped(anything)(value, where)
        missing: Sequence[str] = [name for name in needed if name not in value]
        if missing:
            raise Misshapen(f"{where or 'it'} lacks {', '.join(missing)}")
        for name, of in needed.items():
            of(value[name], f"{where}.{name}".lstrip("."))
        for name, of in (optional or {}).items():
            maybe(of)(value.get(name), f"{where}.{name}".lstrip("."))

    return check


def cases(key: str, known: dict[str, Check]) -> Check:
    """A mapping whose entry ``key`` says which of ``known`` takes it."""

    def check(value: Any, where: str) -> None:
        having({key: one_of(known)})(value, where)
        known[value[key]](value, where)

    return check
