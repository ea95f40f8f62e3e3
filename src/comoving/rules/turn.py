"""Step 5 as one function, which can be compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..transport import Clock
from .base import Rule

Turn = Callable[[Rule, Tensor, dict[str, Any], Clock, float], Tensor]


def turned(rule: Rule, z: Tensor, state: dict[str, Any], clock: Clock, eps: float) -> Tensor:
    """The direction that the rule makes of z, which its slots in the state take up."""
    rule.absorb(z, state, clock)
    return rule.direction(state, clock, eps)


def compiled(**options: Any) -> Turn:
    """:func:`turned`, compiled for every rule, shape and dtype that it is called with; for rules without a host clock.

    Complex cores are turned as they are: no code is generated for complex numbers, and those that were decoded, being
    views of real pairs, cannot be traced.

    Args:
        **options: for :func:`torch.compile`.
    """

    def arithmetic(
        rule: Rule, z: Tensor, moments: dict[str, Tensor], t: Tensor, betas: tuple[float, float], eps: float
    ) -> Tensor:
        return turned(rule, z, moments, Clock(t, *betas), eps)

    graphs = torch.compile(arithmetic, **options)

    def turn(rule: Rule, z: Tensor, state: dict[str, Any], clock: Clock, eps: float) -> Tensor:
        if z.is_complex():
            return turned(rule, z, state, clock, eps)
        moments = {name: x for name, x in state.items() if name.startswith("moment.")}
        return graphs(rule, z, moments, clock.t, (clock.beta1, clock.beta2), eps)

    return turn
