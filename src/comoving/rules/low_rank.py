"""Momentum kept as a product of two thin factors, fitted to every gradient by least squares."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import largest, over, quotient
from ..slots import Kind, Slot
from ..validate import check_choice, check_float, check_int
from .muon import Muon
from .passing import hand_over, taken

FIRST_PAIR = ("moment.first.left", "moment.first.right")
SECOND_PAIR = ("moment.second.left", "moment.second.right")
_DAMPING = 64
"""Machine epsilons of the trace that are added to a Gram matrix: what its rounding may have made singular."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class _LowRank:
    """What both rules share.

    Args:
        rank: k >= 1, or a share of the shorter side in (0, 1], rounded up.
    """

    rank: int | float = 0.25

    momentum = ""
    """None that has the core's shape: for whole frames only."""
    definite = False
    corrected = True
    linear = False
    elementwise: ClassVar[bool] = False
    timeless: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.rank, float):
            check_float("rank", self.rank, 0.0, 1.0, open_low=True)
        else:
            check_int("rank", self.rank, 1)

    def _pair(self, shape: tuple[int, ...], names: Pair, real: bool = False) -> tuple[Slot, Slot]:
        """The slots of B, which begins at zero, and of A, which begins with the lowest cosines."""
        sides = _sides(shape)
        k = min(*sides, ceil(self.rank * min(sides)) if isinstance(self.rank, float) else self.rank)
        (left, right), (m, n) = names, sides
        return Slot(left, Kind.THIN, size=(m, k), real=real), Slot(right, Kind.THIN, size=(n, k), real=real, waves=True)


@dataclass(frozen=True)
class LowRankMuon(_LowRank):
    """Muon with its momentum kept at low rank: LoRA-Pre for Muon (arXiv 2602.24283), real or complex.

    B <- (1 - g) B + g Z A (A^H A)^-1
    A <- (1 - g) A + g Z^H B (B^H B)^-1           with the new B
    m = B A^H                                     with nesterov  b m + (1 - b) Z
    d = s orth(m)

    Z is z as the matrix of its first mode against all others, m x n; B is m x k, A is n x k, and (1 - g)^2 = b, so that
    the product forgets as an average of decay b does. Each line is a Newton step of size g on |B A^H - Z|^2. Only the
    product has a meaning: A is kept with a largest entry of 1, and B has the size of the gradients. Gram matrices are
    damped by 64 machine epsilons of their trace. The paper draws A at random; here it begins with the lowest cosines.

    It has no momentum of the core's shape, and serves whole frames only (rank=1.0).

    Args:
        rank: k >= 1, or a share of the shorter side in (0, 1], rounded up.
        inner: what takes the place of the momentum's sum: its decay b, nesterov and the orthogonalization count, and
            ``ema`` does not.
    """

    inner: Muon = Muon(bf16=True)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.inner
        if type(given) is not Muon:
            raise ValueError(f"inner must be a Muon, got {given!r}")

    @property
    def replays(self) -> bool:
        """As that of Muon."""
        return self.inner.replays

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """B and A."""
        return self._pair(shape, FIRST_PAIR)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b, 1 - b), up to what has no room in k directions."""
        return self.inner.decay, 1 - self.inner.decay

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """B and A."""
        _fit(state, FIRST_PAIR, _flat(z, clock.rows), 1 - self.inner.decay**0.5, clock.rows)
        hand_over(state, z)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """S orth(m), a new tensor."""
        z, decay = taken(state), self.inner.decay
        m = _product(state, FIRST_PAIR).reshape(z.shape)
        hand_over(state, m.mul_(decay).add_(z, alpha=1 - decay) if self.inner.nesterov else m)
        return self.inner.direction(state, clock, eps)


@dataclass(frozen=True)
class LowRankAdam(_LowRank):
    """Adam with both moments kept at low rank: LoRA-Pre for Adam (arXiv 2602.24283), real or complex.

    m = B A^H of z and w = C D^H of |z|, fitted as :class:`LowRankMuon` says, with (1 - g)^2 = b1 and (1 - g)^4 = b2
    d = (m' / c1) / (sqrt(v / c2) + eps),   m' = b1 m + (1 - b1) z,  v = b2 w^2 + (1 - b2) |z|^2,  c = 1 - b^t

    The second moment is the square of a fit, for which it is never negative, but it may vanish where m does not: as
    published, gradients with few live rows make steps of thousands of learning rates. So entries of d are cut at
    ``limit``, which is ours. C and D are real.

    It has no momentum of the core's shape, and serves whole frames only (rank=1.0).

    Args:
        rank: k >= 1, or a share of the shorter side in (0, 1], rounded up.
        newest: whether the newest gradient counts whole, as in the formula; else m' = m and v = w^2.
        limit: of |d|, entry by entry, > 0; None for none, as published.
    """

    newest: bool = True
    limit: float | None = 5.0

    replays = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("newest", self.newest, (True, False))
        if self.limit is not None:
            check_float("limit", self.limit, 0.0, open_low=True)

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """B, A, C and D."""
        return *self._pair(shape, FIRST_PAIR), *self._pair(shape, SECOND_PAIR, real=True)

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b1, 1 - b1), up to what has no room in k directions."""
        return clock.beta1, 1 - clock.beta1

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """The four factors."""
        flat = _flat(z, clock.rows)
        _fit(state, FIRST_PAIR, flat, 1 - clock.beta1**0.5, clock.rows)
        _fit(state, SECOND_PAIR, flat.abs(), 1 - clock.beta2**0.25, clock.rows)
        hand_over(state, z)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """d, a new tensor."""
        z = taken(state)
        m, root = (_product(state, names).reshape(z.shape) for names in (FIRST_PAIR, SECOND_PAIR))
        if self.newest:
            m.mul_(clock.beta1).add_(z, alpha=1 - clock.beta1)
            root = torch.hypot(root.mul_(clock.beta2**0.5), z.abs().mul_((1 - clock.beta2) ** 0.5))
        weight = clock.weight2**0.5
        scale = root.abs_().add_(eps * weight).mul_(clock.weight1 / weight)
        return quotient(m, scale if self.limit is None else torch.maximum(scale, m.abs().div_(self.limit)))


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """m and n: the first mode longer than 1 against all others."""
    m = next((d for d in shape if d > 1), 1)
    return m, prod(shape) // max(1, m)


def _flat(z: Tensor, rows: int) -> Tensor:
    """Z, (*rows, m, n)."""
    return z.reshape(*z.shape[:rows], *_sides(z.shape[rows:]))


def _fit(state: dict[str, Tensor], names: Pair, z: Tensor, share: float, rows: int) -> None:
    """Fit the factors to Z by a step of size ``share``.

    Everything is divided by the larger of |Z| and |B| on the way, and the scale of A goes over to B.
    """
    left, right = names
    b, a = state[left], state[right]
    tiny = torch.finfo(z.dtype).tiny
    unit = torch.maximum(largest(z, rows), largest(b, rows)).clamp_min(tiny)
    z = z / over(unit, z)
    b = (b / over(unit, b)).mul_(1 - share).add_(z @ _dual(a), alpha=share)
    size = largest(b, rows)
    b = b / over(size.clamp_min(tiny), b)
    grown = (a * over(size * (1 - share), a)).add_(z.mH @ _dual(b), alpha=share)  # size times A
    peak = largest(grown, rows)
    a = torch.where(over(peak > 0, a), grown / over(peak.clamp_min(tiny), a), a)
    state[left], state[right] = b * over(peak * unit, b), a


def _product(state: dict[str, Tensor], names: Pair) -> Tensor:
    """B A^H."""
    return state[names[0]] @ state[names[1]].mH


def _dual(x: Tensor) -> Tensor:
    """X (X^H X)^-1, damped, of X with entries of about 1 at most; 0 for 0."""
    gram = (x.mH @ x).to(torch.promote_types(x.dtype, torch.float64))
    trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    damping = (trace * (_DAMPING * torch.finfo(x.dtype).eps)).clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(x.shape[-1], dtype=gram.dtype, device=x.device)
    lower, _ = torch.linalg.cholesky_ex(gram + damping[..., None, None] * eye)
    half = torch.linalg.solve_triangular(lower, eye.expand_as(gram), upper=False)
    return x @ (half.mH @ half).to(x.dtype)
