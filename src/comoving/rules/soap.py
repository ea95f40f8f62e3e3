"""SOAP in the core."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import (
    abs_squared,
    add_gram,
    bounded,
    each_row,
    in_order,
    leading_basis,
    lerp,
    multilinear,
    over,
    quotient,
    turned_basis,
)
from ..slots import Kind, Slot
from ..transport import mass_of
from ..validate import check_choice, check_float, check_int
from .adam import FIRST, SECOND


@dataclass(frozen=True)
class SOAP:
    """SOAP (arXiv 2409.11321): Adam in the eigenbases of Shampoo's factors, of any order, real or complex.

    For each mode n of the core of at most ``max_size`` entries, with Z_(n) the unfolding of z and x' = x x_1 Q_1^H ...:

    Q_n = eigenvectors of the first L_n, largest eigenvalue first
    m   <- b1 m + (1 - b1) z,      v <- b2 v + (1 - b2) |z'|^2
    d'  = (m' / c1) / (sqrt(v / c2) + eps),      d = d' x_1 Q_1 ... x_N Q_N
    L_n <- decay L_n + (1 - decay) Z_(n) Z_(n)^H
    after every ``every`` steps:  Q_n <- QR(L_n Q_n[:, j]),  j the order of Re diag(Q_n^H L_n Q_n) downwards, and
    v, with the mass that a transport may carry beside it, permuted by j along mode n.

    Longer modes stay as they are: Q_n = I. Unlike the published code, the first gradient makes an update too: a frame's
    first gradient cannot be left out of error feedback. The step after which bases turn is made with the old ones, as
    published; they turn at the start of the next one, after a change of frame where there is one.

    The first bases hold directions in which there was no gradient at all, where m' and v are what rounding left of
    turning z. So that this is not made as large as everything else, max(r_n) machine epsilons of the largest
    sqrt(v / c2) are added to eps.

    Permuted, v knows nothing of a direction that a turn of the bases brings in: as published m' / sqrt(v) is without
    limit there, thousands where gradients have few live rows. Entries of d' are therefore cut to Adam's own bound

    |d'| <= sqrt(K c2) / c1,   K = (1 - b1)^2 / (1 - b2) (1 + rho + ... + rho^(t-1)),   rho = b1^2 / b2

    (Cauchy-Schwarz over the two averages; 1 for b1 = b2), which nothing exceeds while the bases stand and no codec
    rounds; kappa, being at most c2, leaves it as it is. |d| is at most sqrt(r_1 ... r_N) times that.

    m lives in the core and v in the bases, so that a change of frame moves m by R_n and v by Q'_n^H R_n Q_n, exactly
    (|R|^2 and all) where frames of one span follow each other. With :class:`comoving.transport.Keep` the numbers of all
    four stay: bases that were found in the old coordinates serve the new ones until they turn.

    Args:
        decay: of L_n, in [0, 1); None for b2.
        every: steps between power iterations, >= 1.
        max_size: longest mode that is turned, >= 1.
        one_sided: of a matrix, turn the shorter side alone, the first on a tie; in a frame of one
            side that is the compressed one, so that L and Q are as small as its rank. Of a tensor all modes, also where
            only two are longer than 1.
    """

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

    decay: float | None = None
    every: int = 10
    max_size: int = 2048
    one_sided: bool = False

    def __post_init__(self) -> None:
        if self.decay is not None:
            check_float("decay", self.decay, 0.0, 1.0, open_high=True)
        check_int("every", self.every, 1)
        check_int("max_size", self.max_size, 1)
        check_choice("one_sided", self.one_sided, (True, False))

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m, v in the bases, L_n as "soap.n" and Q_n as "soap.n.basis"."""
        modes = self._modes(shape)
        turned_by = tuple((n, _basis(n)) for n in modes)
        moments = Slot(FIRST, Kind.LINEAR), Slot(SECOND, Kind.VARIANCE, mean=FIRST, turned_by=turned_by)
        factors = (Slot(_factor(n), Kind.COVARIANCE, mode=n) for n in modes)
        return (*moments, *factors, *(Slot(_basis(n), Kind.BASIS, mode=n) for n in modes))

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b1, 1 - b1)."""
        return clock.beta1, 1 - clock.beta1

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """The bases where they are due, then the averages."""
        core = tuple(z.shape[clock.rows :])
        modes = self._modes(core)
        if clock.tick > 2 and (clock.tick - 1) % self.every == 0:
            for n in modes:
                basis, order = turned_basis(state[_factor(n)], state[_basis(n)])
                state[_basis(n)] = basis.contiguous()
                for name in {SECOND, mass_of(SECOND)} & state.keys():
                    state[name] = in_order(state[name], n - len(core), order)
        decay = clock.beta2 if self.decay is None else self.decay
        limited = bounded(z, clock.rows)
        for n in modes:
            state[_factor(n)] = add_gram(state[_factor(n)], limited, n, decay, 1 - decay, clock.rows)
            if clock.tick == 1:
                state[_basis(n)] = leading_basis(state[_factor(n)]).contiguous()
        state[FIRST] = lerp(state[FIRST], z, 1 - clock.beta1)
        turned = multilinear(z, [None if q is None else q.mH for q in self._bases(len(core), state)])
        state[SECOND] = abs_squared(turned).mul_(1 - clock.beta2).add_(state[SECOND], alpha=clock.beta2)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor."""
        m = state[FIRST]
        core = m.shape[clock.rows :]
        bases = self._bases(len(core), state)
        mass = state.get(mass_of(SECOND))
        scale = (state[SECOND] / (clock.weight2 if mass is None else mass)).sqrt_()
        longest = max((d for d, q in zip(core, bases, strict=True) if q is not None), default=0)
        if longest:
            most = each_row(scale, clock.rows).amax(-1) if clock.rows else scale.amax()
            scale.add_(over(most * (longest * torch.finfo(scale.dtype).eps), scale))
        scale.add_(eps).mul_(clock.weight1)
        turned = multilinear(m, [None if q is None else q.mH for q in bases])
        return multilinear(_cut(quotient(turned, scale), clock), bases)

    def _modes(self, shape: tuple[int, ...]) -> list[int]:
        # Not by which modes are longer than 1: ranks that change would then change the slots.
        sides = [min((0, 1), key=lambda n: shape[n])] if self.one_sided and len(shape) == 2 else range(len(shape))
        return [n for n in sides if shape[n] <= self.max_size]

    def _bases(self, order: int, state: dict[str, Tensor]) -> list[Tensor | None]:
        return [state.get(_basis(n)) for n in range(order)]


def _cut(x: Tensor, clock: Clock) -> Tensor:
    """Entries of x, in place, at most as large as Adam's can be."""
    limit: Any = clock.limit
    return x.mul_((limit / x.abs()).clamp_max_(1)) if x.is_complex() else x.clamp_(-limit, limit)


def _factor(mode: int) -> str:
    return f"soap.{mode}"


def _basis(mode: int) -> str:
    return f"soap.{mode}.basis"
