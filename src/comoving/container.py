"""An optimizer without its step: groups, the state of parameters and of their blocks, budget and checkpoints."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint, gradients
from . import state as slots
from .batches import Batches, Kind, kind_of, pieces
from .codecs import Part
from .groups import check_options, decide, named
from .linalg import asks_host
from .ranks import Record
from .ranks import assignment as assignments
from .ranks import budget as budgets
from .ranks.limit import limit_bytes, parse_budget
from .resume import Resume
from .rules.turn import Turn
from .schedule import SMALL, stagger
from .sites import Site
from .steps import Unit
from .validate import check_known, plain
from .weights import codes_of

# Keys of param groups that are not hyper-parameters.
_SCHEDULED = ("lr", "betas", "eps", "weight_decay", "scale", "refresh_every", "maximize", "foreach", "fused")
"""What may be edited in a group, and is checked when it was."""
_FOREIGN = {"params", "param_names", "name", "initial_lr", slots.RUNNING, slots.VALIDATION}


def _numbers(p: Tensor) -> list[Tensor]:
    """The tensors that hold a parameter's numbers: its codes, or itself."""
    codes = codes_of(p)
    return [p] if codes is None else codes.numbers()


def _kept(p: Tensor, site: Site) -> bool:
    """Whether a parameter has the dtype and shape that its state was made for."""
    return site.coded or (p.dtype is site.view.stored_dtype and p.shape == site.view.stored_shape)


def _sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    if type(p) in {Tensor, nn.Parameter}:
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  (takes its time)

    return isinstance(p, DTensor)


class Container(Optimizer):
    """Holds parameters in groups, each with its site and state, and loads and saves them; a subclass steps them.

    Args:
        params: as for :class:`comoving.LowRankOptimizer`.
        defaults: every hyper-parameter of a group, checked.
        on_nonfinite, seed, budget: as for :class:`comoving.LowRankOptimizer`.
    """

    sites: dict[Tensor, Site]
    """What was decided about each parameter; see :func:`comoving.explain`."""

    stacked_entries: int
    """Up to how many entries a parameter, or a block of one, is stepped together with those like it; 0 for none. Not
    part of the state; see :mod:`comoving.batches`."""

    refresh_scope: Callable[[], AbstractContextManager[Any]]
    """Called at each refresh for a context to run it in: a timer or profiler range. Not part of the state."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        on_nonfinite: str,
        seed: int,
        budget: int | float | str | None,
    ) -> None:
        self.on_nonfinite, self.seed, self.budget = on_nonfinite, seed, parse_budget(budget)
        self._begin()
        self._complete = False  # the budget is shared out once, over all groups
        super().__init__(params, defaults)
        self._complete = True
        self.sites |= self._within_budget(self.sites, self._group_of)
        self._forget_kinds()

    def _begin(self) -> None:
        self.sites = {}
        self._group_index: dict[Tensor, int] = {}
        self.refresh_scope = nullcontext
        self._skipped: Tensor | None = None
        self._compiled: Turn | None = None
        self._norms: dict[Tensor, Tensor] = {}
        self._fixed: list[dict[str, Any]] = []
        self._held: dict[Tensor, int] = {}
        self._complete = True
        self._limit: int | None = None
        self._scheduled: dict[int, list[Any]] = {}
        self._resume = Resume()
        self.stacked_entries = SMALL
        self._batches = Batches()
        self._kinds: dict[tuple[Tensor, str | None], Kind | None] = {}
        self._alike: dict[Kind, Kind] = {}
        self._block_sites: dict[tuple[Tensor, int], Site] = {}
        self._releases: list[tuple[float, list[Tensor]]] = []

    # ---------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, or (name, parameter) pairs, with hyper-parameters of their own.

        Raises:
            ValueError: an empty group, a duplicate parameter, or a hyper-parameter that does not fit.
            TypeError: an unknown hyper-parameter.
        """
        given: Any = param_group
        if not isinstance(given, dict) or "params" not in given:
            raise TypeError(f"a parameter group is a dict with its parameters under 'params', got {given!r}")
        pairs = named(param_group["params"])
        check_known(param_group.keys() - _FOREIGN, self.defaults)
        param_group = {key: value if key == "params" else plain(value) for key, value in param_group.items()}
        if not pairs:
            raise ValueError("a parameter group is empty")
        params = [p for _, p in pairs]
        repeated = [n or i for i, (n, p) in enumerate(pairs) if p in self.sites or any(p is q for q in params[:i])]
        if repeated:
            raise ValueError(f"duplicate parameters: {repeated} are already in this or another group")
        given = self.defaults | param_group
        group = assignments.settled(given)
        check_options(group)
        sites = [assignments.opening(s, given, self.budget is not None) for s in decide(pairs, group, len(self.sites))]
        deferred = [site.name for site in sites if site.deferred]
        if deferred and self.on_nonfinite == "skip":
            raise ValueError(
                f"on_nonfinite='skip' is refused: {', '.join(deferred)} would be merged at a skipped refresh, "
                f"which cannot be undone without reading the device; use 'raise'"
            )
        sharded = [site.name for (_, p), site in zip(pairs, sites, strict=True) if not site.plain and _sharded(p)]
        if sharded:
            raise ValueError(
                f"{', '.join(sharded[:5])}: sharded over processes (a DTensor, as fully_shard() makes it), which only "
                f"torch's own AdamW steps here: leave them whole, or keep them dense"
            )
        if self._complete:
            joined = self.sites | dict(zip(params, sites, strict=True))
            decided = self._within_budget(joined, lambda p: self._group_of(p) if p in self.sites else group)
            self.sites |= {p: decided[p] for p in self.sites}
            sites = [decided[p] for p in params]
        settled = {role: group[role] for role in assignments.ROLES}
        super().add_param_group({**param_group, **settled, "params": pairs if pairs[0][0] is not None else params})
        self._place(params, sites, len(self.param_groups) - 1)

    def remove_param_group(self, index: int) -> None:
        """Take a group away again, with the state of its parameters; those of later groups move up by one.

        Raises:
            IndexError: there is no such group.
        """
        for p in self.param_groups.pop(index)["params"]:
            self.state.pop(p, None)
            del self.sites[p]
        del self._fixed[index]
        self._forget_kinds()
        self._group_index = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        self._held.clear()
        self._limit = None

    def _group_of(self, p: Tensor) -> dict[str, Any]:
        return self.param_groups[self._group_index[p]]

    def limit(self) -> int | None:
        """The bytes that the budget allows the state of the projected parameters that are here; None without one."""
        if self._limit is None and self.budget is not None:
            self._limit = limit_bytes(self.budget, [p for p, site in self.sites.items() if site.projected])
        return self._limit

    def _within_budget(
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
            group, state = group_of(p), self.state.get(p, {})
            if site.projected:
                claims[p] = budgets.Claim(slots.current(site, group, state), group, state)
        return dict(sites) | self._fitted(claims, anew=True)

    def _fitted(self, claims: Mapping[Tensor, budgets.Claim], anew: bool) -> dict[Tensor, Site]:
        """What fits the budget of those that have no state; of the others the ranks in their state are lowered."""
        assert self.budget is not None
        limit = limit_bytes(self.budget, claims)
        share = f"{limit}, {self.budget:.4g} of AdamW's state" if isinstance(self.budget, float) else str(limit)
        fitted = assignments.fit([*claims.values()], limit, anew, share)
        self._held.clear()
        self._limit = None
        for site, claim in zip(fitted, claims.values(), strict=True):
            if slots.RANKS in claim.state:
                slots.set_ranks(claim.state, site.ranks)
        return {p: site for (p, claim), site in zip(claims.items(), fitted, strict=True) if not claim.state}

    def _place(self, params: list[Tensor], sites: list[Site], index: int) -> None:
        """Register the sites, with phases that spread the work of refreshes evenly."""
        for key, value in checkpoint.unheard(self.param_groups[index]).items():
            self.param_groups[index].setdefault(key, value)
        every = self.param_groups[index]["refresh_every"]
        self._fixed.append({key: self.param_groups[index][key] for key in slots.FIXED})
        load: dict[int, float] = {}
        for p, site in self.sites.items():
            if site.projected and self.param_groups[self._group_index[p]]["refresh_every"] == every:
                load[site.phase] = load.get(site.phase, 0.0) + p.numel()
        cut = pieces(sites, self.param_groups[index], index)
        moving = [piece for piece in cut if sites[piece[0]].projected]
        phases = stagger((float(sum(params[i].numel() for i in piece)) for piece in moving), every, load)
        phase_of = {i: phase for piece, phase in zip(moving, phases, strict=True) for i in piece}
        for i, (p, site) in enumerate(zip(params, sites, strict=True)):
            self.sites[p] = replace(site, phase=phase_of.get(i, 0))
            self._group_index[p] = index
        self._forget_kinds()

    def _check_structure(self) -> None:
        """Refuse edits of what was decided at construction; rates, decay rates and the refresh period may change.

        Raises:
            ValueError, TypeError: such an edit, one to a value outside its interval, or parameters of another dtype.
        """
        for p, site in self.sites.items():
            if not _kept(p, site):
                self._check_kept(p)
        changed = [site.name for p, site in self.sites.items() if site.coded != (codes_of(p) is not None)]
        if changed:
            raise ValueError(
                f"{', '.join(changed)}: quantized or dequantized since this optimizer was built, or without the model "
                f"that held the codes: call comoving.weights.quantize(model) first, then build the optimizer"
            )
        for index, (group, fixed) in enumerate(zip(self.param_groups, self._fixed, strict=True)):
            scheduled = [group[key] for key in _SCHEDULED]
            if self._scheduled.get(index) != scheduled:
                check_options(group)
                self._scheduled[index] = scheduled
                self._forget_kinds()
            edited = [key for key, value in fixed.items() if group[key] != value]
            if edited:
                raise ValueError(
                    f"{', '.join(edited)} cannot be edited in a parameter group: what is projected, and what its state "
                    f"holds, is decided at construction. Build a new optimizer and load this one's state_dict()"
                )

    def _check_kept(self, p: Tensor) -> None:
        """Raise unless a parameter is here, with the dtype and shape that its state was made for."""
        site = self.sites.get(p)
        if site is None:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is none of this optimizer's")
        if _kept(p, site):
            return
        now, then = ((p.dtype, tuple(p.shape)), (site.view.stored_dtype, site.view.stored_shape))
        raise ValueError(
            f"{site.name} is {now[0]} of shape {now[1]}, and was {then[0]} of shape {then[1]} when this optimizer was "
            f"built: call model.to(dtype), .double(), .half() and the like before building the optimizer, or build a "
            f"new one and load this one's state_dict()"
        )

    # ----------------------------------------------------------------------------------------------------------- state

    def _open(self, p: Tensor) -> tuple[Site, Mapping[str, Any], dict[str, Any]]:
        """A parameter's site, group and state, with the slots that exist before the first frame."""
        site, group, state = self.sites[p], self.param_groups[self._group_index[p]], self.state[p]
        if "step" not in state:
            state.update(slots.opened(site, group, p, self._scalar_device(p, site, group), self.seed))
        return slots.current(site, group, state), slots.parts_of(site, group), state

    def _kind(self, p: Tensor, block: str | None = None) -> Kind | None:
        """The kind of a parameter, or of one of its blocks; None where it is stepped alone."""
        key = (p, block)
        if key not in self._kinds:
            site, number = self.sites[p], self._group_index[p]
            group = slots.parts_of(site, self.param_groups[number])
            if block is not None:
                site, group = self._block_site(p, int(block)), slots.group_of_block(group)
            kind = kind_of(site, group, number)
            self._kinds[key] = None if kind is None else self._alike.setdefault(kind, kind)
        kind = self._kinds[key]
        return kind if kind is not None and kind.entries <= self.stacked_entries else None

    def stacks(self, alike: Sequence[Tensor]) -> int:
        """How many of some parameters, alike but for their phases, are stepped together at most; 1 where none are."""
        kinds = [self._kind(p) for p in alike]
        return max((min(kind.most, count) for kind, count in Counter(kinds).items() if kind is not None), default=1)

    def _forget_kinds(self) -> None:
        """What was decided about parameters has changed, or what their kinds follow from."""
        self._kinds.clear()
        self._alike.clear()
        self._block_sites.clear()
        self._batches = Batches()

    def _block_site(self, p: Tensor, block: int) -> Site:
        if (p, block) not in self._block_sites:
            self._block_sites[p, block] = self.sites[p].block(block)
        return self._block_sites[p, block]

    def _units(self, p: Tensor, blocks: Iterable[int]) -> list[Unit]:
        """Blocks of a parameter, opened where they were not."""
        site, group, state = self._open(p)
        inner, units = slots.group_of_block(group), list[Unit]()
        for block in blocks:
            own, site = state.setdefault(str(block), {}), self._block_site(p, block)
            if not own:
                own.update(slots.opened(site, inner, p, self._scalar_device(p, site, inner), self.seed))
            units.append(Unit(site, inner, own))
        return units

    def _opened(self, p: Tensor) -> list[Unit]:
        """The parameter, or those of its blocks that have a state."""
        site, group, state = self.sites[p], self.param_groups[self._group_index[p]], self.state.get(p, {})
        if site.blocks:
            return self._units(p, map(int, state))
        own = slots.parts_of(site, group)
        return [Unit(slots.current(site, group, state), own, state)] if "step" in state else []

    def _holds_core(self, p: Tensor) -> bool:
        """Whether a parameter has absorbed a gradient that was not applied."""
        state = self.state.get(p, {})
        return any("core" in own for own in state.values()) if self.sites[p].blocks else "core" in state

    def _saved(self, p: Tensor) -> dict[str, Any] | None:
        """A parameter's state as it is, to be put back: steps replace its tensors, and change none."""
        state = self.state.get(p)
        if state is None:
            return None
        return {name: dict(x) for name, x in state.items()} if self.sites[p].blocks else dict(state)

    def _put_back(self, p: Tensor, saved: dict[str, Any] | None, but: Collection[str] = ()) -> None:
        """Put a saved state in place of what a step that failed has made of it, but for some blocks."""
        kept = {name: x for name, x in self.state.get(p, {}).items() if name in but}
        if saved is None and not kept:
            self.state.pop(p, None)
        else:
            slots.commit(self.state[p], (saved or {}) | kept)
        self._held.pop(p, None)
        self._releases.clear()

    def _with_gradient(self, p: Tensor, seen: Tensor, but: Collection[str] = ()) -> list[tuple[str, Unit, Tensor]]:
        """The blocks that a gradient is not zero in, with their numbers and parts of it, but for some of them."""
        site, group, _ = self._open(p)
        assert site.block_mode is not None
        blocks = group["frame"].split(seen)
        live = seen.movedim(site.block_mode, 0).flatten(1).any(1).tolist()
        numbers = [b for b in range(len(blocks)) if live[b] and str(b) not in but]
        return [(str(b), unit, blocks[b]) for b, unit in zip(numbers, self._units(p, numbers), strict=True)]

    def _with_core(self, p: Tensor, weights: Tensor) -> list[tuple[str | None, Unit, Tensor]]:
        """What has absorbed a gradient, and its weights; blocks with their number."""
        site, group, state = self._open(p)
        if not site.blocks:
            return [(None, Unit(site, group, state), weights)]
        blocks = group["frame"].split(weights)
        numbers = [int(b) for b, own in state.items() if "core" in own]
        return [(str(b), unit, blocks[b]) for b, unit in zip(numbers, self._units(p, numbers), strict=True)]

    def _count_skipped(self, bad: Tensor | None = None) -> None:
        """Count a step that was skipped; by a flag on the device where one is given."""
        new = torch.ones((), dtype=torch.int64) if bad is None else bad.long()
        self._skipped = new if self._skipped is None else self._skipped + new.to(self._skipped.device)

    def _undone_if(self, bad: Tensor | None, params: list[Tensor]) -> AbstractContextManager[None]:
        if bad is None:
            return nullcontext()
        units = [(p, unit) for p in params for unit in self._opened(p)]
        states = [(unit.state, {} if asks_host(bad) else slots.awaited(*unit[:3], p.device)) for p, unit in units]
        return gradients.Undo(bad, [x for p in params for x in _numbers(p)], states)

    def _claims(self) -> dict[Tensor, budgets.Claim]:
        """What the budget is shared by: every projected parameter."""
        return {p: self._claim(p) for p, site in self.sites.items() if site.projected}

    def _claim(self, p: Tensor) -> budgets.Claim:
        group, state = self.param_groups[self._group_index[p]], self.state.get(p, {})
        return budgets.Claim(slots.current(self.sites[p], group, state), group, state)

    def _held_by(self, params: list[Tensor]) -> int:
        """The bytes of projected parameters; remembered, since each of them refreshes."""
        self._held |= {q: self._claim(q).held() for q in params if q not in self._held}
        return sum(self._held[q] for q in params)

    @staticmethod
    def _record(group: Mapping[str, Any]) -> Record:
        return Record(*group.get(slots.VALIDATION, ()))

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain data, parts as names and fields: loads with ``weights_only=True``."""
        packed = super().state_dict()
        packed["state"] = {key: slots.flat(state) for key, state in packed["state"].items()}
        packed["param_groups"] = [checkpoint.describe_group(group) for group in packed["param_groups"]]
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, of this recipe at any rank, or of torch's AdamW. Dtypes stay as saved.

        Learning rate, decay rates and the like are taken from the checkpoint; what makes the recipe must agree. Moments
        of other ranks, and AdamW's, are carried into this optimizer's frames at the next step.

        Raises:
            ValueError: a checkpoint of another recipe, other groups or other shapes, or no optimizer's; nothing has
                changed then.
        """
        given: Any = state_dict
        if not isinstance(given, Mapping) or not {"state", "param_groups"} <= given.keys():
            found = ", ".join(map(str, [*given][:5])) if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(f"an optimizer's state_dict() has 'state' and 'param_groups', got {found or 'nothing'}")
        saved = state_dict["param_groups"]
        keys = checkpoint.match_parameters(saved, self.param_groups)
        groups = checkpoint.load_groups(saved, self.param_groups, keys)
        admitted = {
            p: checkpoint.admit(state_dict["state"][key], self.sites[p], groups[self._group_index[p]], self.seed)
            for p, key in keys.items()
            if key in state_dict["state"]
        }
        self._fit_loaded(admitted, groups)
        packed = super().state_dict()["param_groups"]
        packed = [group | {"params": ids["params"]} for group, ids in zip(groups, packed, strict=True)]
        # Torch's own loading serves the groups and hooks; it would cast the state to the parameters' dtypes.
        super().load_state_dict({"state": {}, "param_groups": packed})
        for p, state in admitted.items():
            own = {name: self._owned(name, value, p) for name, value in slots.flat(state).items()}
            if self.sites[p].blocks:
                own = {b: {n: own[f"{b}.{n}"] for n in block} for b, block in state.items()}
            self.state[p] = own
        self._held.clear()
        self._forget_kinds()

    def _fit_loaded(self, admitted: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Lower the ranks that loaded parameters ask for where they exceed the budget; frames follow at the next step.

        Raises:
            ValueError: even the lowest ranks need more.
        """
        if self.budget is None:
            return
        claims: dict[Tensor, budgets.Claim] = {}
        for p, site in self.sites.items():
            group, state = groups[self._group_index[p]], admitted.get(p, {})
            if site.projected:
                if slots.RANKS in state:
                    state[slots.RANKS] = state[slots.RANKS].clone()
                claims[p] = budgets.Claim(slots.current(site, group, state), group, state)
        self.sites |= self._fitted(claims, anew=False)
        self._forget_kinds()

    def _owned(self, name: str, value: Any, p: Tensor) -> Any:
        """A copy on the right device, in the dtype it was saved in."""
        if not isinstance(value, Tensor):
            return deepcopy(value)
        site, group = self.sites[p], self.param_groups[self._group_index[p]]
        if name in (slots.RANKS, slots.VALUE):
            return value.detach().clone().cpu()
        part = slots.layout(site, group).get(name, Part(tuple(value.shape), value.dtype))
        return value.detach().clone().to(slots.place(part, p.device, self._scalar_device(p, site, group)))

    def _scalar_device(self, p: Tensor, site: Site, group: dict[str, Any]) -> torch.device:
        """The host, where torch's AdamW keeps its step count too, unless the device alone decides."""
        on_host = self.on_nonfinite == "raise" and not (site.plain and group["fused"])
        return torch.device("cpu") if on_host else p.device

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a deep copy takes along."""
        own = ("on_nonfinite", "seed", "budget", "stacked_entries", "sites", "_group_index", "_fixed", "_skipped")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a deep copy, or take over loaded groups."""
        if "sites" in state:
            self._begin()
        super().__setstate__(state)
