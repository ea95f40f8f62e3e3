"""An optimizer by the name of its method."""

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from .adamw import AdamW
from .codecs import Full
from .default import ARGUMENTS, Optimizer
from .frames import Modes
from .frames.base import Rank
from .grouping import param_groups, split_by_role
from .groups import params_of
from .methods import DEFAULT, RECIPES, Recipe
from .optimizer import LowRankOptimizer
from .parts import part
from .precondition import Plain
from .residual import Discard, Feedback
from .roles import PROJECTABLE, TABLES, Role, known_role
from .rules import Adam
from .validate import check_known, nearest, plain

_PROJECTING = {"finder", "cadence", "transport", "residual", "codec", "bases", "ranks", "budget", "scale", "+ef"}
"""What concerns projected parameters alone."""
_CHOICE = ("dense", "project", "pairs", "experts", "heads", "rates")
"""What goes to :func:`comoving.param_groups`."""
WHOLE: dict[str, Any] = {"rank": 1.0, "select": "all", "view": "tensor", "frame": Modes()}
"""The options of what is stepped in the whole frame, whatever its shape."""
_SUFFIXES: dict[str, dict[str, Any]] = {"+ef": {"residual": Feedback()}}


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    return {recipe.name: recipe for recipe in RECIPES}


def build(
    recipe: str, model: nn.Module | Iterable[Any], lr: float = 1e-3, rank: Rank | None = None, **options: Any
) -> LowRankOptimizer:
    """An optimizer for a model, by the name of its method.

    A recipe acts on the optimizer alone. "q-galore" trains 8-bit weights in its paper: that is a choice at the model,
    ``comoving.weights.quantize(model)`` before ``build("q-galore", model)``, and the optimizer then writes codes,
    rounded stochastically. Likewise ``quantize(model, Int4(), compensate=5)`` before ``build("loqt", model)``. Without
    these calls the weights stay as they are.

    Args:
        recipe: a name of :func:`recipes`, optionally with the suffix "+ef" for error feedback, where what lies outside
            the frame has no other use.
        model: the model; :func:`comoving.param_groups` chooses what is projected. Or parameters, (name, parameter)
            pairs or groups of either, as for :class:`comoving.LowRankOptimizer`: then names and shapes choose.
        lr: learning rate.
        rank: of the projected parameters; None for the recipe's own, 0.25 for most; ignored by full-rank recipes.
        **options: more hyper-parameters, over the recipe's own; ``dense``, ``project``, ``pairs``,
            ``experts``, ``heads`` and ``rates`` go to :func:`comoving.param_groups`. Parts may be given by name:
            ``transport="rotate"``. ``dense_moments`` is a codec of the moments of the embeddings and heads that the
            recipe leaves to AdamW: "int8" or "int4" make an 8-bit or 4-bit AdamW of it (of vectors, norms and biases,
            codes would save nothing). With "adamw" itself ``moments`` is of these too.
            The default, "comoving", takes those of :class:`comoving.Optimizer` alone, and no rank.
            ``per_role``, role (:mod:`comoving.roles`) -> hyper-parameters of its parameters, over all others.

    Raises:
        ValueError: an unknown recipe or suffix, a suffix that would replace what makes the recipe, or a value outside
            its interval.
        TypeError: an unknown hyper-parameter, or arguments in another order.
    """
    first: Any = recipe
    if not isinstance(first, str):
        swapped = f": pass build({model!r}, model)" if isinstance(model, str) else ""
        raise TypeError(f"the recipe comes first, as the name of a method, got {type(first).__name__}{swapped}")
    name, plus, suffix = recipe.partition("+")
    known = recipes()
    if name not in known or (plus and plus + suffix not in _SUFFIXES):
        near = nearest(name.lower(), known) if name not in known else ""
        raise ValueError(
            f"unknown recipe {recipe!r}{near}; known are {', '.join(known)}, with suffixes {', '.join(_SUFFIXES)}"
        )
    if known[name] is DEFAULT:
        return _default(model, lr, plus + suffix, options)
    method = known[name]
    own = method.options.get("residual", Discard())
    if plus and not isinstance(own, Discard | Feedback):
        raise ValueError(
            f"{recipe!r} is refused: {name} is made by what it does outside the frame, residual {own}, and "
            f"{plus}{suffix} would put error feedback in its place; pass residual= if that is meant"
        )
    check_known(options, [*_options(), *_CHOICE, "dense_moments", "per_role", "lr", "rank"])
    choice = {key: options.pop(key) for key in _CHOICE if key in options}
    own_rank = plain(method.rank_for(rank))
    dense_moments = options.pop("dense_moments", options.get("moments") if name == "adamw" else None)
    groups = _groups(model, 1.0 if own_rank is None else own_rank, choice)
    groups = split_by_role(groups, _of_roles(method, part("moments", dense_moments), options.pop("per_role", None)))
    given = {role: part(role, value) for role, value in options.items()}
    if method.full_rank:
        idle = sorted({*given, *(["+ef"] if plus else [])} & _PROJECTING)
        if idle:
            raise ValueError(f"{recipe} has full rank: {', '.join(idle)} would have nothing to act on")
    settings = {**method.options, **_SUFFIXES.get(plus + suffix, {}), **given}
    kind = AdamW if name == "comoving-adamw" else LowRankOptimizer
    return kind(groups, lr, **settings)


def _default(model: Any, lr: float, suffix: str, options: dict[str, Any]) -> Optimizer:
    """:class:`comoving.Optimizer`, whose composition is not the user's.

    Raises:
        ValueError: a suffix.
        TypeError: hyper-parameters that it chooses itself.
    """
    if suffix:
        raise ValueError(f"'comoving{suffix}' is refused: the default optimizer chooses what it is made of")
    chosen = sorted(options.keys() & {*_options(), *_CHOICE, "dense_moments", "per_role"} - {*ARGUMENTS})
    if chosen:
        raise TypeError(
            f"'comoving' chooses {', '.join(chosen)} itself, within budget=: 'comoving-adamw' takes them, and so does "
            f"any other recipe"
        )
    return Optimizer(model, lr, **options)


def _of_roles(
    method: Recipe, dense_moments: Any, given: Mapping[str, Mapping[str, Any]] | None
) -> dict[Role, dict[str, Any]]:
    """Role -> options of its parameters over those of the recipe.

    Args:
        method: the recipe.
        dense_moments: a codec for the moments of those that get AdamW; None for torch's own.
        given: what the user wants of roles, over all else.

    Raises:
        ValueError: an unknown role.
        TypeError: an unknown hyper-parameter.
    """
    adamw: dict[str, Any] = {"rule": Adam(), "precondition": Plain(), "moments": Full()}
    own: dict[Role, dict[str, Any]] = {}
    if dense_moments is not None:
        own |= {role: WHOLE | adamw | {"moments": dense_moments} for role in TABLES}
    for role, options in method.roles.items():
        own[role] = {**WHOLE, **adamw, **options}
    for name, options in (given or {}).items():
        role = known_role(name, "per_role")
        check_known(options, [*_options(), "lr", "rank"])
        before = own.get(role, {} if role in PROJECTABLE else WHOLE | adamw)
        own[role] = before | {key: part(key, plain(value)) for key, value in options.items()}
    return own


def _options() -> list[str]:
    """The hyper-parameters that :func:`build` passes on."""
    return [name for name in signature(LowRankOptimizer).parameters if name not in {"params", "lr", "rank"}]


def _groups(model: nn.Module | Iterable[Any], rank: Rank, choice: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups with this rank, where they have none of their own.

    Raises:
        TypeError: parameters without the module that chooses among them.
        ValueError: no parameters.
    """
    if isinstance(model, nn.Module):
        return param_groups(model, rank=rank, **choice)
    if choice:
        raise TypeError(f"{', '.join(choice)} choose among a module's parameters: pass the model, not its parameters")
    given: list[Any] = [model] if isinstance(model, torch.Tensor) else [*params_of(model)]
    if not given:
        raise ValueError("no parameters were given: a generator of them can be used only once")
    groups: list[dict[str, Any]] = given if isinstance(given[0], dict) else [{"params": given}]
    return [{"rank": rank, **group} for group in groups]
