"""Warm block power iteration: a few matrix products and one small orthonormalization per mode."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..decompositions import leading_directions
from ..frames import ModeFrame
from ..linalg import orthonormalize, to_unit, unit_size
from ..validate import check_choice, check_float, check_int
from .base import Memory, Memoryless, check_start, unless_zero
from .exact import Exact
from .operand import Operand


@dataclass(frozen=True)
class Power(Memoryless):
    """U_n <- orth( O_(n) O_(n)^H U_n ), started from the last frame (LDAdam, arXiv 2410.16103), mode by mode.

    The modes do not see one another: each iteration looks at all of O, so no direction can be lost because another
    mode's factor hides it. Directions in which O has no energy stay where they were.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1).
        iterations: power iterations per refresh, >= 1.
        start: where a parameter's very first frame comes from: "exact" decomposes the first operand
            (:class:`comoving.finders.Exact`); "random" makes ``cold`` iterations from a seeded orthonormal basis.
        cold: iterations of the first frame when it starts at random, >= 1.
        exact_up_to: modes of at most this many entries get the leading eigenvectors of O_(n) O_(n)^H instead, which
            cost less than an iteration where a mode is short, and are better; 0 for none.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.9
    iterations: int = 1
    start: Literal["random", "exact"] = "random"
    cold: int = 3
    exact_up_to: int = 0

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        check_int("iterations", self.iterations, 1)
        check_choice("start", self.start, ("random", "exact"))
        check_int("cold", self.cold, 1)
        check_int("exact_up_to", self.exact_up_to, 0)

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Iterate from ``start``."""
        check_start(self, start)
        if not warm and self.start == "exact":
            return Exact().find(operand, start, warm, memory)
        count = self.iterations if warm else self.cold
        factors, rows = list(start.factors), operand.rows
        short = {n for n, u in enumerate(factors) if u is not None and u.shape[-2] <= self.exact_up_to}
        x = unit_size(operand.full(), rows) if short else None
        for n, u in enumerate(factors):
            if u is not None and n in short and x is not None:
                factors[n] = unless_zero(x, leading_directions(x, n, u.shape[-1], rows=rows), u, rows)
            elif u is not None:
                factors[n] = _iterate(operand, n, u, count)
        return ModeFrame(tuple(factors))


def _iterate(operand: Operand, mode: int, u: Tensor, count: int) -> Tensor:
    for _ in range(count):
        p = to_unit(operand.correlate(mode, operand.to_unit(mode, operand.contract(mode, u))), operand.rows)
        # The trace of u holds the directions that O leaves open.
        u = orthonormalize(p.add_(u, alpha=4 * torch.finfo(p.dtype).eps))
    return u
