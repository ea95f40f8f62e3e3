"""How adaptive ranks are chosen at a refresh, within the budget."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import state as slots
from ..cell import Cell
from ..frames import Frame
from ..sites import Site
from . import budget as budgets
from .base import Record
from .reading import leading, read


class Roll(Protocol):
    """What is to be known of all parameters; see :class:`comoving.roster.Roster`."""

    @property
    def sites(self) -> Mapping[Tensor, Site]: ...  # noqa: D102
    def limit(self) -> int | None: ...  # noqa: D102
    def bytes_of(self, params: list[Tensor]) -> int: ...  # noqa: D102
    def forget_bytes(self, p: Tensor | None = None) -> None: ...  # noqa: D102
    def claim(self, p: Tensor) -> budgets.Claim: ...  # noqa: D102
    def group_of(self, p: Tensor) -> Mapping[str, Any]: ...  # noqa: D102
    def record(self, group: Mapping[str, Any]) -> Record: ...  # noqa: D102


class Adapting:
    """Chooses ranks, and asks other parameters for the bytes that were missing, once the step cannot fail any more.

    Args:
        roll: all parameters.
    """

    def __init__(self, roll: Roll) -> None:
        self._roll = roll
        self._asked: list[tuple[float, list[Tensor]]] = []

    def choose(self, p: Tensor, cell: Cell, seen: Tensor) -> Frame | None:
        """Before step 3: give the cell the ranks of its new frame; what is kept of the old one, None for all of it.

        Args:
            p: the parameter.
            cell: its state, decoded.
            seen: its gradient.
        """
        kind, rule = cell.kind, cell.kind.parts.rule
        site, policy = kind.site, kind.parts.ranks
        if not policy.adaptive or rule.momentum not in cell.moments:
            return None
        old: Any = cell.frame
        reading, directions = read(old, seen, cell.moments[rule.momentum])
        if reading is not None and old.ranks == site.ranks and cell.tick > 0:
            notches = self._roll.record(self._roll.group_of(p)).notches
            ranks = policy.wanted(reading, site.ranks, site.base, site.view.shape, cell.tick, notches)
            claim = budgets.Claim(site, kind.group, {})
            limit = self._roll.limit()
            if limit is not None:
                others = [q for q, other in self._roll.sites.items() if other.projected and q is not p]
                ranks, gain = budgets.grant(claim, ranks, reading, limit - self._roll.bytes_of(others))
                if gain > 0:
                    self._asked.append((gain, others))
            prices = budgets.prices(claim, reading, ranks)
            cell.host[slots.VALUE] = torch.tensor(prices, dtype=torch.float64, device="cpu")
            slots.set_ranks(cell.host, ranks)
            site = slots.current(site, kind.group, cell.host)
            cell.kind = kind.at(site)
        self._roll.forget_bytes(p)
        if old.ranks == site.ranks:
            return None
        schema = kind.parts.finder.schema(site.view.shape, site.ranks, site.view.dtype)
        stale = {name: spec for name, spec in schema.items() if cell.finder[name].shape != spec.shape}
        cell.finder |= slots.zeros(stale, seen.device, cell.t.device)
        return leading(old, directions, site.ranks)

    def settle(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Ask others for the ranks that a refresh would have had, now that nothing of it can fail."""
        for gain, others in self._asked:
            budgets.release(gain, {q: states.get(q, {}) for q in others}, self._roll.claim)
        self._asked.clear()

    def forget(self, p: Tensor) -> None:
        """The step of this parameter has failed."""
        self._asked.clear()
        self._roll.forget_bytes(p)
