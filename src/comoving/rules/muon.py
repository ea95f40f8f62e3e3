"""Orthogonalized momentum."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..clock import Clock
from ..linalg import norm, over, unit_size
from ..slots import Kind, Slot
from ..validate import check_choice, check_float, check_int
from .adam import FIRST
from .orthogonalize import QUINTIC, Triple, newton_schulz, polar, triples, unit_columns, unit_rows
from .passing import hand_over, taken

_SINGLE = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan, 2024; scaling of Moonlight, arXiv 2502.16982), real or complex.

    m <- b m + z                  x = m, with nesterov  z + b m
    m <- b m + (1 - b) z          x = m, with nesterov  (1 - b) z + b m        (ema)
    m <- b m + z / |z|            x = m, with nesterov  z / |z| + b m          (normalized), and then m <- m / |m|
    d = s after(orth(before(x)))

    The momentum has z's dtype. Tensors are cut into matrices, all of them orthogonalized at once.

    Args:
        decay: b in [0, 1); the group's betas do not count. With b = 0 nothing is stored, and d = s orth(z): the
            stochastic gradient descent with orthogonalized gradients of arXiv 2202.07052.
        nesterov: look one step ahead.
        ema: whether m is an average, or a sum. The direction is the same but for eps.
        method: "newton-schulz" takes ``steps`` iterations X <- a X + (b X X^H + c (X X^H)^2) X from X = x / max(|x|,
            eps), eps that of the group, which bring the singular values near 1; "polar" is U_r V_r^H of the SVD, over
            the singular values that are not zero (which waits for the device); "rows" divides each row by max(|x_i|,
            eps) instead (RMNP, arXiv 2603.20527), and decomposes nothing.
        steps: >= 1.
        coefficients: (a, b, c), or "quintic", which are Jordan's; "polar-express" are others at every iteration, the
            best ones for what the last iteration has left (arXiv 2505.16932; see
            :func:`comoving.rules.orthogonalize.triples`).
        scale: "match" for an update of RMS 0.2: s = 0.2 sqrt(max(m, n)), or 0.2 sqrt(n) where rows have unit length in
            the end, 0.2 sqrt(m) where columns have; "spectral" sqrt(max(1, m/n)); or s > 0 itself.
        over: the matrix of a tensor: "flat" the first mode against all others; "each" the first two modes longer than
            1, for every index of the others (one matrix per frequency of a spectral weight (in, out, k_1, k_2)); "auto"
            is "each" for complex, "flat" for real tensors.
        bf16: iterate in bfloat16 where the core is real and of single or half precision, as the authors do.
        before: "rows" divides each row of x by max(|x_i|, eps) first (MuonEq, arXiv 2603.28254).
        after: "rows" brings the rows of what is orthogonalized to unit length, "columns" the columns, "both" the
            columns and then the rows (Muon+, arXiv 2602.21545); rows and columns that are no more than rounding has
            left stay small.
        normalized: each gradient counts alike, and what is stored has norm 1, so that rounding it costs the same at
            every step (MuonQ, arXiv 2605.11396). m is no average of gradients then; error feedback, and finders that
            look at momentum, are refused. ``ema`` does not count.
    """

    decay: float = 0.95
    nesterov: bool = True
    ema: bool = False
    method: Literal["newton-schulz", "polar", "rows"] = "newton-schulz"
    steps: int = 5
    coefficients: Triple | Literal["quintic", "polar-express"] = QUINTIC
    scale: float | str = "match"
    over: Literal["auto", "flat", "each"] = "auto"
    bf16: bool = False
    before: Literal["none", "rows"] = "none"
    after: Literal["none", "rows", "columns", "both"] = "none"
    normalized: bool = False

    momentum = FIRST
    definite = False
    corrected = True
    elementwise: ClassVar[bool] = False
    timeless: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    total: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_float("decay", self.decay, 0.0, 1.0, open_high=True)
        for name in ("nesterov", "ema", "bf16", "normalized"):
            check_choice(name, getattr(self, name), (True, False))
        check_choice("method", self.method, ("newton-schulz", "polar", "rows"))
        check_int("steps", self.steps, 1)
        check_coefficients(self.coefficients)
        if isinstance(self.scale, str):
            if self.scale not in {"match", "spectral"}:
                raise ValueError(f"scale must be 'match', 'spectral' or a number in (0, inf), got {self.scale!r}")
        else:
            check_float("scale", self.scale, 0.0, open_low=True)
        check_choice("over", self.over, ("auto", "flat", "each"))
        check_choice("before", self.before, ("none", "rows"))
        check_choice("after", self.after, ("none", "rows", "columns", "both"))

    @property
    def replays(self) -> bool:
        """Unless it decomposes, which waits for the device."""
        return self.method != "polar"

    @property
    def linear(self) -> bool:
        """Whether m is an average of gradients."""
        return not self.normalized

    @property
    def unit(self) -> Literal["none", "rows", "columns"]:
        """What has unit length in the end."""
        if self.after == "none":
            return "rows" if self.method == "rows" else "none"
        return "columns" if self.after == "columns" else "rows"

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
        if self.normalized:
            z = to_length_1(z, clock.rows)
            m = state[FIRST] = to_length_1((state[FIRST] * decay).add_(z), clock.rows)
            hand_over(state, z.add_(m, alpha=decay) if self.nesterov else m)
            return
        m = state[FIRST] = (state[FIRST] * decay).add_(z, alpha=intake)
        hand_over(state, torch.add(z if intake == 1 else z * intake, m, alpha=decay) if self.nesterov else m)

    def direction(self, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """s after(orth(before(x))), a new tensor."""
        x = taken(state)
        core = x.shape[clock.rows :]
        modes = self._two_modes(core, x.is_complex())
        if modes is None:
            first = next((d for d in core if d > 1), 1)
            flat = x.reshape(*x.shape[: clock.rows], first, prod(core) // max(1, first))
            return self._directed(flat, state, clock, eps).reshape(x.shape).contiguous()
        cut = x.movedim(modes, (-2, -1))
        return self._directed(cut, state, clock, eps).movedim((-2, -1), modes).contiguous()

    def _directed(self, x: Tensor, state: dict[str, Tensor], clock: Clock, eps: float) -> Tensor:
        """The direction of matrices (*batch, m, n)."""
        return self.orthogonal(x, eps).mul_(self.size(*x.shape[-2:]))

    def _two_modes(self, core: Sequence[int], is_complex: bool) -> tuple[int, int] | None:
        """The modes of each matrix, from the end; None for the first against all others."""
        each = self.over == "each" or (self.over == "auto" and is_complex)
        long = [n - len(core) for n, d in enumerate(core) if d > 1]
        return (long[0], long[1]) if each and len(long) > 2 else None

    def orthogonal(self, x: Tensor, eps: float) -> Tensor:
        """after(orth(before(x))) of matrices (*batch, m, n), a new tensor."""
        if self.before == "rows":
            x = unit_rows(x, eps)
        if self.method == "polar":
            x = polar(x)
        elif self.method == "rows":
            x = unit_rows(x, eps)
        else:
            chosen, safety = triples(self.coefficients, self.steps)
            low = self.bf16 and x.dtype in _SINGLE
            x = newton_schulz(x, chosen, eps, torch.bfloat16 if low else x.dtype, safety)
        left = max(eps, max(x.shape[-2:]) * torch.finfo(x.dtype).eps)  # by rounding
        if self.after in {"columns", "both"}:
            x = unit_columns(x, left)
        return unit_rows(x, left) if self.after in {"rows", "both"} else x

    def size(self, rows: int, columns: int) -> float:
        """s of a matrix."""
        if self.scale == "match":
            return 0.2 * sqrt({"none": max(rows, columns), "rows": columns, "columns": rows}[self.unit])
        return sqrt(max(1.0, rows / columns)) if isinstance(self.scale, str) else self.scale


def check_coefficients(given: Any) -> None:
    """Raise unless these are the name of polynomials, or three numbers.

    Raises:
        ValueError: with what is known.
    """
    if isinstance(given, str):
        check_choice("coefficients", given, ("quintic", "polar-express"))
        return
    if type(given) is not tuple or len(given) != 3:
        raise ValueError(f"coefficients must be a tuple of three numbers, 'quintic' or 'polar-express', got {given!r}")
    for i, c in enumerate(given):
        check_float(f"coefficients[{i}]", c, float("-inf"))


def to_length_1(x: Tensor, rows: int) -> Tensor:
    """x / |x|, a new tensor, or zero: of all of a row."""
    scaled = unit_size(x, rows)
    length = norm(scaled, rows)
    return scaled.div_(over(torch.where(length > 0, length, 1), scaled))
