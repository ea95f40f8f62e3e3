"""Shampoo's preconditioner in the full space."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Spec
from ..linalg import (
    InverseRoot,
    add_gram,
    bounded,
    inverse_root,
    multiply_factors,
    norm,
    over,
    standing_root,
)
from ..rules.shampoo import check_exponent
from ..validate import check_choice, check_float, check_int

_CALLS = "precondition.calls"


@dataclass(frozen=True)
class Kronecker:
    """Shampoo's Kronecker factors (arXiv 1802.09568) on the gradient, before it is projected.

    For each mode n, N of them, with G_(n) the unfolding of g, at every call:

    L_n <- decay L_n + (1 - decay) G_(n) G_(n)^H
    A_n = (L_n / (1 - decay^k) + eps I)^-exponent,   k the number of calls so far
    g'  = g x_1 A_1 ... x_N A_N,  times |g| / |g'| with ``norm_matched``, which leaves the rule the gradient's size

    L_n counts g before its root is taken. The factors are as large as the modes squared: it is the modes of at most
    ``max_size`` entries that have them. Frames, momentum and error feedback all live in the coordinates of g', which
    change slowly with L_n: what feedback kept is not brought up to date. A gradient whose Gram matrices would overflow
    is scaled down first.

    Args:
        decay: in [0, 1).
        exponent: > 0; None for 1/(2N).
        eps: > 0, added after bias correction.
        every: steps between roots, >= 1; in between those of matrices are kept, which doubles the memory.
        max_size: longest mode with a matrix, >= 1.
        above: longer modes have the "diagonal" of L_n, or "none".
        root: "eigh" or "newton", see :func:`comoving.linalg.inverse_root`.
        norm_matched: whether g' has g's norm.
    """

    batched: ClassVar[bool] = True
    replays: ClassVar[bool] = False

    decay: float = 0.99
    exponent: float | None = None
    eps: float = 1e-12
    every: int = 1
    max_size: int = 2048
    above: str = "diagonal"
    root: InverseRoot = "eigh"
    norm_matched: bool = True

    def __post_init__(self) -> None:
        check_float("decay", self.decay, 0.0, 1.0, open_high=True)
        check_exponent(self.exponent, self.root)
        check_float("eps", self.eps, 0.0, open_low=True)
        check_int("every", self.every, 1)
        check_int("max_size", self.max_size, 1)
        check_choice("above", self.above, ("diagonal", "none"))
        check_choice("norm_matched", self.norm_matched, (True, False))

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """L_n as "precondition.n" and, where they are kept, A_n as "precondition.n.root"; k, one number."""
        schema = {_CALLS: Spec((), torch.float32, scalar=True)}
        for n in self._modes(shape):
            d = shape[n]
            if d > self.max_size:
                schema[_factor(n)] = Spec((d,), dtype.to_real() if dtype.is_complex else dtype)
                continue
            schema[_factor(n)] = Spec((d, d), dtype)
            if self.every > 1:
                schema[_root(n)] = Spec((d, d), dtype)
        return schema

    def apply(self, gradient: Tensor, state: dict[str, Tensor], step: int, rows: int = 0) -> Tensor:
        """g', a new tensor."""
        gradient = bounded(gradient, rows)
        state[_CALLS] = state[_CALLS] + 1
        weight = 1 - self.decay ** state[_CALLS].double()
        if rows:  # it lies beside the step count, and only one number may be of another device
            weight = weight.to(gradient.device, gradient.dtype.to_real(), non_blocking=True)
        power = self.exponent or 1 / (2 * (gradient.ndim - rows))
        roots: dict[int, Tensor] = {}
        for n in self._modes(tuple(gradient.shape[rows:])):
            factor = state[_factor(n)] = add_gram(state[_factor(n)], gradient, n, self.decay, 1 - self.decay, rows)
            kept = state.get(_root(n))
            if kept is not None and (step - 1) % self.every != 0:
                roots[n] = standing_root(kept)
                continue
            roots[n] = inverse_root(factor / over(weight, factor), self.eps, power, self.root, rows)
            if kept is not None:
                state[_root(n)] = roots[n]
        turned = multiply_factors(gradient, roots, rows)
        if not self.norm_matched:
            return turned
        length = norm(turned, rows)
        return turned * over(torch.where(length > 0, norm(gradient, rows) / length, 0).to(turned.dtype), turned)

    def _modes(self, shape: tuple[int, ...]) -> list[int]:
        return [n for n, d in enumerate(shape) if d <= self.max_size or self.above == "diagonal"]


def _factor(mode: int) -> str:
    return f"precondition.{mode}"


def _root(mode: int) -> str:
    return f"precondition.{mode}.root"
