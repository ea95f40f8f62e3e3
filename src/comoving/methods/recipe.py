"""A recipe: a method as a composition of parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import state as slots
from ..codecs import Spec
from ..formula import StateFormula, formula_of
from ..frames.base import Rank
from ..optimizer import LowRankOptimizer
from ..parts import in_words
from ..roles import Role


@dataclass(frozen=True)
class Recipe:
    """A method: what it is, where it is published, and what it is made of.

    Args:
        name: its name in :func:`build`.
        summary: one line.
        paper: the arXiv id, or where else it is described.
        options: hyper-parameters of :class:`comoving.LowRankOptimizer` that make the method.
        relative_rate: its usual learning rate as a multiple of AdamW's; for most a mean of the best ones on the race's
            tasks (docs/frontier.md).
        full_rank: whether it ignores ``rank``.
        rank: that of the method where it has one of its own, which a user may still override; None for 0.25.
        state: the formula of its state where that is no polynomial of m, n and r.
        roles: role -> options in place of those for parameters of this role, which no recipe projects; see
            :mod:`comoving.roles`. Those that stay dense and are not given get AdamW.
    """

    name: str
    summary: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=lambda: {})
    relative_rate: float = 1.0
    full_rank: bool = False
    rank: Rank | None = None
    state: str = ""
    roles: Mapping[Role, Mapping[str, Any]] = field(default_factory=lambda: {})

    def rank_for(self, given: Rank | None) -> Rank | None:
        """The rank that projected parameters get: the given one, or its own; None where it has full rank."""
        if self.full_rank:
            return None
        return given if given is not None else 0.25 if self.rank is None else self.rank

    @property
    def parts(self) -> dict[str, str]:
        """Role -> part, in words, of what the recipe sets."""
        return {role: in_words(value) for role, value in self.options.items()}

    def state_formula(self) -> StateFormula | None:
        """The state of an m x n matrix, m <= n, at rank r; None where it is no polynomial, or no matrix is taken."""
        if self.state:
            return None

        def layout(m: int, n: int, r: int) -> Mapping[str, Spec]:
            p = nn.Parameter(torch.empty(m, n, dtype=torch.float32, device="meta"))
            optimizer = LowRankOptimizer([p], rank=1.0 if self.full_rank else r, **self.options)
            return slots.layout(optimizer.sites[p], optimizer.param_groups[0])

        try:
            return formula_of(layout)
        except ValueError:
            return None
