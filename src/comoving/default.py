"""The default optimizer: one learning rate, and as many bytes of state as there are."""

from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from .composition.compose import Composer, counted_bytes, members_of
from .composition.table import Table, measured
from .groups import joining
from .optimizer import LowRankOptimizer
from .ranks.limit import parse_budget
from .roles import Role, check_rates
from .rounding import Rounding
from .validate import names_unknown, plain

UNDECAYED: tuple[Role, ...] = ("table", "position", "norm", "bias", "scalar")
"""The roles that weight decay leaves alone."""


class Optimizer(LowRankOptimizer):
    """The best composition known for each parameter, at AdamW's learning rate, in a given number of bytes.

    ``comoving.Optimizer(model, lr=...)`` in place of ``torch.optim.AdamW(model.parameters(), lr=...)``. Every
    parameter has a role (:mod:`comoving.roles`): matrices get orthogonalized momentum, in as many bits as the budget
    allows, or the orthogonalized gradient alone; tables and heads, norms and biases what measured best for them. The
    choices, their rates and what each costs in quality are data (:mod:`comoving.composition.table`); bytes go where
    they save most (:mod:`comoving.allocation`). :func:`comoving.explain` shows what was chosen.

    The update of a matrix has about the RMS that AdamW's has, so that AdamW's learning rate carries over; the rates of
    other roles are factors of it, by principle (docs/choosing.md).

    Args:
        params: a model, which says most about roles; or named parameters, parameters, or groups of these.
        lr: AdamW's learning rate for the model's matrices, >= 0.
        budget: what the state of all parameters together never exceeds: an int of bytes; text with a unit, "400MB"; a
            share of the float32 state that torch's AdamW keeps for the same parameters, a float in (0, 1], "12.5%" or
            "1/8"; 0 for no state at all; None for the best whatever it takes. Single numbers, step counts and
            seeds, are kept at any budget and do not count. Of parameters that processes share it is the state of all
            processes together.
        rates: role -> factor of its learning rate, over the table's.
        betas, eps, weight_decay: as in AdamW, of parameters that get Adam; the decay, decoupled, is of matrices only,
            at ``lr`` itself.
        rounding, on_nonfinite, seed, maximize, foreach, fused: as for :class:`comoving.LowRankOptimizer`.
        table: the choices, or the file that they are in; None for those of this release.

    Raises:
        ValueError: a budget below what the least state needs, with the parameter that needs most; an unknown role, or a
            rate for one that no parameter has.
        TypeError: an unknown argument.
    """

    @names_unknown
    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        budget: int | float | str | None = None,
        *,
        rates: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        rounding: Rounding = "nearest",
        on_nonfinite: str = "raise",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        table: Table | str | Path | None = None,
    ) -> None:
        members = members_of(params)
        own: dict[str, Any] = dict(
            betas=betas, eps=eps, weight_decay=weight_decay, rounding=rounding, maximize=maximize
        )
        own |= dict(foreach=foreach, fused=fused)
        self._composer = Composer(
            measured() if table is None else table if isinstance(table, Table) else Table.load(table),
            parse_budget(plain(budget), least=0),
            _DEFAULTS | own,
            check_rates(rates, dict.fromkeys(m.role for m in members)),
            UNDECAYED,
        )
        groups = self._composer.groups(members)
        super().__init__(groups, lr, on_nonfinite=on_nonfinite, seed=seed, **own)

    @property
    def state_limit(self) -> int | None:
        """The bytes that the budget allows the state of all parameters, counts and seeds apart; None for no limit."""
        return self._composer.limit([*self.sites])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which get the best that fits what the others have left of the budget.

        Raises:
            ValueError: an empty group, a duplicate parameter, a value outside its interval, or too little is left.
            TypeError: an unknown hyper-parameter.
        """
        if not self._complete:
            super().add_param_group(param_group)
            return
        used = sum(counted_bytes(site, self.roster.group_of(p)) for p, site in self.sites.items())
        joining(param_group, self.defaults, self.sites)  # raises before anything is added
        for group in self._composer.groups(members_of([param_group]), used, [*self.sites]):
            super().add_param_group(group)

    def __getstate__(self) -> dict[str, Any]:
        """With what more parameters would be given."""
        return super().__getstate__() | {"composer": self._composer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore it."""
        if "composer" in state:
            self._composer = state.pop("composer")
        super().__setstate__(state)


_ITS_OWN = {"self", "params", "on_nonfinite", "seed", "budget"}
_DEFAULTS = {n: p.default for n, p in signature(LowRankOptimizer.__init__).parameters.items() if n not in _ITS_OWN}
"""Every hyper-parameter of a group."""
ARGUMENTS = tuple(name for name in signature(Optimizer.__init__).parameters if name not in {"self", "params", "lr"})
"""What the user decides."""
