"""Gain: learning faster inside a subspace that is given, by a larger gradient there (study 3B)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..validate import check_float
from .hooks import before_step, check_owned, check_strided
from .orthonormal import add_lifted, check_directions, inside, working_dtype
from .targets import matrix_of


@dataclass(frozen=True)
class Gain:
    """By how much the gradient inside the subspace is multiplied.

    Args:
        alpha: in (1, inf).
    """

    alpha: float = 2.0

    def __post_init__(self) -> None:
        check_float("alpha", self.alpha, 1.0, open_low=True)


Where = Tensor | nn.Module
"""A matrix among the optimizer's parameters, or a module whose ``weight`` it is."""
Bases = tuple[Tensor, Tensor | None]


class Amplifier:
    """What :func:`amplify` returns: a gain that is in force until it is removed."""

    def __init__(self, optimizer: Optimizer, gain: Gain, directions: dict[Tensor, Bases]) -> None:
        self.gain = gain
        self._optimizer, self._directions = optimizer, directions
        self._handle: RemovableHandle = before_step(optimizer, "amplify", self._amplify)

    def use(self, where: Where, U: Tensor, V: Tensor | None = None) -> None:
        """Replace the directions of one matrix, or add a matrix; copies are taken.

        Args:
            where: the matrix, (d_out, d_in).
            U: (d_out, r) with orthonormal columns; none of them to leave its gradient alone.
            V: (d_in, k) likewise; None for a gain of all of U U^T g.

        Raises:
            TypeError, ValueError: what is no matrix of the optimizer, or directions that do not fit it.
        """
        self._directions[_parameter(where)] = _checked(self._optimizer, where, U, V)

    def remove(self) -> None:
        """Leave gradients as they are from now on."""
        self._handle.remove()
        self._directions.clear()

    @torch.no_grad()
    def _amplify(self) -> None:
        for p, (u, v) in self._directions.items():
            if p.grad is None:
                continue
            check_strided("amplify", p.grad)
            add_lifted(p.grad, u, inside(p.grad, u, v), v, self.gain.alpha - 1)


def amplify(
    optimizer: Optimizer,
    directions: Mapping[Any, Bases],
    alpha: float | Gain = 2.0,
) -> Amplifier:
    """Multiply the gradient inside a subspace by alpha before each step; the rest passes unchanged.

        g <- g + (alpha - 1) U U^T g V V^T,     or without V     g <- g + (alpha - 1) U U^T g

    ``p.grad`` itself is changed, after any clipping and after hooks that were registered on the optimizer earlier, so
    that a monitor to which the plain gradient matters comes first. Adam's second moments normalise a part of the gain
    away: where the subspace is most of an entry's gradient, m/sqrt(v) hardly grows. The directions are no part of any
    state_dict.

    Args:
        optimizer: any; a closure's gradients are amplified after each call of it.
        directions: parameter, or module with a ``weight`` -> (U, V); see :meth:`Amplifier.use`. May be empty.
        alpha: in (1, inf), or a :class:`Gain`.

    Returns:
        An :class:`Amplifier`: ``use(where, U, V)`` replaces directions, ``remove()`` ends it.

    Raises:
        TypeError, ValueError: alpha outside its interval; a parameter that the optimizer does not hold or that is no
            matrix; directions of another shape, or not orthonormal; an optimizer that steps in the backward pass.
    """
    gain = alpha if isinstance(alpha, Gain) else Gain(alpha)
    return Amplifier(optimizer, gain, {_parameter(p): _checked(optimizer, p, u, v) for p, (u, v) in directions.items()})


def _parameter(where: Where) -> Tensor:
    if isinstance(where, nn.Module):
        if not isinstance(getattr(where, "weight", None), Tensor):
            raise ValueError(f"{type(where).__name__} has no weight to amplify")
        return matrix_of(where)
    return where


def _checked(optimizer: Optimizer, where: Where, u: Tensor, v: Tensor | None) -> Bases:
    p = _parameter(where)
    if p.ndim != 2 or not p.is_floating_point():
        raise ValueError(f"amplify needs a floating-point matrix, got {p.dtype} of shape {tuple(p.shape)}")
    check_owned(optimizer, {f"the parameter of shape {tuple(p.shape)}": p})
    check_directions("U", u, p.shape[0])
    if v is not None:
        check_directions("V", v, p.shape[1])
    dtype = working_dtype(p.dtype)
    kept = u.detach().to(p.device, dtype, copy=True)
    return kept, None if v is None else v.detach().to(p.device, dtype, copy=True)
