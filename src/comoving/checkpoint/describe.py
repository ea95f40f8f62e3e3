"""Hyper-parameters as plain data."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from ..validate import plain


def describe(value: Any) -> Any:
    """A hyper-parameter as plain data, which loads with ``weights_only=True``: a part as its name and fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"part": type(value).__name__} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    return plain(value)


def describe_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group with every part described."""
    return {key: describe(value) for key, value in group.items()}
