"""Step 5 as one function, which can be compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..transport import mass_of
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
        rule: Rule, z: Tensor, moments: dict[str, Tensor], t: Tensor, betas: tuple[float, float], rows: int, eps: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return turned(rule, z, moments, Clock(t, *betas, rows=rows), eps), moments

    graphs = torch.compile(arithmetic, **options)

    def turn(rule: Rule, z: Tensor, state: dict[str, Any], clock: Clock, eps: float) -> Tensor:
        if z.is_complex():
            return turned(rule, z, state, clock, eps)
        own = [slot.name for slot in rule.slots(tuple(z.shape[clock.rows :]))]
        own += [name for name in map(mass_of, own) if name in state]
        betas, moments = (clock.beta1, clock.beta2), {name: state[name] for name in own}
        d, moments = graphs(rule, z, moments, clock.t, betas, clock.rows, eps)
        state.update(moments)
        return d

    return turn
