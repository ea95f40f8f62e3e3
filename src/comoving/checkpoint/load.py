"""What an optimizer takes over from a checkpoint: of which parameter each state is, and what of the groups holds on."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, cast

from torch import Tensor

from ..groups import check_options
from ..ranks.base import Record
from ..state import VALIDATION
from .describe import describe

# What makes a recipe. Ranks are not among them: a change of rank is one more change of frame.
_STRUCTURE = (
    "view", "side", "frame", "finder", "cadence", "precondition", "transport", "rule", "residual", "codec", "moments",
    "bases", "amsgrad", "rounding",
)  # fmt: skip
# Neither hyper-parameters of ours nor a scheduler's marks: what torch's AdamW writes beside its own.
_FOREIGN = {"capturable", "differentiable", "decoupled_weight_decay", "name"}
_OURS = {*_STRUCTURE, "rank", "ranks", "select", "reasons", "roles", "diagnostics", "param_names", "params"}


def check_form(state_dict: object) -> None:
    """Raise unless something has the form of an optimizer's ``state_dict()``.

    Raises:
        ValueError: saying what it has instead.
    """
    given: Any = state_dict
    if not isinstance(given, Mapping) or not {"state", "param_groups"} <= given.keys():
        found = ", ".join(map(str, [*given][:5])) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"an optimizer's state_dict() has 'state' and 'param_groups', got {found or 'nothing'}")


def match_parameters(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> dict[Tensor, Any]:
    """Parameter -> key of its saved state: by name where both sides have names, by place otherwise.

    Raises:
        ValueError: other names, or other group sizes.
    """
    keys = [key for group in saved for key in group["params"]]
    params = [p for group in groups for p in group["params"]]
    if all("param_names" in group for group in (*saved, *groups)):
        by_name = dict(zip((n for g in saved for n in g["param_names"]), keys, strict=True))
        names = [n for g in groups for n in g["param_names"]]
        if set(names) != set(by_name):
            raise ValueError(
                f"the checkpoint holds other parameters: missing {sorted(set(names) - set(by_name))}, unexpected "
                f"{sorted(set(by_name) - set(names))}"
            )
        return {p: by_name[name] for name, p in zip(names, params, strict=True)}
    sizes, here = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if sizes != here:
        raise ValueError(
            f"the checkpoint has groups of {sizes} parameters, this optimizer {here}: without names they can only be "
            f"matched by place. Save from, and load into, optimizers that were given named_parameters()"
        )
    return dict(zip(params, keys, strict=True))


def load_groups(
    saved: list[dict[str, Any]], groups: list[dict[str, Any]], keys: Mapping[Tensor, Any]
) -> list[dict[str, Any]]:
    """The groups with what they take over from the saved groups that hold their parameters.

    Where these disagree on a value (weight decay, say, if parameters were grouped otherwise), a group keeps its own.

    Args:
        saved: groups of the checkpoint.
        groups: groups of this optimizer.
        keys: parameter -> key of its saved state.

    Raises:
        ValueError: another recipe, or a saved value outside its interval.
    """
    holder = {key: group for group in saved for key in group["params"]}
    loaded: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        sources = list({id(g): g for g in (holder[keys[p]] for p in group["params"])}.values())
        for source in sources:
            check_recipe(source, group, index)
        schedules = [schedule_of(source) for source in sources]
        agreed = {k: v for k, v in schedules[0].items() if all(k in s and s[k] == v for s in schedules)}
        loaded.append({k: v for k, v in group.items() if k != VALIDATION} | unheard(group) | agreed)
        check_options(loaded[-1])
    return loaded


def schedule_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a loaded group takes over: the rate, decay rates and schedulers' marks, not what makes the recipe."""
    return {key: value for key, value in saved.items() if key not in _OURS | _FOREIGN}


def check_recipe(saved: Mapping[str, Any], group: Mapping[str, Any], index: int) -> None:
    """Raise unless a saved group was made by the same recipe; a group of torch's AdamW has none of the keys and passes.

    Raises:
        ValueError: naming each hyper-parameter that differs, with both values.
    """
    if saved.get("decoupled_weight_decay") is False and saved.get("weight_decay", 0) > 0:
        raise ValueError(
            f"the checkpoint's group {index} comes from torch.optim.Adam with weight_decay={saved['weight_decay']}, "
            f"which it adds to the gradient, so that the saved moments hold it; here weights decay by themselves. In "
            f"its param_groups set weight_decay to 0 to load it without decay, or decoupled_weight_decay to True to go "
            f"on with AdamW's"
        )
    differing = [
        f"{key}: saved {saved[key]!r}, here {describe(group[key])!r}"
        for key in _STRUCTURE
        if key in saved and _listed(_completed(saved[key], group[key])) != _listed(describe(group[key]))
    ]
    if differing:
        raise ValueError(
            f"the checkpoint's group {index} comes from another recipe; build the optimizer with the recipe it was "
            f"saved from, or start with fresh state. " + "; ".join(differing)
        )


def _completed(saved: Any, here: Any) -> Any:
    """A saved part with the fields that it has got since then, at their defaults: it did what these do."""
    known: dict[str, Any] = {**cast("Mapping[str, Any]", saved)} if isinstance(saved, Mapping) else {}
    if not is_dataclass(here) or known.get("part") != type(here).__name__:
        return saved
    return {f.name: describe(f.default) for f in fields(here) if f.default is not MISSING} | known


def _listed(described: Any) -> Any:
    """With lists for tuples, which torch's flattened checkpoints do not tell apart."""
    if isinstance(described, Mapping):
        return {key: _listed(value) for key, value in cast("Mapping[str, Any]", described).items()}
    if isinstance(described, list | tuple):
        return [_listed(value) for value in cast("Sequence[Any]", described)]
    return described


def unheard(group: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a group whose ranks adapt, before any validation loss.

    It is always there, since torch's flattened checkpoints restore keys that exist already, and no others.
    """
    return {VALIDATION: tuple(Record())} if group["ranks"].adaptive else {}
