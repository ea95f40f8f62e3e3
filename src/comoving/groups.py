"""What a parameter group may hold, and what is decided about each of its parameters."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from .codecs import Full
from .decay import DECAYS
from .frames import Blocks
from .frames.base import SIDES, Side
from .frames.modes import check_rank
from .precondition import Plain
from .refusals import check_composition, check_site
from .residual import MomentumBuffer, SubsetNorm
from .roles import role_of
from .rounding import ROUNDINGS
from .rules import Adam
from .sites import Site
from .slots import Kind
from .validate import check_choice, check_float, check_int, check_known, plain, shown
from .views import View, check_view
from .weights import DeferringLinear, codes_of

# Below this share of the largest projected tensor's size, a tensor has next to no state to save, and much to lose.
_SMALLEST_SHARE = 1 / 128

# "auto": the measured default; see docs/choosing.md.
_AUTO_MATRIX, _AUTO_TENSOR = 0.3, 1.0


_FOREIGN = {"params", "param_names", "name", "initial_lr", "gradient_norm", "validation"}
"""Keys of parameter groups that are not hyper-parameters."""
_TRAITS = {
    "rule": ("definite", "corrected", "linear", "elementwise", "timeless", "replays", "replaces", "total", "batched"),
    "transport": ("resizes", "projects", "restarts", "batched"), "precondition": ("replays", "batched"),
    "frame": ("makes", "modal", "batched"), "finder": ("fills", "alone", "joint", "ahead", "batched"),
    "cadence": ("compares", "alone", "batched"),
    "residual": ("holds", "feeds", "entrywise", "rescales", "replays", "bounded", "reads", "alone", "batched"),
    "codec": ("signed", "batched"), "moments": ("signed", "batched"), "bases": ("signed", "batched"),
}  # fmt: skip
"""What the engine reads of a part beside its methods, by roles; see their protocols."""


def check_options(group: Mapping[str, Any]) -> None:
    """Raise unless every hyper-parameter of a parameter group lies in its interval.

    Raises:
        TypeError, ValueError: with the name, the value and the interval.
    """
    if isinstance(group["lr"], Tensor):
        raise TypeError("lr must be a float; a tensor would have to be read from its device at every step")
    check_float("lr", group["lr"], 0.0)
    check_float("rate", group["rate"], 0.0, open_low=True)
    if not isinstance(group["betas"], Sequence) or len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {group['betas']!r}")
    check_float("betas[0]", group["betas"][0], 0.0, 1.0, open_high=True)
    check_float("betas[1]", group["betas"][1], 0.0, 1.0, open_high=True)
    check_float("eps", group["eps"], 0.0)
    check_float("weight_decay", group["weight_decay"], 0.0)
    check_rank(group["rank"])
    check_choice("side", group["side"], SIDES)
    check_view(group["view"])
    check_int("refresh_every", group["refresh_every"], 1)
    _match_factor(group["scale"], matrix=True)
    for key in ("maximize", "amsgrad", "diagnostics"):
        check_choice(key, group[key], (True, False))
    for key in ("foreach", "fused"):
        check_choice(key, group[key], (True, False, None))
    check_choice("select", group["select"], ("auto", "shape", "all"))
    check_choice("rounding", group["rounding"], ROUNDINGS)
    check_choice("decay", group["decay"], DECAYS)
    roles = {
        "frame": ("ranks", "core_shape", "load", "start"), "finder": ("schema", "observe", "find", "inertia"),
        "cadence": ("schema", "due", "refreshed"), "precondition": ("schema", "apply"), "transport": ("move", "age"),
        "rule": ("absorb", "direction"), "residual": ("restore", "keep", "write"), "codec": ("encode", "decode"),
        "moments": ("encode", "decode", "positive"), "bases": ("encode", "decode"),
        "ranks": ("adaptive", "initial", "wanted", "below", "heard"),
    }  # fmt: skip
    for role, methods in roles.items():
        part = group[role]
        if isinstance(part, type) or not all(hasattr(part, method) for method in methods):
            hint = " (the number of directions is rank=)" if role == "ranks" else ""
            kind = "codec" if role in {"moments", "bases"} else role
            raise TypeError(
                f"{role} must be a {kind} part, such as those in comoving's {kind} modules{hint}, got {part!r}"
            )
        for trait in _TRAITS.get(role, ()):
            if not hasattr(part, trait):
                raise TypeError(f"{role} {part!r} states no {trait!r}, which every {role} must: see its protocol")
    check_composition(group)


def update_scale(site: Site, scale: float | str) -> float:
    """The factor of a lifted direction: a number as it is, "<c>-match" c sqrt(full/core), 1 for a whole frame.

    "spectral" makes of r orthogonal rows of unit RMS an update with all singular values sqrt(d_1/d_2).
    """
    if not site.projected:
        return 1.0
    site = site.entire
    if scale == "spectral":
        rows, columns = (d for d in site.view.shape if d > 1)
        rank = next(r for r in site.ranks if r is not None)
        return sqrt(rows / columns * rank / prod(site.core_shape))
    factor = _match_factor(scale, matrix=sum(d > 1 for d in site.view.shape) == 2)
    return scale if not isinstance(scale, str) else factor * site.gain


def _match_factor(scale: float | str, matrix: bool) -> float:
    """c of "<c>-match", 1 for "match"; the measured one of the kind of tensor for "auto".

    Raises:
        TypeError, ValueError: a scale of another form, or not positive.
    """
    if scale == "auto":
        return _AUTO_MATRIX if matrix else _AUTO_TENSOR
    if scale == "spectral":
        return 1.0
    if isinstance(scale, str):
        try:
            factor = 1.0 if scale == "match" else float(scale.removesuffix("-match") if "-match" in scale else "")
        except ValueError:
            raise ValueError(f"scale must be 'auto', 'match', '<number>-match' or a number, got {scale!r}") from None
        check_float(f"the number in scale {scale!r}", factor, 0.0, open_low=True)
        return factor
    check_float("scale", scale, 0.0, open_low=True)
    return 1.0


def decide(
    named: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any], first: int, sides: Mapping[Tensor, Side]
) -> list[Site]:
    """The site of each parameter of a group, still without a phase.

    Args:
        named: (name, parameter), the name None where the parameters were given without names.
        group: its hyper-parameters.
        first: number of parameters in earlier groups.
        sides: in place of the group's, for some parameters.

    Raises:
        ValueError: a rank, view or option that does not fit a parameter, with its name.
    """
    sites = [
        _decide_one(name, p, {**group, "side": sides[p]} if p in sides else group, first + i)
        for i, (name, p) in enumerate(named)
    ]
    if not isinstance(group["rank"], tuple):
        sites = _without_the_small(sites)
    for site in sites:
        if site.projected:
            try:
                one = site.block(0) if site.blocks else site
                group["finder"].schema(one.view.shape, one.ranks, one.view.dtype)
                group["residual"].schema(group["codec"], one.view.shape, one.core_shape, one.view.dtype)
            except ValueError as error:
                raise ValueError(f"{site.name}: {error}") from None
        check_site(site, group)
    return [_at_first_ranks(site, group) if site.projected and group["ranks"].adaptive else site for site in sites]


def _at_first_ranks(site: Site, group: Mapping[str, Any]) -> Site:
    """The site with the ranks that an adaptive policy starts from."""
    shape = site.view.shape
    ranks = group["ranks"].initial(site.ranks, shape)
    return replace(site, ranks=ranks, core_shape=group["frame"].core_shape(shape, ranks), base=site.ranks)


def _decide_one(name: str | None, p: Tensor, group: Mapping[str, Any], index: int) -> Site:
    label = name if name is not None else f"parameter {index}"
    if not (p.is_floating_point() or p.is_complex()):
        raise ValueError(f"{label}: an optimizer needs floating-point or complex parameters, got {p.dtype}")
    if not p.is_complex() and p.dtype.itemsize < 2:
        raise ValueError(
            f"{label}: {p.dtype} has too few bits for updates to be rounded into; keep the parameter in bfloat16 or "
            f"float32 and cast in the forward pass, or store it in 8 or 4 bits by comoving.weights.quantize(model)"
        )
    try:
        view = View(group["view"] if p.ndim > 1 else "tensor", tuple(p.shape), p.dtype)
        codes = codes_of(p)
        coded, deferred = codes is not None, isinstance(codes, DeferringLinear)
        rounded = group["rounding"] == "stochastic" and p.dtype == torch.bfloat16 and not coded
        dense = Site(label, view, (None,) * len(view.shape), view.shape, "", index=index)
        dense = replace(dense, rounded=rounded, coded=coded, deferred=deferred)
        modes, empty = sum(d > 1 for d in view.shape), 0 in view.shape
        modes = 0 if empty and not (modes > 1 and isinstance(group["frame"], Blocks)) else modes  # blocks refuse it
        found = role_of(name, p)
        dense = replace(dense, role=(group["roles"] or {}).get(name, found.role))
        given = (group["reasons"] or {}).get(name)
        if group["select"] == "all" and (modes < 2 or group["rank"] == 1.0 and isinstance(group["rank"], float)):
            return _whole(dense, given or ("rank 1.0" if modes > 1 else "fewer than two modes"), group)
        reason = given or (found.why_dense if name is not None and group["select"] == "auto" else None)
        if reason is not None or group["rank"] == 1.0 and isinstance(group["rank"], float):
            at_full_rank = replace(dense, reason=reason or "rank 1.0")
            return at_full_rank if reason is not None or modes < 2 else _whole(dense, "rank 1.0", group)
        if modes < 2:
            return replace(dense, reason="no entries" if empty else "fewer than two modes")
        ranks = group["frame"].ranks(view.shape, group["rank"], group["side"])
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    layout = group["frame"]
    mode = layout.mode if isinstance(layout, Blocks) else None
    core = layout.core_shape(view.shape, ranks)
    site = replace(dense, ranks=ranks, core_shape=core, reason="projected", block_mode=mode)
    if not site.projected or prod(site.core_shape) >= prod(view.shape):
        return _whole(dense, "rank covers every mode, or no mode is long enough", group)
    # Under another rule a whole frame, or AdamW, would be another method: there the rank is taken at its word.
    by_adam = _only_adam(group) and not isinstance(group["rank"], tuple)
    if by_adam and _reals(site, group) >= _reals(dense, group):
        return replace(dense, reason="too small to gain")
    return site


def _whole(dense: Site, reason: str, group: Mapping[str, Any]) -> Site:
    """The site in the whole frame under the group's rule, block by block where it has blocks.

    Dense for Adam alone, and where the momentum is what the residual keeps, or the step size is its own: a whole frame
    leaves no residual.
    """
    if _only_adam(group) or isinstance(group["residual"], MomentumBuffer | SubsetNorm):
        return replace(dense, reason=reason)
    layout, shape = group["frame"], dense.view.shape
    if not isinstance(layout, Blocks):
        return replace(dense, reason=reason, whole=True)
    core = (layout.count(shape), *layout.block_shape(shape))
    return replace(dense, reason=reason, whole=True, block_mode=layout.mode, core_shape=core)


def _only_adam(group: Mapping[str, Any]) -> bool:
    """Whether a whole frame would be AdamW, which torch steps faster."""
    return group["rule"] == Adam() and group["precondition"] == Plain() and isinstance(group["moments"], Full)


def _without_the_small(sites: list[Site]) -> list[Site]:
    sizes = [prod(site.view.stored_shape) * site.view.dtype.itemsize if site.projected else 0 for site in sites]
    least = max(sizes, default=0) * _SMALLEST_SHARE
    return [
        _dense(site, "too small to gain") if 0 < size < least else site for site, size in zip(sites, sizes, strict=True)
    ]


def _dense(site: Site, reason: str) -> Site:
    return replace(
        site, ranks=(None,) * len(site.view.shape), core_shape=site.view.shape, reason=reason, block_mode=None
    )


def _reals(site: Site, group: Mapping[str, Any]) -> int:
    """Real numbers in moments and frame; the feedback buffer is a choice of its own and does not count here."""
    field = 2 if site.view.dtype.is_complex else 1
    slots = group["rule"].slots(site.core_shape)
    moments = sum(field if slot.kind is Kind.LINEAR else 1 for slot in slots if slot.mode < 0)
    frame = group["frame"].schema(site.view.shape, site.ranks, site.view.dtype) if site.projected else {}
    return moments * prod(site.core_shape) + field * sum(prod(spec.shape) for spec in frame.values())


def named(params: Iterable[Any]) -> list[tuple[str | None, Tensor]]:
    """Parameters, or (name, parameter) pairs, as pairs with the name None where none was given.

    Raises:
        TypeError: something that is neither.
    """
    pairs: list[tuple[str | None, Tensor]] = []
    for entry in [params] if isinstance(params, Tensor) else params_of(params):
        name, p = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
        if not isinstance(p, torch.Tensor) or not isinstance(name, str | None):
            raise TypeError(f"an optimizer takes parameters or (name, parameter) pairs, got {shown(entry)}")
        pairs.append((name, p))
    return pairs


def joining(
    group: object, defaults: Mapping[str, Any], present: Collection[Tensor]
) -> tuple[list[tuple[str | None, Tensor]], dict[str, Any]]:
    """The (name, parameter) pairs of a group that shall join, and its entries as plain values.

    Args:
        group: as for ``add_param_group``.
        defaults: every hyper-parameter there is.
        present: the parameters of other groups.

    Raises:
        ValueError: an empty group, or a duplicate parameter.
        TypeError: no group, or an unknown hyper-parameter.
    """
    given: Any = group
    if not isinstance(given, dict) or "params" not in given:
        raise TypeError(f"a parameter group is a dict with its parameters under 'params', got {given!r}")
    entries: dict[str, Any] = given
    pairs = named(entries["params"])
    check_known(entries.keys() - _FOREIGN, defaults)
    entries = {key: value if key == "params" else plain(value) for key, value in entries.items()}
    if not pairs:
        raise ValueError("a parameter group is empty")
    params = [p for _, p in pairs]
    repeated = [n or i for i, (n, p) in enumerate(pairs) if p in present or any(p is q for q in params[:i])]
    if repeated:
        raise ValueError(f"duplicate parameters: {repeated} are already in this or another group")
    return pairs, entries


def params_of(params: Any) -> Iterable[Any]:
    """What an optimizer is given, where that can be iterated over.

    Raises:
        TypeError: a module or a mapping, with the call that is meant; anything else that is no iterable.
    """
    if isinstance(params, nn.Module):
        raise TypeError(
            f"an optimizer takes parameters, got the module {type(params).__name__}: pass model.named_parameters(), or "
            f"comoving.param_groups(model)"
        )
    if isinstance(params, Mapping):
        raise TypeError("an optimizer takes parameters or (name, parameter) pairs, got a mapping: pass its .items()")
    if not isinstance(params, Iterable) or isinstance(params, str):
        raise TypeError(f"an optimizer takes parameters or (name, parameter) pairs, got {shown(params)}")
    return params  # pyright: ignore[reportUnknownVariableType]
