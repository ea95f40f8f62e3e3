"""What is in an optimizer's ``state_dict()``, and what becomes of one that is loaded."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from . import checkpoint
from .drivers import Driver
from .engine import Engine
from .roster import Roster


class Owner(Protocol):
    """An optimizer, as torch has it, with groups and states."""

    param_groups: list[dict[str, Any]]
    state: Any
    seed: int


class Contents:
    """Turns states as they are between steps into those of checkpoints, and back.

    Calls are collective where processes share parameters, or a driver keeps something of each process.

    Args:
        owner: whose states they are.
        roster: what was decided about its parameters.
        engine: what steps them.
    """

    def __init__(self, owner: Owner, roster: Roster, engine: Engine) -> None:
        self.owner, self.roster, self.engine = owner, roster, engine

    # --------------------------------------------------------------------------------------------------------- saving

    def packed(self, by_torch: dict[str, Any], driver: Driver | None, begun: bool) -> dict[str, Any]:
        """What a checkpoint has.

        Args:
            by_torch: torch's own, with the tensors of the states.
            driver: what brings gradients; it may keep something beside the states.
            begun: whether there has been a step, so that blocks which were idle get slots of zeros.
        """
        lasting, roster = self.engine.written_in_place(), self.roster
        ids = [key for group in by_torch["param_groups"] for key in group["params"]]
        params = dict(zip(ids, (p for group in self.owner.param_groups for p in group["params"]), strict=True))
        states: dict[Any, Any] = {
            key: {name: x.clone() if params[key] in lasting and isinstance(x, Tensor) else x for name, x in own.items()}
            for key, own in by_torch["state"].items()
        }
        if begun:
            blocked = [key for key, p in params.items() if roster.sites[p].blocks and roster.stepped_here(p)]
            states |= {key: self._with_idle(params[key], states.get(key, {})) for key in blocked}
        if roster.placements:
            from .distributed.saving import of_all  # noqa: PLC0415  (torch's DTensor takes its time)

            states = of_all(params, states, roster)
        if driver is not None:
            states = {key: driver.saved(params[key], own) for key, own in states.items()}
        groups = [checkpoint.describe_group(group) for group in by_torch["param_groups"]]
        return by_torch | {"state": states, "param_groups": groups}

    def _with_idle(self, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of blocks, with slots for all of them."""
        site = self.roster.sites[p].here
        scalars = self.engine.scalar_device(p, site)
        return checkpoint.with_idle(state, site, self.roster.group_of(p), p.device, scalars, self.owner.seed)

    # -------------------------------------------------------------------------------------------------------- loading

    def admitted(
        self, given: dict[str, Any], driver: Driver | None
    ) -> tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]], set[Tensor]]:
        """The states, and the groups without their parameters, that a checkpoint comes to; and of whom it has any.

        Raises:
            ValueError: a checkpoint of another recipe, other groups or other shapes, or no optimizer's; nothing has
                changed then.
        """
        checkpoint.check_form(given)
        roster, saved = self.roster, given["param_groups"]
        roster.adopt()
        keys = checkpoint.match_parameters(saved, self.owner.param_groups)
        groups = checkpoint.load_groups(saved, self.owner.param_groups, keys)
        states: dict[Tensor, Any] = {p: given["state"][key] for p, key in keys.items() if key in given["state"]}
        if roster.placements:
            from .distributed.saving import of_this_process  # noqa: PLC0415  (torch's DTensor takes its time)

            states = of_this_process(states, roster)
        found = {*states}
        states = {p: checkpoint.without_idle(self._own(p, own, driver), roster.sites[p]) for p, own in states.items()}
        states = {p: own for p, own in states.items() if own or not roster.sites[p].blocks}
        admitted = {
            p: checkpoint.admit(own, roster.sites[p].here, groups[roster.index[p]], self.owner.seed)
            for p, own in states.items()
        }
        roster.assign_loaded(admitted, groups)
        return admitted, groups, found

    def _own(self, p: Tensor, state: dict[str, Any], driver: Driver | None) -> Mapping[str, Any]:
        """A saved state with what this process keeps of what processes have kept each for itself."""
        if driver is not None:
            return driver.loaded(p, state)
        site, group, state = self.roster.sites[p], self.roster.group_of(p), checkpoint.without_wire(state)
        if site.projected and checkpoint.copies_in(state, site, group):
            from .distributed.copies import mean_of_copies  # noqa: PLC0415  (torch's DTensor takes its time)

            return mean_of_copies(state, site, group)
        return state

    def put(self, admitted: Mapping[Tensor, dict[str, Any]]) -> None:
        """Give parameters these states, in tensors of their own; the groups are there."""
        for p, state in admitted.items():
            site, group = self.roster.sites[p].here, self.roster.group_of(p)
            self.owner.state[p] = checkpoint.owned(state, p, site, group, self.engine.scalar_device(p, site))
        self.roster.forget_bytes()
        self.engine.forget()
        self.engine.sorting.recount()
