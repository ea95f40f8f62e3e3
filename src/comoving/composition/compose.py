"""Choices for all parameters of a model, within a budget, as parameter groups."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from torch import Tensor, nn

from .. import state as slots
from ..allocation import Short, allocate, frontier
from ..frames import Blocks
from ..groups import decide, named, params_of
from ..ranks.limit import adamw_bytes
from ..roles import Role, role_of, roles_of
from ..sites import Site
from .choice import Choice
from .table import Row, Table


@dataclass(frozen=True)
class Option:
    """A choice for one parameter: what it takes of state there, single numbers apart, and its share of the loss."""

    choice: Choice
    bytes: int
    loss: float


@dataclass(frozen=True)
class Member:
    """A parameter that is to be served.

    Args:
        name: None where it has none.
        p: the parameter.
        role: of it.
        group: the options that the user gave it, without its parameters.
    """

    name: str | None
    p: Tensor
    role: Role
    group: Mapping[str, Any]


def members_of(params: nn.Module | Iterable[Any]) -> list[Member]:
    """The parameters that need a gradient, of a model, of pairs or parameters, or of groups of them, with their roles.

    Raises:
        ValueError: there are none.
        TypeError: something else.
    """
    if isinstance(params, nn.Module):
        roles, own = roles_of(params), dict[str, Any]()  # one group's: what shares it can be stepped together
        found = [Member(name, p, roles[name].role, own) for name, p in params.named_parameters() if p.requires_grad]
    else:
        given: list[Any] = [params] if isinstance(params, Tensor) else [*params_of(params)]
        groups: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]
        found = list[Member]()
        for group in groups:
            own = {key: value for key, value in group.items() if key != "params"}
            said: Mapping[str, Role] = own.pop("roles", None) or {}
            found += [
                Member(name, p, said.get(name or "") or role_of(name, p).role, own)
                for name, p in named(group["params"])
            ]
    if not found:
        raise ValueError("no parameters were given: a generator of them can be used only once")
    return found


@dataclass(frozen=True)
class Composer:
    """Makes parameter groups.

    Args:
        table: what there is to choose from.
        budget: bytes, a share of AdamW's state, or None; see :func:`comoving.ranks.limit.parse_budget`.
        defaults: every hyper-parameter there is, with the values that the user wants.
        factors: the user's factors of the learning rate by role.
        undecayed: the roles whose parameters do not decay.
    """

    table: Table
    budget: int | float | None
    defaults: Mapping[str, Any]
    factors: Mapping[Role, float]
    undecayed: tuple[Role, ...]

    def limit(self, params: Sequence[Tensor]) -> int | None:
        """The bytes that the state of these parameters may have; a share of AdamW's, step counts apart, rounded down.

        None for no limit.
        """
        if self.budget is None or isinstance(self.budget, int):
            return self.budget
        return floor(self.budget * (adamw_bytes(params) - 4 * len(params)))

    def groups(self, members: Sequence[Member], used: int = 0, others: Sequence[Tensor] = ()) -> list[dict[str, Any]]:
        """Groups for :class:`comoving.LowRankOptimizer`.

        Args:
            members: the parameters.
            used: bytes that others have of the budget.
            others: these others.

        Raises:
            ValueError: the budget is below what the cheapest choices need; with the parameter that needs most of it.
        """
        rows: dict[Role, Row] = {}
        for m in members:
            if m.role not in rows:
                rows[m.role] = self.table.row(m.role)
        entries = {role: sum(m.p.numel() for m in members if m.role == role) for role in rows}
        sizes: dict[Any, list[int | None]] = {}
        frontiers = [_options(m, rows[m.role], entries[m.role], self.defaults, sizes) for m in members]
        limit = self.limit([*others, *(m.p for m in members)])
        try:
            chosen = _chosen(frontiers, None if limit is None else limit - used)
        except Short as short:
            cheapest = [min(options, key=lambda o: o.bytes) for options in frontiers]
            i = max(range(len(members)), key=lambda i: cheapest[i].bytes)
            least = short.least + used
            raise ValueError(
                f"budget must be at least {least} bytes, what the least state needs, {least - (limit or 0)} more than "
                f"it allows, got {limit}: {_called(members[i], i)} alone needs {cheapest[i].bytes} as "
                f"{cheapest[i].choice.name}"
            ) from None
        groups: dict[Any, dict[str, Any]] = {}
        for member, option in zip(members, chosen, strict=True):
            own = _group(option.choice, member)
            own["rate"] *= self.factors.get(member.role, 1.0)
            if member.role in self.undecayed:
                own["weight_decay"] = 0.0
            own |= member.group
            key = (option.choice.name, member.role, own["rate"], id(member.group))
            group = groups.setdefault(key, {"params": [], "roles": {}, "reasons": {}, **own})
            group["params"].append(member.p if member.name is None else (member.name, member.p))
            if member.name is not None:
                group["roles"][member.name] = member.role
                group["reasons"][member.name] = _why(option.choice, rows[member.role], member.role)
        return [*groups.values()]


def _chosen(frontiers: Sequence[Sequence[Option]], limit: int | None) -> list[Option]:
    if limit is None:
        return [min(options, key=lambda o: (o.loss, o.bytes)) for options in frontiers]
    return allocate(frontiers, limit)


def _options(
    member: Member, row: Row, entries: int, defaults: Mapping[str, Any], sizes: dict[Any, list[int | None]]
) -> list[Option]:
    """The choices worth having for one parameter; alike ones are laid out once."""
    p = member.p
    key = (tuple(p.shape), p.dtype, member.role, id(member.group))
    if key not in sizes:
        sizes[key] = [_bytes(p, {**defaults, **_group(choice, member), **member.group}) for choice in row.choices]
    share = p.numel() / max(1, entries)
    options = [
        Option(choice, size, choice.loss * share)
        for choice, size in zip(row.choices, sizes[key], strict=True)
        if size is not None
    ]
    if not options:
        raise ValueError(
            f"{member.name or 'a parameter'} of shape {tuple(p.shape)} and {p.dtype} has no room in its weights for "
            f"moments, and the table has no other choice for role {member.role}"
        )
    return frontier(options)


def _group(choice: Choice, member: Member) -> dict[str, Any]:
    """A choice's options for a parameter; stacked experts are matrices of their own."""
    blocks = {"frame": Blocks()} if member.role == "experts" else {}
    return choice.group(tuple(member.p.shape)) | blocks


def _bytes(p: Tensor, group: Mapping[str, Any]) -> int | None:
    """What a parameter's state takes; None where moments are to be kept in weights that have no room for them."""
    try:
        (site,) = decide([(None, p)], group, 0, {})
    except ValueError:
        if slots.in_weights(group):
            return None
        raise
    return counted_bytes(site, group)


def counted_bytes(site: Site, group: Mapping[str, Any]) -> int:
    """State of one parameter that counts against the budget: all but its counts and seeds."""
    specs = slots.layout(site, group).values()
    return sum(slots.spec_bytes(spec) for spec in specs if not spec.scalar and not spec.seed)


def _why(choice: Choice, row: Row, role: Role) -> str:
    return choice.name if row.measured == role else f"{choice.name} (measured on role {row.measured})"


def _called(member: Member, place: int) -> str:
    return member.name if member.name is not None else f"parameter {place}"
