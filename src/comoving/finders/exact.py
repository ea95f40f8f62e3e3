"""Exact factors of each unfolding: SVD, HOSVD, sequentially truncated HOSVD and HOOI."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..decompositions import Method, by_shrinkage, leading_directions, sweep
from ..frames import ModeFrame
from ..linalg import norm, over, unit_size
from ..validate import check_choice, check_float, check_int
from .base import Memory, Memoryless, check_start, unless_zero
from .operand import Operand

Factors = tuple[Tensor | None, ...]

_SEEN = 0.1  # of the norm: 1% of the energy


@dataclass(frozen=True)
class Exact(Memoryless):
    """U_n = the leading r_n left singular vectors of the unfolding O_(n); for a matrix, the truncated SVD.

    For a tensor that is the truncated higher-order SVD, HOSVD (De Lathauwer, De Moor and Vandewalle, 2000). Its error
    is at most sqrt(N) times that of the best factors, and ``sweeps`` of higher-order orthogonal iteration, HOOI (the
    same authors, 2000), lower it: U_n anew from O x_m U_m^H over all m != n, for one mode n after the other. A frame
    with a single compressed mode cannot be improved, and no sweep is made. :func:`comoving.decompositions.hosvd` does
    the same to a tensor alone.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1); with 0, O is the gradient alone, as in
            GaLore (arXiv 2403.03507).
        sweeps: HOOI sweeps, >= 0 (Tensor-GaLore, arXiv 2501.02379, takes Tucker factors, so > 0).
        method: "gram" takes eigenvectors of O_(n) O_(n)^H or O_(n)^H O_(n), whichever is smaller, accurate for singular
            values above about sqrt(machine epsilon) of the largest; "svd" is accurate for all and slower.
        sequential: the sequentially truncated HOSVD, ST-HOSVD (Vannieuwenhoven, Vandebril and Meerbergen, 2012):
            U_n from O x_m U_m^H over the modes m that are done, so that each mode makes the next one cheaper. The mode
            that shrinks most, by r_n/d_n, goes first, in sweeps too. The bound on the error is that of the HOSVD.
        warm: the sweeps, >= 1, go on from the last frame, whose captured energy |F^H O|^2 none of them lowers. A last
            frame that captures less than 1% of O's energy (read on the host, once a refresh) is not gone on from, for
            each mode sees only what the others let through. What they hide in part comes back over several refreshes,
            unlike with :class:`comoving.finders.Power`, whose modes do not see one another.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.0
    sweeps: int = 0
    method: Method = "gram"
    sequential: bool = False
    warm: bool = False

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        check_int("sweeps", self.sweeps, 0)
        check_choice("method", self.method, ("gram", "svd"))
        check_choice("sequential", self.sequential, (True, False))
        check_choice("warm", self.warm, (True, False))
        if self.warm and self.sweeps == 0:
            raise ValueError("sweeps must be >= 1 where warm=True, for they are all that goes on, got 0")

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Decompose anew, or iterate from ``start``, which otherwise only serves where the operand is zero."""
        check_start(self, start)
        factors, rows = start.factors, operand.rows
        x = unit_size(operand.full(), rows)
        order = by_shrinkage(operand.shape, start.ranks)
        order = order if self.sequential else sorted(order)
        good = None
        if self.warm and warm and len(order) > 1:
            good = norm(start.project(x), rows) >= _SEEN * norm(x, rows)
        if good is None or not bool(good.all()):
            factors = self._anew(x, factors, order, rows)
            if good is not None:  # some rows go on from where they were
                pairs = zip(start.factors, factors, strict=True)
                factors = tuple(None if u is None or v is None else torch.where(over(good, u), u, v) for u, v in pairs)
        for _ in range(self.sweeps if len(order) > 1 else 0):
            factors = self._swept(x, factors, factors, order, rows)
        return ModeFrame(factors)

    def _anew(self, x: Tensor, start: Factors, order: list[int], rows: int) -> Factors:
        if self.sequential:
            return self._swept(x, (None,) * len(start), start, order, rows)
        return tuple(None if u is None else _leading(x, n, start, self.method, rows) for n, u in enumerate(start))

    def _swept(self, x: Tensor, known: Factors, start: Factors, order: list[int], rows: int) -> Factors:
        found = sweep(x, known, order, partial(_leading, start=start, method=self.method, rows=rows))
        return tuple(found.get(n) for n in range(len(start)))


def _leading(x: Tensor, mode: int, start: Factors, method: Method, rows: int) -> Tensor:
    """The factor of a mode, from x with entries of about 1; that of ``start``, orthonormal, where nothing is seen."""
    u = start[mode]
    assert u is not None
    return unless_zero(x, leading_directions(x, mode, u.shape[-1], method, rows), u, rows)
