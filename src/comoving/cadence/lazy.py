"""Longer intervals where the subspace has settled."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Spec
from ..frames import ModeFrame, SparseFrame
from ..validate import check_float, check_int
from .base import NEXT, Slots, When, on_host, own_number, reached

_COSINES, _COUNT, _LENGTHENED = "cosines", "count", "lengthened"

Compared = ModeFrame | SparseFrame


@dataclass(frozen=True)
class Lazy:
    """tau growth^j steps, j one higher at each refresh that finds the leading direction where it was (Q-GaLore).

        c = min_n |<u'_n, u_n>|;   j <- j + 1 where the mean of the last ``patience`` values of c is >= ``threshold``

    u_n is the first column of the last factor of mode n, as it is read of its codes, and u'_n that of the new one. tau
    is the group's ``refresh_every``, and j starts at 0; each parameter, or block, has its own. Where tau is edited,
    intervals change from the next refresh on. The finder is to have the leading direction first, as
    :class:`comoving.finders.Exact` has.

    As in the authors' code (arXiv 2407.08296) the first direction alone is compared, and the queue of cosines is not
    emptied. Two things differ: the sign of a singular vector means nothing, so the cosine is taken without it; and a
    new interval counts from the refresh that decided on it, where the code waits for the next step that is its
    multiple. The host reads the decision from the device, at refreshes only.

    It keeps the cosines, (patience,) float32, and on the host how many of them there are, j, and the step of the next
    refresh.

    Args:
        threshold: of the mean cosine, in [0, 1].
        patience: how many values are averaged, >= 1.
        growth: of the interval, >= 2.

    Raises:
        TypeError, ValueError: a field of another type, or outside its interval.
    """

    batched: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # what one frame has found says nothing of another's next refresh
    compares: ClassVar[tuple[type, ...]] = (ModeFrame, SparseFrame)

    threshold: float = 0.4
    patience: int = 5
    growth: int = 2

    def __post_init__(self) -> None:
        check_float("threshold", self.threshold, 0.0, 1.0)
        check_int("patience", self.patience, 1)
        check_int("growth", self.growth, 2)

    def schema(self) -> dict[str, Spec]:
        """The last cosines, and on the host their number, j, and when the next refresh is."""
        cosines = Spec((self.patience,), torch.float32)
        return {_COSINES: cosines, _COUNT: own_number, _LENGTHENED: own_number, NEXT: own_number}

    def due(self, slots: Slots, when: When) -> bool:
        """Whether the step of the next refresh has come."""
        return reached(slots, when)

    def refreshed(self, slots: Slots, last: Compared | None, new: Compared, when: When) -> dict[str, Tensor]:
        """One cosine more where there is a last frame, and the next refresh tau growth^j steps later."""
        after = dict(slots)
        if last is not None:
            after |= self._compared(slots, last, new)
        return after | {NEXT: on_host(when.following(when.every * self.growth ** int(after[_LENGTHENED])))}

    def _compared(self, slots: Slots, last: Compared, new: Compared) -> dict[str, Tensor]:
        pairs = zip(_leading(last), _leading(new), strict=True)
        least = torch.stack([torch.linalg.vecdot(u, v).abs() for u, v in pairs]).amin(0, keepdim=True)
        cosines = torch.cat([slots[_COSINES][1:], least.to(torch.float32)])
        count = min(int(slots[_COUNT]) + 1, self.patience)
        settled = count == self.patience and bool(cosines.mean() >= self.threshold)
        lengthened = on_host(int(slots[_LENGTHENED]) + settled)
        return {_COSINES: cosines, _COUNT: on_host(count), _LENGTHENED: lengthened}


def _leading(frame: Compared) -> list[Tensor]:
    """The first column of each factor."""
    factors = (frame.modes if isinstance(frame, SparseFrame) else frame).factors
    return [u[:, 0] for u in factors if u is not None]
