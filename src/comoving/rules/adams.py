"""Momentum over the root of its own square and the gradient's."""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import lerp, quotient
from ..slots import Kind, Slot
from .adam import FIRST
from .passing import hand_over, taken


@dataclass(frozen=True)
class AdamS:
    """AdamS (arXiv 2505.16363): Adam with a second moment that is not stored; real or complex.

    v = b2 |m|^2 + (1 - b2) |z|^2           of the momentum before this step
    m <- b1 m + (1 - b1) z
    d = m / (sqrt(v) + eps)

    Without bias correction, as published: the first steps are of (1 - b1) / sqrt(1 - b2). No entry of d exceeds
    sqrt(b1^2 / b2 + (1 - b1)^2 / (1 - b2)), which is 1.03 for betas (0.9, 0.95). m has z's dtype.
    """

    momentum = FIRST
    definite = False
    corrected = False
    linear = True
    elementwise: ClassVar[bool] = True
    timeless: ClassVar[bool] = True
    replays = True
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m."""
        return (Slot(FIRST, Kind.LINEAR),)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b1, 1 - b1)."""
        return clock.beta1, 1 - clock.beta1

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """m; sqrt(v) goes by the one before."""
        before = state[FIRST]
        # Squares may leave the range.
        hand_over(state, torch.hypot(before.abs() * sqrt(clock.beta2), z.abs() * sqrt(1 - clock.beta2)))
        state[FIRST] = lerp(before, z, 1 - clock.beta1)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor."""
        return quotient(state[FIRST], taken(state).add_(eps).clamp_min_(torch.finfo(state[FIRST].dtype).tiny))
