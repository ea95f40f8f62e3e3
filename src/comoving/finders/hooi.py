"""Higher-order orthogonal iteration that goes on from the last frame."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..frames import ModeFrame
from ..linalg import norm, over, unit_size
from ..validate import check_float, check_int
from .base import Memory, Memoryless, check_start
from .operand import Operand
from .sequential import sweep

_SEEN = 0.1  # of the norm: 1% of the energy


@dataclass(frozen=True)
class HOOI(Memoryless):
    """U_n <- leading left singular vectors of O projected on all other factors, mode by mode, from the last frame.

    Alternating maximization of the captured energy |F^H O| (De Lathauwer, De Moor and Vandewalle, 2000): no sweep
    lowers it. The first frame starts from the sequentially truncated HOSVD, and so does one whose predecessor captures
    less than 1% of O's energy (read on the host, once a refresh), for each mode sees only what the others let through.
    What they hide in part comes back over several refreshes, unlike with :class:`comoving.finders.Power`, whose modes
    do not see one another.

    Args:
        momentum: rho of the operand, in [0, 1).
        sweeps: over all compressed modes per refresh, >= 1; a single compressed mode needs no second one.
    """

    fills: ClassVar[tuple[type, ...]] = (ModeFrame,)
    batched: ClassVar[bool] = True

    momentum: float = 0.9
    sweeps: int = 1

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        check_int("sweeps", self.sweeps, 1)

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Iterate from ``start`` if it is warm and any good, from the sequentially truncated HOSVD if not."""
        check_start(self, start)
        rows = operand.rows
        x, factors = unit_size(operand.full(), rows), start.factors
        good = norm(start.project(x), rows) >= _SEEN * norm(x, rows) if warm else None
        warm = good is not None and bool(good.all())
        if not warm:
            factors = sweep(x, (None,) * operand.order, factors, rows=rows)
        if sum(u is not None for u in factors) == 1:  # the other factors project on nothing
            return ModeFrame(factors if not warm else sweep(x, factors, factors, rows=rows))
        if rows and good is not None and not warm:  # some rows go on from where they were
            pairs = zip(start.factors, factors, strict=True)
            factors = tuple(None if u is None or v is None else torch.where(over(good, u), u, v) for u, v in pairs)
        for _ in range(self.sweeps):
            factors = sweep(x, factors, factors, rows=rows)
        return ModeFrame(factors)
