"""What a monitor asks of a place to write to."""

from collections.abc import Mapping
from typing import Protocol


class Sink(Protocol):
    """Takes the figures of readings."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take one reading: the number of updates so far, and names and values."""
        ...

    def close(self) -> None:
        """Write out what is buffered; nothing is written afterwards."""
        ...
