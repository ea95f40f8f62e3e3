"""What each parameter does in its model: the role that decides its rate, and the rule that serves it.

===========  ==========================================================================================================
hidden       a matrix between features: a linear layer's weight, an attention projection
experts      the stacked matrices of experts, one for each entry of the first mode
convolution  a kernel of a convolution
spectral     a weight of Fourier modes: complex with three modes or more, or the same as real pairs
table        a table of tokens, of which a batch reads some rows
head         what turns features into logits; a table that is also the head counts as a table
position     a table of positions, or a class, mask or register token: all of it is read by every example
norm         a gain or shift of a norm
bias         a bias of any other layer
scalar       a vector or number that is none of these: a temperature, a gate, a layer's scale
===========  ==========================================================================================================

Evidence, the first that speaks: the type of the module that holds the parameter, what ``get_output_embeddings()``
returns, names, and shape. Where neither module nor name says anything about a tall matrix and it has a gradient
already, the gradient does: if most of its rows are zero, it is a table.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from .validate import check_float, nearest

Role = Literal["hidden", "experts", "convolution", "spectral", "table", "head", "position", "norm", "bias", "scalar"]
ROLES: tuple[Role, ...] = get_args(Role)

WEIGHTS: tuple[Role, ...] = ("hidden", "experts", "convolution", "spectral")
"""The roles of weights between features."""
TABLES: tuple[Role, ...] = ("table", "head", "position")
"""The dense roles that have matrices."""
PROJECTABLE: tuple[Role, ...] = (*WEIGHTS, "scalar")
"""The roles that low-rank recipes project, if the shape allows it; all others stay dense."""

Places = dict[str, list[tuple[str, nn.Module]]]
"""Parameter name -> every full name and module that holds it; tied weights have several."""

_POSITION = re.compile(
    r"(^|\.)(wpe|pos_emb|[^.]*pos(ition)?(al)?_?(embed|encod|token)[^.]*|[^.]*(cls|class|mask|register|dist)_token[^.]*)(\.|$)"
)
_TABLE = re.compile(r"(^|\.)(wte|tok_emb|emb|[^.]*embed[^.]*)(\.|$)")
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|qa_outputs)(\.|$)|(^|\.)(heads?|classifier|score)\.(weight|bias)$|^(fc|output)\.(weight|bias)$"
)
_BIAS = re.compile(r"(^|\.)bias$")
_NORM = re.compile(r"(^|\.)([^.]*norm[^.]*|ln|ln_[^.]*|bn\d*)(\.|$)", re.IGNORECASE)
_EXPERTS = re.compile(r"(^|\.)[^.]*experts?(\.|_|$)")
_SPECTRAL = re.compile(r"spectral|fourier", re.IGNORECASE)
_NAMES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("norm", _NORM),
    ("bias", _BIAS),
    ("head", _HEAD),
    ("position", _POSITION),
    ("table", _TABLE),
)
_OF_VECTORS: tuple[Role, ...] = ("norm", "position", "bias")
_WORDS: dict[Role, str] = {"table": "embedding", "position": "embedding", "head": "output head"}


def places_of(model: nn.Module) -> Places:
    """Where a model holds each of its parameters."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append((f"{path}.{own}" if path else own, module))
    return {name: owners[id(p)] for name, p in model.named_parameters()}


class Found(NamedTuple):
    """A role, and what said so: "module", "model" (its own word on its head), "name", "shape" or "gradient".

    "patches" says so of a convolution that embeds patches, by its name: a role like others, but left dense.
    """

    role: Role
    by: str

    @property
    def why_dense(self) -> str | None:
        """Why low-rank recipes leave it dense, in words; None where they do not."""
        if self.by == "patches":
            return "embedding of patches"
        if self.role in PROJECTABLE:
            return None
        words = _WORDS.get(self.role, self.role)
        return f"{words}, by its {self.by}" if self.by in {"name", "gradient"} and self.role != "bias" else words


def role_of(name: str | None, p: Tensor, places: Sequence[tuple[str, nn.Module]] = (), is_head: bool = False) -> Found:
    """The role of one parameter.

    Args:
        name: its name in the model; None where it was given without one.
        p: the parameter.
        places: every name and module that holds it; empty where there is no model to ask.
        is_head: whether the model says that it is its head.
    """
    modules = [module for _, module in places]
    names = [own for own, _ in places] or ([] if name is None else [name])
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in modules):
        return Found("position" if all(map(_POSITION.search, names)) else "table", "module")
    if any("norm" in type(module).__name__.lower() for module in modules):
        return Found("norm", "module")
    named: Role | None = next((role for role in map(_by_name, names) if role is not None), None)
    if sum(d > 1 for d in p.shape) < 2:
        return Found(named, "name") if named in _OF_VECTORS else Found("scalar", "shape")
    if is_head:
        return Found("head", "model")
    patches = named == "table" and any(isinstance(module, _ConvNd) for module in modules)
    if patches:
        return Found("convolution", "patches")
    return _of_weight(p, modules, names) if named is None else Found(named, "name")


def _of_weight(p: Tensor, modules: Sequence[nn.Module], names: Sequence[str]) -> Found:
    """The role of a weight of two modes or more that no name gives away."""
    if any(isinstance(module, _ConvNd) for module in modules):
        return Found("convolution", "module")
    if p.ndim > 2:
        if p.is_complex() or any(_SPECTRAL.search(type(module).__name__) for module in modules):
            return Found("spectral", "shape" if p.is_complex() else "module")
        return Found("experts" if any(map(_EXPERTS.search, names)) else "convolution", "name")
    return (
        Found("table", "gradient") if not modules and p.is_leaf and _rows_are_rare(p.grad) else Found("hidden", "shape")
    )


def _by_name(name: str) -> Role | None:
    """What a name says; nothing for most. A bias of a head is a bias."""
    return next((role for role, pattern in _NAMES if pattern.search(name)), None)


def _rows_are_rare(gradient: Tensor | None) -> bool:
    """Whether most rows of a tall gradient are zero, but not all: those of tokens that a batch does not have."""
    if gradient is None or gradient.layout is not torch.strided or gradient.shape[0] < 4 * gradient.shape[1]:
        return False
    share = float((gradient == 0).all(-1).float().mean())
    return 0.5 < share < 1.0


def roles_of(model: nn.Module) -> dict[str, Found]:
    """The role of every trainable parameter of a model, by its name."""
    places = places_of(model)
    given: Any = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {id(p) for p in given.parameters()} if isinstance(given, nn.Module) else {id(given)}
    return {
        name: role_of(name, p, places[name], id(p) in heads) for name, p in model.named_parameters() if p.requires_grad
    }


def known_role(role: str, where: str) -> Role:
    """A role by its name.

    Args:
        role: its name.
        where: the argument that it comes from, for the error.

    Raises:
        ValueError: an unknown one.
    """
    if role not in ROLES:
        raise ValueError(f"{where} has no role {role!r}{nearest(role, ROLES)}; roles are {', '.join(ROLES)}")
    return role


def check_rates(rates: Mapping[str, float] | None, present: Mapping[str, Any] | None = None) -> dict[Role, float]:
    """Factors of the learning rate by role, checked.

    Args:
        rates: role -> factor > 0.
        present: roles that there are; None for any.

    Raises:
        ValueError: an unknown role, one that no parameter has, or a factor outside its interval.
    """
    for role, factor in (rates or {}).items():
        known_role(role, "rates")
        if present is not None and role not in present:
            raise ValueError(
                f"rates gives a factor for role {role!r}, which no parameter has; there are {', '.join(present)}"
            )
        check_float(f"rates[{role!r}]", factor, 0.0, open_low=True)
    return cast("dict[Role, float]", dict(rates or {}))
