"""Equal columns: the direction of Dion."""

from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import each_row, orthonormalize, over, pairs, unit_size
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
        orthonormal: d = sqrt(n) V^H with R = V T, T upper triangular with a positive diagonal, instead of equal lengths
            (Orth-Dion, arXiv 2605.16341): then all singular values of the lifted direction are equal, as Muon's are,
            where those of columns of equal length are anything up to sqrt(r) times as large. Directions for which T_jj
            is no more than rounding, of which there are some where B has a lower rank, are left out. A core with fewer
            other entries than slices has no such V, and is divided by lengths.
    """

    along: Literal["auto", "left", "right"] = "auto"
    orthonormal: bool = False

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
        check_choice("orthonormal", self.orthonormal, (True, False))

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
        if self.orthonormal and 0 < core[mode] ** 2 <= prod(core):
            return _orthonormal(z, mode - len(core), clock.rows).mul_(sqrt(prod(core) / core[mode]))
        others = tuple(n - len(core) for n in range(len(core)) if n != mode)
        tiny = torch.finfo(z.dtype).tiny
        unit = z.abs().amax(others, keepdim=True).clamp_min(tiny) if others else z.abs().clamp_min(tiny)
        scaled = z / unit
        length = torch.linalg.vector_norm(scaled, dim=others, keepdim=True) if others else scaled.abs()
        root = sqrt(prod(core) / max(1, core[mode]))
        # |R_j| + eps = unit (length + eps / unit); a slice of zeros stays one.
        return scaled.mul_(root / (length + eps / unit).clamp_min(tiny))


def _orthonormal(z: Tensor, mode: int, rows: int) -> Tensor:
    """Slices of one mode as the columns of V, z = V T, a new tensor; zero where T_jj is no more than rounding."""
    moved = unit_size(z, rows).movedim(mode, -1)
    x = moved.reshape(*moved.shape[:rows], -1, moved.shape[-1])
    v = orthonormalize(x)
    kept = (pairs(v) * pairs(x)).flatten(x.ndim).sum(-1) if x.is_complex() else v * x
    diagonal = kept.sum(-2, keepdim=True)
    longest = torch.linalg.vector_norm(x, dim=-2, keepdim=True).amax(-1, keepdim=True)
    seen = diagonal > max(x.shape[-2:]) * torch.finfo(x.dtype).eps * longest
    return (v * seen).reshape(moved.shape).movedim(-1, mode).contiguous()
