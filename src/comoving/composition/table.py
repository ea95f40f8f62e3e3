"""The table of what is best for each role at how many bytes: data, written by a study."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..roles import Role, known_role
from .choice import Choice

FILE = Path(__file__).with_name("table.json")
"""Written by ``python benchmarks/study.py table``."""

_NEAREST: dict[Role, tuple[Role, ...]] = {
    "experts": ("hidden",),
    "convolution": ("hidden",),
    "spectral": ("hidden",),
    "head": ("table",),
    "position": ("table",),
    "bias": ("norm", "scalar"),
    "scalar": ("norm", "bias"),
    "norm": ("bias", "scalar"),
}
"""Role -> those whose row serves it where it has none, nearest first."""


@dataclass(frozen=True)
class Row:
    """The choices for a role, and the role that they were measured on."""

    choices: tuple[Choice, ...]
    measured: Role


@dataclass(frozen=True)
class Table:
    """Role -> its choices.

    Args:
        rows: of the roles that were measured.
        source: the command that made it.
    """

    rows: Mapping[Role, tuple[Choice, ...]]
    source: str = ""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> "Table":
        """From plain data: {"command": ..., "roles": {role: [{"name", "options", "rate", "width", "loss"}, ...]}}.

        Raises:
            ValueError: an unknown role, a role without choices, or a choice that cannot be read, with its name.
        """
        rows: dict[Role, tuple[Choice, ...]] = {}
        for name, choices in data["roles"].items():
            role = known_role(name, "the table")
            if not choices:
                raise ValueError(f"role {name} has no choices in the table")
            rows[role] = tuple(_read(name, choice) for choice in choices)
        return cls(rows, data.get("command", ""))

    @classmethod
    def load(cls, file: str | Path) -> "Table":
        """From a file of JSON.

        Raises:
            ValueError: it is none, or as for :meth:`read`.
            OSError: it cannot be read.
        """
        return cls.read(json.loads(Path(file).read_text()))

    def row(self, role: Role) -> Row:
        """The choices for a role: its own, or those of the nearest role that has some.

        Raises:
            ValueError: neither it nor a role like it has any.
        """
        for near in (role, *_NEAREST.get(role, ())):
            if near in self.rows:
                return Row(self.rows[near], near)
        raise ValueError(
            f"the table of compositions has no row for role {role!r}, nor for one that is like it; it has "
            f"{', '.join(self.rows) or 'none'}"
        )


def _read(role: str, data: Mapping[str, Any]) -> Choice:
    try:
        return Choice.read(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"choice {data.get('name')!r} of role {role} in the table: {error}") from error


@cache
def measured() -> Table:
    """The table of this release."""
    return Table.load(FILE)
