"""Exponentially growing intervals."""

from dataclasses import dataclass
from math import log2
from typing import Any, ClassVar

from torch import Tensor

from ..codecs import Spec
from ..validate import check_float
from .base import LONGEST, NEXT, Slots, When, number, on_host, reached

_REFRESHES = "refreshes"


@dataclass(frozen=True)
class Growing:
    """tau + floor(psi^k) steps from the k-th refresh to the next one, for k >= 1 (LoQT, arXiv 2405.16528).

    Refreshes are counted from 0; tau is the group's ``refresh_every`` and psi the field ``base``. The second refresh
    comes after tau steps, or at the phase by which parameters are staggered. The paper takes psi = 1.2 and tau = 100.
    Where tau is edited, intervals change from the next refresh on. It keeps two integers on the host: the refreshes so
    far, and the step of the next one. No interval is longer than tau + 2^53.

    Args:
        base: psi >= 1.

    Raises:
        TypeError, ValueError: no number, or one below 1.
    """

    batched: ClassVar[bool] = True
    alone: ClassVar[bool] = False
    compares: ClassVar[tuple[type, ...]] = ()

    base: float = 1.2

    def __post_init__(self) -> None:
        check_float("base", self.base, 1.0)

    def schema(self) -> dict[str, Spec]:
        """The refreshes so far, and when the next one is."""
        return {_REFRESHES: number, NEXT: number}

    def due(self, slots: Slots, when: When) -> bool:
        """Whether the step of the next refresh has come."""
        return reached(slots, when)

    def refreshed(self, slots: Slots, last: Any, new: Any, when: When) -> dict[str, Tensor]:
        """One refresh more, and the next one tau + floor(psi^k) steps later."""
        k = int(slots[_REFRESHES])
        grown = int(self.base**k) if k * log2(self.base) < log2(LONGEST) else LONGEST
        return {_REFRESHES: on_host(k + 1), NEXT: on_host(when.following(when.every + grown))}
