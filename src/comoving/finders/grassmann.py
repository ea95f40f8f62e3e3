"""Tracking along geodesics of the Grassmann manifold: one direction of the frame turns at each refresh."""

from dataclasses import dataclass
from math import pi
from typing import Literal

import torch
from torch import Tensor

from ..frames import ModeFrame
from ..linalg import largest, over, to_unit
from ..validate import check_choice, check_float
from .base import Memory, Memoryless, check_start
from .geodesic import leading_plane, tangent, turned
from .operand import Operand
from .power import Power


@dataclass(frozen=True)
class Grassmann(Memoryless):
    """U_n <- U_n + (U_n v (cos theta - 1) + u sin theta) v^H, mode by mode (SubTrack++, arXiv 2502.01586).

    u, sigma and v are the first singular triple of T = (I - U_n U_n^H) O_(n) O_(n)^H U_n, half the steepest descent of
    what the frame loses, |O_(n) - U_n U_n^H O_(n)|^2, on the manifold of subspaces. The frame turns by theta in the
    plane of U_n v and u, and keeps all that it has outside of it, so that no refresh replaces more than one direction.
    It stays orthonormal but for rounding, which is measured and mended.

    The first frame is made from the exact singular vectors, or by three power iterations.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1).
        rate: eta > 0 in theta = min(2 eta sigma, pi/2). sigma goes with the square of the gradients, so that eta goes
            with the model: the authors take 10 and 10000. Their angle has no limit, where at pi/2 all of u is in the
            frame and beyond it the way leads back. None for the theta in [0, pi/2] with which the frame captures most,
            tan 2 theta = 2 sigma / (|(U_n v)^H O_(n)|^2 - |u^H O_(n)|^2), whatever the gradient's size (ours).
        start: where the first frame comes from, "exact" or "random"; see :class:`Power`.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.0
    rate: float | None = None
    start: Literal["random", "exact"] = "exact"

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        if self.rate is not None:
            check_float("rate", self.rate, 0.0, open_low=True)
        check_choice("start", self.start, ("random", "exact"))

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """One turn from ``start``."""
        check_start(self, start)
        if not warm:
            return Power(start=self.start).find(operand, start, False, memory)
        return ModeFrame(tuple(None if u is None else self._turned(operand, n, u) for n, u in enumerate(start.factors)))

    def _turned(self, operand: Operand, mode: int, frame: Tensor) -> Tensor:
        z = operand.contract(mode, frame)
        inside = operand.largest(mode, z)
        product = operand.correlate(mode, operand.to_unit(mode, z))
        outer = largest(product, operand.rows)
        t = tangent(frame, to_unit(product, operand.rows))
        u, sigma, v = leading_plane(t)
        # That of O is sigma inside outer, and may leave the range of float32 both ways.
        inside, outer = over(inside, sigma), over(outer, sigma)
        if self.rate is not None:
            theta = (2 * self.rate * sigma * inside * outer).clamp_max(pi / 2)
        else:
            (one, a), (other, b) = (_along(operand, mode, x, sigma) for x in (frame @ v, u))
            unit = torch.maximum(one, other).clamp_min(torch.finfo(sigma.dtype).tiny)
            gap = (a * (one / unit)).square() - (b * (other / unit)).square()
            theta = torch.atan2(2 * sigma * (inside / unit) * (outer / unit), gap) / 2
        return turned(frame, u, v, theta)


def _along(operand: Operand, mode: int, x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of x^H O_(n), and the norm in units of it."""
    product = operand.contract(mode, x)
    unit = operand.largest(mode, product)
    return over(unit, like), over(operand.size(mode, operand.to_unit(mode, product)), like)
