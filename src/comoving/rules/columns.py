"""Equal columns: the direction of Dion."""

from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import each_row, over
from ..slots import Kind, Slot
from ..validate import check_choice
from .adam import FIRST
from .passing import hand_over, taken


@dataclass(frozen=True)
class Columns:
    """The direction of Dion (arXiv 2504.05295): every coordinate's share of the gradient at the same length.

    z = P^H B in a frame P of one side, (r, n): row j holds R_j^H, R = B^H P.

    d_j = sqrt(n) R_j^H / (|R_j| + eps)

    which has unit RMS; with the update scale "spectral" the lifted direction is Dion's sqrt(m/n) P Q^H. The momentum
    slot remembers the last z that was not zero, from which the finder ``Amortized`` starts; the averaging is the
    residual's (:class:`comoving.residual.MomentumBuffer`).

    Args:
        along: the mode of the core whose slices are made equal: "left" the first, "right" the last, "auto" the shortest
            (the first on a tie), which is the compressed mode of a matrix at any rank below its short side.
    """

    along: Literal["auto", "left", "right"] = "auto"

    momentum = FIRST
    definite = False
    corrected = True
    linear = True
    elementwise: ClassVar[bool] = False
    timeless: ClassVar[bool] = False
    replays = False
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("along", self.along, ("auto", "left", "right"))

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """The last z."""
        return (Slot(FIRST, Kind.LINEAR),)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(0, 1)."""
        return 0.0, 1.0

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """m = z, unless z = 0."""
        seen = z != 0
        seen = over(each_row(seen, clock.rows).any(-1), z) if clock.rows else seen.any()
        state[FIRST] = torch.where(seen, z, state[FIRST])
        hand_over(state, z)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor."""
        z = taken(state)
        core = z.shape[clock.rows :]
        if not core:
            return z.sgn()
        long = [n for n, d in enumerate(core) if d > 1] or [0]
        mode = {"left": long[0], "right": long[-1], "auto": min(long, key=lambda n: core[n])}[self.along]
        others = tuple(n - len(core) for n in range(len(core)) if n != mode)
        tiny = torch.finfo(z.dtype).tiny
        unit = z.abs().amax(others, keepdim=True).clamp_min(tiny) if others else z.abs().clamp_min(tiny)
        scaled = z / unit
        length = torch.linalg.vector_norm(scaled, dim=others, keepdim=True) if others else scaled.abs()
        root = sqrt(prod(core) / max(1, core[mode]))
        # |R_j| + eps = unit (length + eps / unit); a slice of zeros stays one.
        return scaled.mul_(root / (length + eps / unit).clamp_min(tiny))
