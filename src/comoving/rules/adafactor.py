"""Second moments by the means of slices."""

from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import abs_squared, bounded, each_row, lerp_, over
from ..slots import Kind, Slot
from ..validate import check_choice, check_float
from .adam import FIRST
from .passing import hand_over, taken

_FACTOR = "factor."


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (arXiv 1804.04235, Algorithms 4 and 5) for a tensor of any order, real or complex.

    s   = |z|^2 + floor
    r_n <- b2_t r_n + (1 - b2_t) mean of s over all modes but n
    V   = r_1 (x) ... (x) r_N / mean^(N-1),  mean that of any r_n
    u   = z / sqrt(V)                       0 where V = 0
    d   = u / max(1, RMS(u) / clip)

    With momentum b1, the group's first, either of what is given, or of what would be written:

    "gradient"      m <- b1 m + (1 - b1) z,  and m / (1 - b1^t) stands in z's place in u
    "update"        m <- b1 m + (1 - b1) d,  and m is the direction, without bias correction

    or None, where d is the direction and no m is kept.

    r_n has d_n entries, real, in the slot "factor.n"; a vector keeps all of V. m is kept for b1 = 0 too, where it is
    the last gradient or direction. The second kind is no average of gradients: error feedback, and finders that look
    at momentum, are refused with it. The relative step size of the paper, by the weights' RMS, is left out. s is at
    most so large that its means stay finite; without a clip, a z for which they would not is scaled down first.

    Args:
        decay: b2_t = 1 - t^decay, decay < 0; None for a constant b2, the group's second, with V / (1 - b2^t).
        floor: added to the squares, >= 0.
        clip: of the update's RMS, > 0, or None.
        average: "gradient", "update" or None.
    """

    decay: float | None = -0.8
    floor: float = 1e-30
    clip: float | None = 1.0
    average: Literal["gradient", "update"] | None = "gradient"

    momentum = FIRST
    definite = False
    elementwise: ClassVar[bool] = False
    timeless: ClassVar[bool] = False
    replays = False
    replaces: ClassVar[bool] = False
    total: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.decay is not None:
            check_float("decay", self.decay, float("-inf"), 0.0, open_high=True)
        check_float("floor", self.floor, 0.0)
        if self.clip is not None:
            check_float("clip", self.clip, 0.0, open_low=True)
        check_choice("average", self.average, ("gradient", "update", None))

    @property
    def linear(self) -> bool:
        """Whether m is an average of gradients."""
        return self.average == "gradient"

    @property
    def corrected(self) -> bool:
        """Whether m is divided by 1 - b1^t, as the average of gradients is."""
        return self.average != "update"

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m where there is one, and r_n for each mode."""
        factors = (Slot(f"{_FACTOR}{n}", Kind.FACTORED, mode=n) for n in range(len(shape)))
        return (Slot(FIRST, Kind.LINEAR), *factors) if self.average else (*factors,)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b1, 1 - b1); (0, 1) without momentum."""
        return (clock.beta1, 1 - clock.beta1) if self.average else (0.0, 1.0)

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """The means and m, in place."""
        z = z if self.clip is not None else bounded(z, clock.rows)
        order = z.ndim - clock.rows
        squares = abs_squared(z).add_(self.floor)
        most = torch.finfo(z.dtype).max / (2 * max(1, prod(z.shape[clock.rows :])))
        t = clock.t.double()
        # After a restart of t the means begin anew with it, which the host's count would not.
        decay: Tensor | float = clock.beta2 if self.decay is None else (1 - t.clamp_min(1) ** self.decay)
        for n in range(order):
            others = tuple(m - order for m in range(order) if m != n)
            # An infinite mean would stay for ever.
            mean = (squares.mean(others) if others else squares).clamp_max_(most)
            state[f"{_FACTOR}{n}"].mul_(decay).add_(mean * (1 - decay))
        if self.average is None:
            hand_over(state, z)
            return
        lerp_(state[FIRST], z if self.linear else self._clipped(z, state, clock), 1 - clock.beta1)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor; eps does not count."""
        if self.average is None:
            return self._clipped(taken(state), state, clock)
        if not self.linear:
            return state[FIRST].clone()
        return self._clipped(state[FIRST], state, clock, clock.weight1)

    def _clipped(self, top: Tensor, state: dict[str, Tensor], clock: Clock, weight: float | Tensor = 1.0) -> Tensor:
        """top / (weight sqrt(V)) at no more than the RMS allowed, a new tensor."""
        rows = top.shape[: clock.rows]
        order = top.ndim - len(rows)
        factors = [state[f"{_FACTOR}{n}"] for n in range(order)]
        mean = factors[0].mean(-1) if rows else factors[0].mean()
        tiny = torch.finfo(mean.dtype).tiny
        root = mean.clamp_min(tiny).rsqrt()
        if self.decay is None:
            root = root * clock.weight2**0.5
        u = top * over(root / weight, top)
        mean = over(mean.clamp_min(tiny), factors[0])
        for n, r in enumerate(factors):
            share = r / mean
            inverse = torch.where(share > 0, share.clamp_min(tiny).rsqrt(), 0)
            u.mul_(inverse.view(*rows, *(1,) * n, -1, *(1,) * (order - 1 - n)))
        if self.clip is None:
            return u
        length = torch.linalg.vector_norm(each_row(u, 1), dim=-1) if rows else torch.linalg.vector_norm(u)
        rms = length / sqrt(max(1, prod(u.shape[len(rows) :])))
        return u.div_(over((rms / self.clip).clamp_min(1), u))
