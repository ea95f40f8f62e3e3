"""Shampoo in the core."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import (
    InverseRoot,
    abs_squared,
    add_gram,
    bounded,
    inverse_root,
    lerp,
    multiply_factors,
    norm,
    over,
    standing_root,
)
from ..slots import Kind, Slot
from ..transport import mass_of
from ..validate import check_choice, check_float, check_int
from .adam import FIRST, SECOND


@dataclass(frozen=True)
class Shampoo:
    """Shampoo (arXiv 1802.09568), with averages and grafting (arXiv 2309.06497), of any order, real or complex.

    For each mode n of the core, N of them, with Z_(n) the unfolding of z:

    m   <- b1 m + (1 - b1) z
    L_n <- decay L_n + (1 - decay) Z_(n) Z_(n)^H,   L^_n = L_n / (1 - decay^t)      (average=True)
    L_n <- L_n + Z_(n) Z_(n)^H,                     L^_n = L_n                      (average=False)
    A_n = (L^_n + eps I)^-exponent
    u   = (m / c1) x_1 A_1 ... x_N A_N
    d   = u |a| / |u|,   a = (m / c1) / (sqrt(v / c2) + eps_Adam)                   (graft=True; else d = u)

    L_n counts the present gradient before its root is taken. v <- b2 v + (1 - b2) |z|^2 exists for grafting alone;
    where the transport carries a mass of v, it stands in place of c2. Without grafting d has no unit size: its entries
    are of about (r_1 ... r_N)^(-1/2N) with averages, and fall as t^(-1/2) with sums.

    With ``every`` > 1 the roots of matrices are kept between steps, and taken anew early where a change of frame has
    moved L_n; those of diagonals cost nothing and are never old.

    Args:
        decay: of the averages, in [0, 1); unused with sums.
        average: averages or sums.
        exponent: > 0; None for 1/(2N).
        eps: > 0, added after bias correction.
        every: steps between roots, >= 1.
        max_size: longest mode with a matrix L_n, >= 1; longer ones keep its diagonal.
        root: "eigh" or "newton", see :func:`comoving.linalg.inverse_root`.
        graft: whether d has the length of Adam's direction.
    """

    momentum = FIRST
    corrected = True
    linear = True
    elementwise: ClassVar[bool] = False
    timeless: ClassVar[bool] = False
    replays = False
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    decay: float = 0.999
    average: bool = True
    exponent: float | None = None
    eps: float = 1e-12
    every: int = 1
    max_size: int = 2048
    root: InverseRoot = "eigh"
    graft: bool = True

    def __post_init__(self) -> None:
        check_float("decay", self.decay, 0.0, 1.0, open_high=True)
        check_choice("average", self.average, (True, False))
        check_exponent(self.exponent, self.root)
        check_float("eps", self.eps, 0.0, open_low=True)
        check_int("every", self.every, 1)
        check_int("max_size", self.max_size, 1)
        check_choice("graft", self.graft, (True, False))

    @property
    def definite(self) -> bool:
        """Whether roots are taken by Newton's iteration."""
        return self.root == "newton"

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m, v for grafting, L_n as "shampoo.n" and, where they are kept, A_n as "shampoo.n.root"."""
        slots = [Slot(FIRST, Kind.LINEAR)]
        if self.graft:
            slots.append(Slot(SECOND, Kind.VARIANCE, mean=FIRST))
        for n, d in enumerate(shape):
            slots.append(Slot(_factor(n), Kind.COVARIANCE if d <= self.max_size else Kind.FACTORED, mode=n))
            if self.every > 1 and d <= self.max_size:
                slots.append(Slot(_root(n), Kind.CACHE, mode=n))
        return tuple(slots)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b1, 1 - b1)."""
        return clock.beta1, 1 - clock.beta1

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """The averages, and the roots that are kept."""
        state[FIRST] = lerp(state[FIRST], z, 1 - clock.beta1)
        if self.graft:
            state[SECOND] = abs_squared(z).mul_(1 - clock.beta2).add_(state[SECOND], alpha=clock.beta2)
        keep, add = (self.decay, 1 - self.decay) if self.average else (1.0, 1.0)
        due = (clock.tick - 1) % self.every == 0
        rows = clock.rows
        limited = bounded(z, rows)
        for n in range(z.ndim - rows):
            factor = state[_factor(n)] = add_gram(state[_factor(n)], limited, n, keep, add, rows)
            if self.every > 1 and factor.ndim == rows + 2 and (due or _root(n) not in state):
                state[_root(n)] = self._root(factor, z, clock)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor."""
        m = state[FIRST] / clock.weight1
        roots: dict[int, Tensor] = {}
        for n in range(m.ndim - clock.rows):
            kept = state.get(_root(n))
            roots[n] = self._root(state[_factor(n)], m, clock) if kept is None else standing_root(kept)
        u = multiply_factors(m, roots, clock.rows)
        if not self.graft:
            return u
        mass = state.get(mass_of(SECOND))
        a = m / (state[SECOND] / (clock.weight2 if mass is None else mass)).sqrt_().add_(eps)
        length = norm(u, clock.rows)
        return u * over(torch.where(length > 0, norm(a, clock.rows) / length, 0).to(a.dtype), u)

    def _root(self, factor: Tensor, core: Tensor, clock: Clock) -> Tensor:
        if self.average:
            factor = factor / clock.weight(self.decay)
        exponent = self.exponent or 1 / (2 * (core.ndim - clock.rows))
        return inverse_root(factor, self.eps, exponent, self.root, clock.rows)


def check_exponent(exponent: float | None, root: str) -> None:
    """Raise unless the way of taking roots is known and can take this one.

    Raises:
        TypeError, ValueError: with the value and the interval.
    """
    check_choice("root", root, ("eigh", "newton"))
    if exponent is None:
        return
    check_float("exponent", exponent, 0.0, open_low=True)
    if root == "newton" and abs(round(1 / exponent) * exponent - 1) > 1e-9:
        raise ValueError(f"exponent must be 1/p with an integer p for root='newton', got {exponent!r}")


def _factor(mode: int) -> str:
    return f"shampoo.{mode}"


def _root(mode: int) -> str:
    return f"shampoo.{mode}.root"
