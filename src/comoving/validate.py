"""Checks of hyper-parameters whose errors say the value and the interval."""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from math import isfinite
from typing import Any, ParamSpec

import numpy as np

_P = ParamSpec("_P")


def plain(value: Any) -> Any:
    """Numpy's numbers, and its arrays of one number without a shape, as Python's; what holds them likewise."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.shape == ()):
        return value.item()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if type(value) is tuple:
        return tuple(plain(x) for x in value)
    return [plain(x) for x in value] if type(value) is list else value


def nearest(given: str, known: Iterable[str]) -> str:
    """`` (did you mean 'power'?)``, or nothing where no known name resembles the given one."""
    close = get_close_matches(given, [*known], 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_known(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise unless every hyper-parameter is a known one.

    Raises:
        TypeError: naming those that are not, the nearest known one, and all of them.
    """
    known = set(known)
    unknown = sorted(set(given) - known)
    if unknown:
        near = nearest(unknown[0], known)
        raise TypeError(f"unknown hyper-parameters {unknown}{near}; known are {', '.join(sorted(known))}")


def names_unknown(init: Callable[_P, None]) -> Callable[_P, None]:
    """A constructor that lists the names of its arguments, and the nearest of them, where it is given another one."""
    known = [*signature(init).parameters][1:]

    @wraps(init)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        check_known(kwargs, known)
        init(*args, **kwargs)

    return checked


def check_float(
    name: str, value: object, low: float, high: float = float("inf"), *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise unless value is a finite number in the interval from low to high; Python's or numpy's.

    Raises:
        TypeError: not an int or a float.
        ValueError: not finite, or outside the interval.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (isfinite(value) and above and below):
        left, right = "(" if open_low else "[", ")" if open_high or high == float("inf") else "]"
        raise ValueError(f"{name} must lie in {left}{low:g}, {high:g}{right}, got {value!r}")


def check_int(name: str, value: object, low: int) -> None:
    """Raise unless value is an int >= low; Python's or numpy's."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless value is one of the choices."""
    value = plain(value)
    if value not in choices:
        near = nearest(value, (c for c in choices if isinstance(c, str))) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{near}")


def shown(value: object) -> str:
    """A value in an error: its type, and not too much of it."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"
