"""One power iteration, of which the rule has already done the first half."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..frames import ModeFrame
from ..linalg import orthonormalize, over, to_unit
from ..validate import check_int
from .base import Memory, Memoryless, check_start, peak
from .operand import Operand


@dataclass(frozen=True)
class Amortized(Memoryless):
    """P = orth(B Q), half a power iteration: the other half, Q = B^H P, is the last step's (Dion, arXiv 2504.05295).

    B is the operand's unfolding O_(n), P the new factor U_n, and R = B^H P, the next step's Q, costs nothing: R^H is
    the core z of the last step, the momentum of :class:`comoving.rules.Columns`. That of any other rule does as
    well, for an average. The lengths of Q's columns do not matter to the span, nor to P. The first Q is B^H U of a
    seeded orthonormal U. Where several modes are compressed, z has lost what the other modes' factors hide, and B^H U
    is computed for each mode, as in :class:`comoving.finders.Power`.

    Args:
        iterations: power iterations per refresh, >= 1: the second starts from R of the first.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0
    inertia = 0.0

    iterations: int = 1

    def __post_init__(self) -> None:
        check_int("iterations", self.iterations, 1)

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Iterate from the last core where there is one of these ranks, else from ``start``."""
        check_start(self, start)
        old, last = operand.past if operand.past is not None else (None, None)
        single = sum(u is not None for u in start.factors) == 1
        follows = single and warm and isinstance(old, ModeFrame) and old.ranks == start.ranks
        found = list[Tensor | None](start.factors)
        for n, u in enumerate(start.factors):
            if u is None:
                continue
            right = last if follows and last is not None else operand.contract(n, u)
            left = _left(operand, n, right, u)
            for _ in range(1, self.iterations):
                left = _left(operand, n, operand.contract(n, left), left)
            found[n] = left
        return ModeFrame(tuple(found))


def _left(operand: Operand, mode: int, right: Tensor, u: Tensor) -> Tensor:
    """orth(B Q); the trace of U holds the directions that B leaves open."""
    size = operand.comm.largest(peak(right, operand.rows)).clamp_min(torch.finfo(right.dtype).tiny)
    product = to_unit(operand.correlate(mode, right / over(size, right)), operand.rows)
    return orthonormalize(product.add_(u, alpha=4 * torch.finfo(product.dtype).eps))
