"""Ranks that stay."""

from dataclasses import dataclass

from ..frames.base import Ranks
from .base import Reading, Record, heard


@dataclass(frozen=True)
class Fixed:
    """The ranks that the layout chose, from the first step to the last.

    Only a budget that assigns codecs may lower them, before the first step.
    """

    adaptive = False

    def initial(self, base: Ranks, shape: tuple[int, ...]) -> Ranks:
        """The layout's own."""
        return base

    def wanted(
        self, reading: Reading, ranks: Ranks, base: Ranks, shape: tuple[int, ...], tick: int, notches: int
    ) -> Ranks:
        """Those there are."""
        return ranks

    def below(self, size: int, rank: int) -> int | None:
        """None."""
        return None

    def heard(self, record: Record, loss: float) -> Record:
        """Only remembered."""
        return heard(record, loss)
