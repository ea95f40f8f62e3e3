"""Orthogonalized momentum."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import svd
from ..slots import Kind, Slot
from ..validate import check_choice, check_float, check_int
from .adam import FIRST
from .passing import hand_over, taken

_QUINTIC = (3.4445, -4.7750, 2.0315)


_SINGLE = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan, 2024; scaling of Moonlight, arXiv 2502.16982), real or complex.

    m <- b m + z                  x = m, with nesterov  z + b m
    m <- b m + (1 - b) z          x = m, with nesterov  (1 - b) z + b m        (ema)
    d = s orth(x)

    The momentum has z's dtype. Tensors are cut into matrices, all of them orthogonalized at once.

    Args:
        decay: b in [0, 1); the group's betas do not count. With b = 0 nothing is stored, and d = s orth(z): the
            stochastic gradient descent with orthogonalized gradients of arXiv 2202.07052.
        nesterov: look one step ahead.
        ema: whether m is an average, or a sum. The direction is the same but for eps.
        method: "newton-schulz" takes ``steps`` iterations X <- a X + (b X X^H + c (X X^H)^2) X from X = x / max(|x|,
            eps), eps that of the group, which bring the singular values near 1; "polar" is U_r V_r^H of the SVD, over
            the singular values that are not zero (which waits for the device).
        steps: >= 1.
        coefficients: (a, b, c).
        scale: "match" s = 0.2 sqrt(max(m, n)), an update of RMS 0.2; "spectral" sqrt(max(1, m/n)); or s > 0 itself.
        over: the matrix of a tensor: "flat" the first mode against all others; "each" the first two modes longer than
            1, for every index of the others (one matrix per frequency of a spectral weight (in, out, k_1, k_2)); "auto"
            is "each" for complex, "flat" for real tensors.
        bf16: iterate in bfloat16 where the core is real and of single or half precision, as the authors do.
    """

    decay: float = 0.95
    nesterov: bool = True
    ema: bool = False
    method: Literal["newton-schulz", "polar"] = "newton-schulz"
    steps: int = 5
    coefficients: tuple[float, float, float] = _QUINTIC
    scale: float | str = "match"
    over: Literal["auto", "flat", "each"] = "auto"
    bf16: bool = False

    momentum = FIRST
    definite = False
    corrected = True
    linear = True
    elementwise: ClassVar[bool] = False
    timeless: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_float("decay", self.decay, 0.0, 1.0, open_high=True)
        for name in ("nesterov", "ema", "bf16"):
            check_choice(name, getattr(self, name), (True, False))
        check_choice("method", self.method, ("newton-schulz", "polar"))
        check_int("steps", self.steps, 1)
        if type(self.coefficients) is not tuple or len(self.coefficients) != 3:
            raise ValueError(f"coefficients must be a tuple of three numbers, got {self.coefficients!r}")
        for i, c in enumerate(self.coefficients):
            check_float(f"coefficients[{i}]", c, float("-inf"))
        if isinstance(self.scale, str):
            if self.scale not in {"match", "spectral"}:
                raise ValueError(f"scale must be 'match', 'spectral' or a number in (0, inf), got {self.scale!r}")
        else:
            check_float("scale", self.scale, 0.0, open_low=True)
        check_choice("over", self.over, ("auto", "flat", "each"))

    @property
    def replays(self) -> bool:
        """Unless it decomposes, which waits for the device."""
        return self.method == "newton-schulz"

    def slots(self, shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """m; none where nothing of it is left after a step."""
        return (Slot(FIRST, Kind.LINEAR),) if self.decay else ()

    def recursion(self, clock: Clock) -> tuple[float, float]:
        """(b, 1), or (b, 1 - b) for an average."""
        return self.decay, 1 - self.decay if self.ema else 1.0

    def absorb(self, z: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        """m."""
        decay, intake = self.recursion(clock)
        if not decay:
            hand_over(state, z)
            return
        m = state[FIRST] = (state[FIRST] * decay).add_(z, alpha=intake)
        hand_over(state, (z * intake).add_(m, alpha=decay) if self.nesterov else m)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """s orth(x), a new tensor."""
        x = taken(state)
        core = x.shape[clock.rows :]
        modes = self._two_modes(core, x.is_complex())
        if modes is None:
            first = next((d for d in core if d > 1), 1)
            flat = x.reshape(*x.shape[: clock.rows], first, prod(core) // max(1, first))
            return self._orthogonal(flat, eps).reshape(x.shape).contiguous()
        cut = x.movedim(modes, (-2, -1))
        return self._orthogonal(cut, eps).movedim((-2, -1), modes).contiguous()

    def _two_modes(self, core: Sequence[int], is_complex: bool) -> tuple[int, int] | None:
        """The modes of each matrix, from the end; None for the first against all others."""
        each = self.over == "each" or (self.over == "auto" and is_complex)
        long = [n - len(core) for n, d in enumerate(core) if d > 1]
        return (long[0], long[1]) if each and len(long) > 2 else None

    def _orthogonal(self, x: Tensor, eps: float) -> Tensor:
        rows, columns = x.shape[-2:]
        if self.method == "polar":
            result = polar(x)
        else:
            low = self.bf16 and x.dtype in _SINGLE
            result = newton_schulz(x, self.steps, self.coefficients, eps, torch.bfloat16 if low else x.dtype)
        if self.scale == "match":
            return result.mul_(0.2 * sqrt(max(rows, columns)))
        return result.mul_(sqrt(max(1.0, rows / columns)) if isinstance(self.scale, str) else self.scale)


def newton_schulz(x: Tensor, steps: int, coefficients: Sequence[float], eps: float, dtype: torch.dtype) -> Tensor:
    """X <- a X + (b X X^H + c (X X^H)^2) X, a new tensor of x's shape (*batch, m, n); iterated in ``dtype``."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    start = _normalized(x.mT if tall else x, eps).to(dtype)
    matrices = start.reshape(prod(start.shape[:-2]), *start.shape[-2:])
    for _ in range(steps):
        gram = matrices @ matrices.mH
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=a)
    result = matrices.reshape(start.shape).to(x.dtype)
    return result.mT if tall else result


def _normalized(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps) for each matrix; squares of the entries may leave float32's range."""
    tiny = torch.finfo(x.dtype).tiny
    unit = x.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    scaled = x / unit
    size = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    # |x| = unit size; x / max(|x|, eps) = scaled / max(size, eps / unit), and eps / unit may be inf for x = 0.
    return scaled / torch.maximum(size, eps / unit).clamp_min(tiny)


def polar(x: Tensor) -> Tensor:
    """U_r V_r^H over the singular values above rounding, a new tensor of x's shape (*batch, m, n)."""
    u, s, vh = svd(x)
    kept = s > max(x.shape[-2:]) * torch.finfo(s.dtype).eps * s[..., :1]
    return (u * kept.unsqueeze(-2)) @ vh
