"""Which parameters of a model are projected, seen as what, and which stay dense."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .frames import Blocks
from .frames.base import Rank
from .groups import named
from .roles import Found, Places, Role, check_rates, places_of, role_of, roles_of
from .validate import shown
from .views import Heads

Selector = str | type[nn.Module]
"""A glob pattern for parameter names ("*.attn.*"), or a module type."""


def param_groups(
    model: nn.Module,
    rank: Rank = 0.25,
    *,
    dense: Selector | Iterable[Selector] = (),
    project: Selector | Iterable[Selector] = (),
    pairs: Selector | Iterable[Selector] = (),
    experts: Selector | Iterable[Selector] = (),
    heads: Mapping[Selector, Heads | int] | None = None,
    rates: Mapping[str, float] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into projected and dense groups.

    Embeddings (by module type, or name), output heads (what ``get_output_embeddings()`` returns, or by name; never
    merely the last layer), norms, biases and everything else with fewer than two modes stay dense; so do, when the
    optimizer is built, tensors that projection would not make smaller, or that have less than 1/128 of the largest
    one's entries. A weight that is tied to an embedding or head is
    one. Frozen parameters are left out.

    Args:
        model: the model.
        rank: of the projected group.
        dense: glob patterns or module types, or a single one, that stay dense in any case.
        project: glob patterns or module types that are projected in any case; wins over ``dense``.
        pairs: glob patterns or module types of projected parameters that store complex numbers as real pairs in a last
            mode of 2; they get a group of their own with ``view="pairs"``.
        experts: glob patterns or module types of projected parameters that stack the weights of experts along their
            first mode: each expert has a frame of its own (:class:`comoving.frames.Blocks`).
        heads: pattern or module type -> :class:`comoving.views.Heads`, or the rows of a head: attention weights whose
            heads have frames of their own.
        rates: role -> factor of the learning rate of its parameters; see :mod:`comoving.roles`. Each role that is given
            gets groups of its own.
        **options: more hyper-parameters for the projected groups.

    Returns:
        Groups for :class:`comoving.LowRankOptimizer`, with parameter names and the reasons for dense ones; none of them
        empty.

    Raises:
        ValueError: a pattern that matches no parameter, a parameter that is to be seen in two ways, a model without
            trainable parameters, or a rate for a role that is unknown or that no parameter has.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        raise TypeError(f"param_groups() takes a module, got {shown(given)}")
    pairs_here = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not pairs_here:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    places, roles = places_of(model), roles_of(model)
    special: list[tuple[list[str], dict[str, Any]]] = [(_chosen(model, places, _listed(pairs)), {"view": "pairs"})]
    special.append((_chosen(model, places, _listed(experts)), {"frame": Blocks()}))
    for selector, head in (heads or {}).items():
        seen = Heads(head) if isinstance(head, int) else head
        blocks = Blocks(0 if seen.side == "rows" else 1)
        special.append((_chosen(model, places, (selector,)), {"view": seen, "frame": blocks}))
    placed = [name for names, _ in special for name in names]
    if len(set(placed)) < len(placed):
        twice = sorted({name for name in placed if placed.count(name) > 1})
        raise ValueError(f"{', '.join(twice)} can be seen in one way only: pairs, experts and heads overlap")
    reasons = _split(model, places, roles, _listed(dense), (*_listed(project), *placed))
    plain = [pair for pair in pairs_here if pair[0] not in reasons and pair[0] not in placed]
    projecting = {"rank": rank, "select": "shape", **options}
    groups: list[dict[str, Any]] = [
        {"params": plain, **projecting},
        *({"params": [pair for pair in pairs_here if pair[0] in names], **projecting, **own} for names, own in special),
        {"params": [pair for pair in pairs_here if pair[0] in reasons], "rank": 1.0, "reasons": reasons},
    ]
    factors = check_rates(rates, {found.role: None for found in roles.values()})
    return split_by_role(groups, {role: {"rate": factor} for role, factor in factors.items()}, roles)


def split_by_role(
    groups: Iterable[Mapping[str, Any]],
    own: Mapping[Role, Mapping[str, Any]],
    roles: Mapping[str, Found] | None = None,
) -> list[dict[str, Any]]:
    """Groups cut so that every role has options of its own; none of them empty.

    Args:
        groups: of parameters or (name, parameter) pairs.
        own: role -> options over those of the group; roles without any stay together.
        roles: of every name, where a model could be asked; else names and shapes say them.
    """
    known, cut = roles or {}, list[dict[str, Any]]()
    for group in groups:
        by_options: dict[Role | None, list[Any]] = {}
        named_roles: dict[str, Role] = dict(group.get("roles") or {})
        members = [group["params"]] if isinstance(group["params"], Tensor) else [*group["params"]]
        for given, (name, p) in zip(members, named(members), strict=True):
            role = role_of(name, p).role
            if name is not None:
                role = named_roles[name] = known[name].role if name in known else named_roles.get(name, role)
            by_options.setdefault(role if role in own else None, []).append(given)
        for role, chosen in by_options.items():
            names = [member[0] for member in chosen if isinstance(member, tuple)]
            mine = {name: named_roles[name] for name in names}
            cut.append({**group, "params": chosen, "roles": mine, **({} if role is None else own[role])})
    return cut


def _listed(selectors: Selector | Iterable[Selector]) -> tuple[Selector, ...]:
    """Selectors, or a single one."""
    return (selectors,) if isinstance(selectors, str | type) else tuple(selectors)


def _chosen(model: nn.Module, places: Places, selectors: tuple[Selector, ...]) -> list[str]:
    """Names of the parameters that any selector matches.

    Raises:
        ValueError: a selector that matches none.
    """
    unused = [s for s in selectors if not any(_matches(s, place) for own in places.values() for place in own)]
    if unused:
        raise ValueError(f"no parameter of {type(model).__name__} matches {', '.join(map(repr, unused))}")
    return [name for name, own in places.items() if any(_matches(s, place) for s in selectors for place in own)]


def _split(
    model: nn.Module,
    places: Places,
    roles: Mapping[str, Found],
    dense: tuple[Selector, ...],
    project: tuple[Selector, ...],
) -> dict[str, str]:
    """Name -> reason of each parameter that stays dense."""
    kept, projected = _chosen(model, places, dense), _chosen(model, places, project)
    reasons: dict[str, str] = {}
    for name, found in roles.items():
        why = None if name in projected else "chosen to stay dense" if name in kept else found.why_dense
        if why is not None:
            reasons[name] = why
    return reasons


def _matches(selector: Selector, place: tuple[str, nn.Module]) -> bool:
    name, module = place
    return fnmatchcase(name, selector) if isinstance(selector, str) else isinstance(module, selector)
