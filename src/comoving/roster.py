"""The roster: what was decided about every parameter, and what may still be edited of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import checkpoint
from . import state as slots
from .batches import Owner
from .frames.base import Side
from .groups import check_options, decide
from .likeness import pieces
from .ranks import Record
from .ranks import assignment as assignments
from .ranks import budget as budgets
from .ranks.limit import limit_bytes
from .schedule import stagger
from .sites import Site
from .weights import codes_of

if TYPE_CHECKING:
    from .comm import Comm
    from .distributed.placement import Spread

_EDITABLE = ("lr", "rate", "betas", "eps", "weight_decay", "scale", "refresh_every", "maximize", "foreach", "fused")
"""What may be edited in a group, and is checked when it was."""
_PERIOD = "refresh_every"
"""What of it decides who is stepped together; rates are read anew at every step."""


class Roster:
    """The sites of all parameters, their groups, and the budget that their states share.

    Args:
        owner: the optimizer.
        budget: as for :class:`comoving.LowRankOptimizer`, parsed.
        changed: called when something was decided anew.
    """

    def __init__(self, owner: Owner, budget: int | float | None, changed: Callable[[], None]) -> None:
        self.owner, self.budget, self._changed = owner, budget, changed
        self.sites: dict[Tensor, Site] = {}
        self.blocked: set[Tensor] = set()  # those whose blocks have frames of their own
        self.index: dict[Tensor, int] = {}
        self.fixed: list[dict[str, Any]] = []
        self.placements: dict[Tensor, Spread] = {}  # of parameters that processes share
        self._comms: dict[Any, Comm] | None = None
        self._loads: dict[Any, list[float]] = {}  # how many entries each process steps for others
        self._members: list[list[Tensor]] = []
        self._edited: dict[int, dict[str, Any]] = {}
        self._limit: int | None = None
        self._bytes: dict[Tensor, int] = {}

    def group_of(self, p: Tensor) -> dict[str, Any]:
        """The parameter group of a parameter that is here."""
        return self.owner.param_groups[self.index[p]]

    def restore(self, sites: dict[Tensor, Site], index: dict[Tensor, int], fixed: list[dict[str, Any]]) -> None:
        """Take over what was decided for another optimizer, of which this is a copy."""
        self.sites, self.index, self.fixed = sites, index, fixed
        self.placements, self._comms = _spreads([(site.name, p) for p, site in sites.items()], 0), None
        self._members = [list(group["params"]) for group in self.owner.param_groups]
        self.blocked = {p for p, site in sites.items() if site.blocks}

    # ------------------------------------------------------------------------------------------------------- deciding

    def decided(
        self, pairs: Sequence[tuple[str | None, Tensor]], given: Mapping[str, Any], group: Mapping[str, Any]
    ) -> list[Site]:
        """The sites of parameters that are about to join, still without phases.

        Args:
            pairs: (name, parameter).
            given: their hyper-parameters, with codecs that may be "auto".
            group: the same with those settled.

        Raises:
            ValueError: what does not fit a parameter, or cannot be served.
        """
        spreads = _spreads(pairs, len(self.sites))
        sites = self._decide(pairs, given, group, {})
        if spreads:
            sites = self._placed(pairs, given, group, sites, spreads)
        deferred = [site.name for site in sites if site.deferred]
        if deferred and self.owner.on_nonfinite == "skip":
            raise ValueError(
                f"on_nonfinite='skip' is refused: {', '.join(deferred)} would be merged at a skipped refresh, "
                f"which cannot be undone without reading the device; use 'raise'"
            )
        return sites

    def _decide(
        self,
        pairs: Sequence[tuple[str | None, Tensor]],
        given: Mapping[str, Any],
        group: Mapping[str, Any],
        sides: Mapping[Tensor, Side],
    ) -> list[Site]:
        sites = decide(pairs, group, len(self.sites), sides)
        return [assignments.fill_in(site, given, self.budget is not None) for site in sites]

    def _placed(
        self,
        pairs: Sequence[tuple[str | None, Tensor]],
        given: Mapping[str, Any],
        group: Mapping[str, Any],
        sites: list[Site],
        spreads: "Mapping[Tensor, Spread]",
    ) -> list[Site]:
        """The sites of parameters that processes share: who steps what, on the sides that are not cut where one may."""
        from .distributed import placement  # noqa: PLC0415  (torch's DTensor takes its time)

        if self.budget is not None:
            raise ValueError(
                f"budget={self.budget!r} is refused: {', '.join(site.name for site in sites[:3])} are sharded over "
                f"processes, which would share it out differently; give rank, codec and moments instead"
            )
        self.placements |= spreads
        self._comms = None
        params, again = [p for _, p in pairs], partial(self._decide, pairs, given, group)
        return placement.place_all(params, sites, group, spreads, again, self._loads)

    def here(self, p: Tensor) -> Tensor:
        """What is here of a parameter."""
        return self.placements[p].here(p) if p in self.placements else p

    def gradient(self, p: Tensor) -> Tensor:
        """What is here of a parameter's gradient, which has one."""
        assert p.grad is not None
        return self.placements[p].here(p.grad) if p in self.placements else p.grad

    def part_here(self, p: Tensor, gradient: Tensor) -> Tensor:
        """What is here of a gradient that somebody brings for a parameter.

        Raises:
            ValueError: it is placed otherwise than the parameter.
        """
        spread = self.placements.get(p)
        if spread is None:
            return gradient
        if not spread.places(gradient):
            raise ValueError(
                f"the gradient of {self.sites[p].name} must be a DTensor that is placed as the parameter is, as "
                f"{spread.placements}"
            )
        return spread.here(gradient)

    def stepped_here(self, p: Tensor) -> bool:
        """Whether this process steps a parameter, or what is here of it, and has its state."""
        owner = self.sites[p].owner
        return owner is None or owner == self.placements[p].rank

    def anywhere(self, flag: Tensor) -> Tensor:
        """Whether a flag is set in any process that shares parameters with this one."""
        if self.placements:
            for comm in self.comms.values():
                flag = comm.largest(flag.float()) > 0
        return flag

    @property
    def comms(self) -> "Mapping[Any, Comm]":
        """Group of processes that share parameters -> what they ask one another through, in the same order everywhere.

        The group is None where there are no others, in a plan.
        """
        if self._comms is None:
            self._comms = {spread.group: spread.comm_of_all for spread in self.placements.values() if spread.cut}
        return self._comms

    def join(self, params: Sequence[Tensor], sites: Sequence[Site], group: Mapping[str, Any]) -> list[Site]:
        """The sites of parameters that are about to join, and those of all others, within the budget.

        Raises:
            ValueError: nothing fits; nothing has changed then.
        """
        joined = self.sites | dict(zip(params, sites, strict=True))
        assigned = self.assigned(joined, lambda p: self.group_of(p) if p in self.sites else group)
        self.sites |= {p: assigned[p] for p in self.sites}
        return [assigned[p] for p in params]

    def place(self, params: Sequence[Tensor], sites: Sequence[Site], index: int) -> None:
        """Register the sites, with phases that spread the work of refreshes evenly."""
        group = self.owner.param_groups[index]
        self._members.append(list(params))
        for key, value in checkpoint.unheard(group).items():
            group.setdefault(key, value)
        every = group["refresh_every"]
        self.fixed.append({key: group[key] for key in slots.FIXED})
        load: dict[int, float] = {}
        for p, site in self.sites.items():
            if site.projected and self.group_of(p)["refresh_every"] == every:
                load[site.phase] = load.get(site.phase, 0.0) + p.numel()
        moving = [piece for piece in pieces(sites, group, index) if sites[piece[0]].projected]
        phases = stagger((float(sum(params[i].numel() for i in piece)) for piece in moving), every, load)
        phase_of = {i: phase for piece, phase in zip(moving, phases, strict=True) for i in piece}
        for i, (p, site) in enumerate(zip(params, sites, strict=True)):
            self.sites[p] = replace(site, phase=phase_of.get(i, 0))
            self.index[p] = index
            if site.blocks:
                self.blocked.add(p)
        self._changed()

    def exchange(self, role: str, parts: Sequence[Any]) -> None:
        """Give every group another part of a role, before any of its parameters has a state.

        Args:
            role: of the parts.
            parts: one a group.

        Raises:
            ValueError: the budget is too small for what they keep; nothing has changed then.
        """
        groups = self.owner.param_groups
        before = [group[role] for group in groups]
        for group, part in zip(groups, parts, strict=True):
            group[role] = part
        try:
            sites = self.assigned(self.sites, self.group_of)
        except ValueError:
            for group, part in zip(groups, before, strict=True):
                group[role] = part
            raise
        self.sites |= sites
        for fixed, part in zip(self.fixed, parts, strict=True):
            fixed[role] = part
        self.forget_bytes()
        self._changed()

    def remove(self, params: Sequence[Tensor], index: int) -> None:
        """Forget parameters whose group, of this number, was taken away."""
        self._comms = None
        for p in params:
            del self.sites[p]
            self.placements.pop(p, None)
            self.blocked.discard(p)
        del self.fixed[index], self._members[index]
        self.index = {p: i for i, group in enumerate(self.owner.param_groups) for p in group["params"]}
        self.forget_bytes()
        self._changed()

    def adopt(self) -> None:
        """Take up parameters that some tool has put into the places of others, as accelerate does when it shards.

        Raises:
            ValueError: they are of another shape or dtype, others in number, or what they replace was stepped already.
        """
        groups = self.owner.param_groups
        taken: dict[Tensor, Tensor] = {}
        for group, members in zip(groups, self._members, strict=True):
            if len(group["params"]) != len(members):
                raise ValueError("a parameter group has other parameters than it had: call add_param_group() instead")
            if not all(map(is_, group["params"], members)):
                taken |= {old: p for old, p in zip(members, group["params"], strict=True) if p is not old}
        if not taken:
            return
        stepped = [self.sites[old].name for old in taken if self.owner.state.get(old)]
        if stepped:
            raise ValueError(
                f"{', '.join(stepped[:5])}: another parameter has taken its place in the optimizer, and the state is "
                f"that of the old one: shard or replace parameters before the first step and before loading a state"
            )
        sites: dict[Tensor, Site] = {}
        for group, members in zip(groups, self._members, strict=True):
            names: list[str | None] = group.get("param_names") or [None] * len(members)
            anew: list[tuple[str | None, Tensor]] = []
            for name, old in zip(names, members, strict=True):
                if old in taken:
                    self._check_as_built(taken[old], self.sites[old])
                    anew.append((name, taken[old]))
            decided = dict(zip([p for _, p in anew], self.decided(anew, group, group), strict=True))
            for old in members:
                site, p = self.sites[old], taken.get(old, old)
                if p in decided:
                    kept = {key: getattr(site, key) for key in ("name", "phase", "index", "codec", "moments")}
                    site = replace(decided[p], **kept)
                sites[p] = site
        index = {taken.get(old, old): number for old, number in self.index.items()}
        before = (self.sites, self.index)
        self.sites, self.index = {p: sites[p] for p in index}, index
        try:
            self.sites = self.assigned(self.sites, self.group_of)
        except ValueError:
            self.sites, self.index = before
            raise
        self._comms = None
        for old in taken:
            self.owner.state.pop(old, None)
            self.placements.pop(old, None)
        self._members = [list(group["params"]) for group in groups]
        self.blocked = {p for p, site in self.sites.items() if site.blocks}
        self.forget_bytes()
        self._changed()

    # --------------------------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        """Refuse edits of what was decided at construction; rates, decay rates and the refresh period may change.

        Raises:
            ValueError, TypeError: such an edit, one to a value outside its interval, or parameters of another dtype.
        """
        self.adopt()
        for p, site in self.sites.items():
            if not _kept(p, site):
                self.check_kept(p)
        changed = [site.name for p, site in self.sites.items() if site.coded != (codes_of(p) is not None)]
        if changed:
            raise ValueError(
                f"{', '.join(changed)}: quantized or dequantized since this optimizer was built, or without the model "
                f"that held the codes: call comoving.weights.quantize(model) first, then build the optimizer"
            )
        self.check_edits()

    def check_edits(self) -> None:
        """Refuse edits of groups, as :meth:`check` does, and take note of those that are allowed."""
        for index, (group, fixed) in enumerate(zip(self.owner.param_groups, self.fixed, strict=True)):
            editable, before = {key: group[key] for key in _EDITABLE}, self._edited.get(index)
            if before != editable:
                check_options(group)
                self._edited[index] = editable
                if before is None or before[_PERIOD] != editable[_PERIOD]:
                    self._changed()
            edited = [key for key, value in fixed.items() if group[key] != value]
            if edited:
                raise ValueError(
                    f"{', '.join(edited)} cannot be edited in a parameter group: what is projected, and what its state "
                    f"holds, is decided at construction. Build a new optimizer and load this one's state_dict()"
                )

    def check_kept(self, p: Tensor) -> None:
        """Raise unless a parameter is here, with the dtype and shape that its state was made for."""
        if p not in self.sites:
            self.adopt()
        site = self.sites.get(p)
        if site is None:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is none of this optimizer's")
        self._check_as_built(p, site)

    @staticmethod
    def _check_as_built(p: Tensor, site: Site) -> None:
        if _kept(p, site):
            return
        now, then = ((p.dtype, tuple(p.shape)), (site.view.stored_dtype, site.view.stored_shape))
        raise ValueError(
            f"{site.name} is {now[0]} of shape {now[1]}, and was {then[0]} of shape {then[1]} when this optimizer was "
            f"built: call model.to(dtype), .double(), .half() and the like before building the optimizer, or build a "
            f"new one and load this one's state_dict()"
        )

    # --------------------------------------------------------------------------------------------------------- budget

    def limit(self) -> int | None:
        """The bytes that the budget allows the state of the projected parameters that are here; None without one."""
        if self._limit is None and self.budget is not None:
            self._limit = limit_bytes(self.budget, [p for p, site in self.sites.items() if site.projected])
        return self._limit

    def assigned(
        self, sites: Mapping[Tensor, Site], group_of: Callable[[Tensor], Mapping[str, Any]]
    ) -> dict[Tensor, Site]:
        """The sites, with ranks and codecs that fit the budget; those that have a state are asked for lower ranks.

        Raises:
            ValueError: nothing fits; nothing has changed then.
        """
        if self.budget is None:
            return dict(sites)
        claims: dict[Tensor, budgets.Claim] = {}
        for p, site in sites.items():
            group, state = group_of(p), self.owner.state.get(p, {})
            if site.projected:
                claims[p] = budgets.Claim(slots.current(site, group, state), group, state)
        return dict(sites) | self._assign(claims, anew=True)

    def _assign(self, claims: Mapping[Tensor, budgets.Claim], anew: bool) -> dict[Tensor, Site]:
        """Sites within the budget of those that have no state; of the others the ranks in their state are lowered."""
        assert self.budget is not None
        limit = limit_bytes(self.budget, claims)
        share = f"{limit}, {self.budget:.4g} of AdamW's state" if isinstance(self.budget, float) else str(limit)
        assigned = assignments.assign([*claims.values()], limit, anew, share)
        self.forget_bytes()
        for site, claim in zip(assigned, claims.values(), strict=True):
            if slots.RANKS in claim.state:
                slots.set_ranks(claim.state, site.ranks)
        return {p: site for (p, claim), site in zip(claims.items(), assigned, strict=True) if not claim.state}

    def assign_loaded(self, admitted: Mapping[Tensor, dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
        """Lower the ranks that loaded parameters ask for where they exceed the budget; frames follow at the next step.

        Raises:
            ValueError: even the lowest ranks need more.
        """
        if self.budget is None:
            return
        claims: dict[Tensor, budgets.Claim] = {}
        for p, site in self.sites.items():
            group, state = groups[self.index[p]], admitted.get(p, {})
            if site.projected:
                if slots.RANKS in state:
                    state[slots.RANKS] = state[slots.RANKS].clone()
                claims[p] = budgets.Claim(slots.current(site, group, state), group, state)
        self.sites |= self._assign(claims, anew=False)
        self._changed()

    def claim(self, p: Tensor) -> budgets.Claim:
        """What one projected parameter has of the budget."""
        group, state = self.group_of(p), self.owner.state.get(p, {})
        return budgets.Claim(slots.current(self.sites[p], group, state), group, state)

    def bytes_of(self, params: Sequence[Tensor]) -> int:
        """The bytes of projected parameters; remembered, since each of them refreshes."""
        self._bytes |= {q: self.claim(q).bytes_now() for q in params if q not in self._bytes}
        return sum(self._bytes[q] for q in params)

    def forget_bytes(self, p: Tensor | None = None) -> None:
        """What one parameter, or all, has of the budget has changed."""
        if p is None:
            self._bytes.clear()
            self._limit = None
        else:
            self._bytes.pop(p, None)

    @staticmethod
    def record(group: Mapping[str, Any]) -> Record:
        """What validation has said so far."""
        return Record(*group.get(slots.VALIDATION, ()))


def _kept(p: Tensor, site: Site) -> bool:
    """Whether a parameter has the dtype and shape that its state was made for."""
    return site.coded or (p.dtype is site.view.stored_dtype and p.shape == site.view.stored_shape)


def _spreads(pairs: Sequence[tuple[str | None, Tensor]], first: int) -> "dict[Tensor, Spread]":
    """How the entries are spread of those parameters that processes share."""
    if all(type(p) in {Tensor, nn.Parameter} for _, p in pairs):
        return {}
    from .distributed.placement import spread_of  # noqa: PLC0415  (torch's DTensor takes its time)

    found = {p: spread_of(p, name or f"parameter {first + i}") for i, (name, p) in enumerate(pairs)}
    return {p: spread for p, spread in found.items() if spread is not None}
