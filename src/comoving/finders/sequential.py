"""Sequentially truncated HOSVD, from scratch and as the start of HOOI."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..frames import ModeFrame
from ..linalg import Method, leading_directions, multilinear, unit_size
from ..validate import check_choice, check_float
from .base import Memory, Memoryless, check_start, unless_zero
from .operand import Operand


@dataclass(frozen=True)
class SequentialHOSVD(Memoryless):
    """Leading left singular vectors of one unfolding after the other, each of the tensor projected on those before.

    U_n comes from O x_m U_m^H over the modes m that are done (Vannieuwenhoven, Vandebril and Meerbergen, 2012), so each
    mode makes the next cheaper; the one that shrinks most, by r_n/d_n, goes first. The error is at most sqrt(N) times
    the best, as for the HOSVD, to which it is equal for a single compressed mode.

    Args:
        momentum: rho of the operand, in [0, 1).
        method: "gram" or "svd", as in :class:`comoving.finders.Exact`.
    """

    fills: ClassVar[tuple[type, ...]] = (ModeFrame,)
    batched: ClassVar[bool] = True

    momentum: float = 0.9
    method: Method = "gram"

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        check_choice("method", self.method, ("gram", "svd"))

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Decompose anew; ``start`` only serves where the operand is zero."""
        check_start(self, start)
        x = unit_size(operand.full(), operand.rows)
        return ModeFrame(sweep(x, (None,) * operand.order, start.factors, self.method, operand.rows))


def sweep(
    x: Tensor,
    known: tuple[Tensor | None, ...],
    start: tuple[Tensor | None, ...],
    method: Method = "gram",
    rows: int = 0,
) -> tuple[Tensor | None, ...]:
    """One factor after the other, from x projected on the new factors so far and on the known ones of modes to come.

    Args:
        x: the tensor, (*rows, d_1, ..., d_N), with entries of about 1.
        known: U_n to project on until a new one is there, or None: all None for the sequentially truncated HOSVD, the
            last factors for a sweep of HOOI.
        start: orthonormal, of the wanted ranks: kept where nothing is to be seen; None where the mode is whole.
        method: of :func:`comoving.linalg.leading_directions`.
        rows: leading dimensions of x that count rows.
    """
    factors = list(start)
    waiting = by_shrinkage(start)
    while waiting:
        n = waiting.pop(0)
        u = start[n]
        assert u is not None
        seen = multilinear(x, [k.mH if m in waiting and k is not None else None for m, k in enumerate(known)])
        found = unless_zero(seen, leading_directions(seen, n, u.shape[-1], method, rows), u, rows)
        factors[n] = found
        if waiting:
            x = multilinear(x, [found.mH if m == n else None for m in range(len(start))])
    return tuple(factors)


def by_shrinkage(factors: tuple[Tensor | None, ...]) -> list[int]:
    """The compressed modes, that of the smallest r_n/d_n first."""
    shares = {n: u.shape[-1] / u.shape[-2] for n, u in enumerate(factors) if u is not None}
    return sorted(shares, key=lambda n: shares[n])
