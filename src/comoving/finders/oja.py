"""Oja's rule: a step of online PCA at each refresh."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..frames import ModeFrame
from ..linalg import orthonormalize, over
from ..validate import check_choice, check_float
from .base import Memory, Memoryless, check_start, peak
from .operand import Operand
from .power import Power


@dataclass(frozen=True)
class Oja(Memoryless):
    """U_n <- orth( U_n + rate O_(n) O_(n)^H U_n / mu ), mu = |U_n^H O_(n)|^2 / r_n (Oja, 1982), mode by mode.

    The step is up the gradient of |U^H O|^2, as in Online Subspace Descent (arXiv 2408.12857), which takes it on the
    reconstruction error by an optimizer of its own and keeps U near orthonormal by a penalty, where this one
    orthonormalizes. mu, the mean energy of the r_n directions so far, makes the rate independent of the size of O and
    of the rank: against directions without energy, one with the mean energy gains a factor of 1 + rate per refresh. The
    frame averages over about 1 / rate refreshes; a large rate is power iteration.

    The first frame is made by three power iterations, or from the exact singular vectors.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1).
        rate: the factor in front of O_(n) O_(n)^H U_n / mu, > 0.
        start: where the first frame begins, "random" or "exact"; see :class:`Power`.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.9
    rate: float = 1.0
    start: Literal["random", "exact"] = "random"

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        check_float("rate", self.rate, 0.0, open_low=True)
        check_choice("start", self.start, ("random", "exact"))

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """One step from ``start``."""
        check_start(self, start)
        if not warm:
            return Power(start=self.start).find(operand, start, False, memory)
        return ModeFrame(tuple(None if u is None else self._turned(operand, n, u) for n, u in enumerate(start.factors)))

    def _turned(self, operand: Operand, mode: int, u: Tensor) -> Tensor:
        z = operand.contract(mode, u)
        size = operand.comm.largest(peak(z, operand.rows)).clamp_min(torch.finfo(z.dtype).tiny)
        z = z.div_(over(size, z))
        # z has an entry of size 1, or is zero.
        energy = operand.size(mode, z).square().clamp_min(1) / (self.rate * u.shape[-1])
        return orthonormalize(operand.correlate(mode, z).div_(over(size, u)).div_(over(energy, u)).add_(u))
