"""Combinations of parts that make no sense, refused at construction with the reason."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch

from . import embedded
from .codecs import Full, InWeights, RankOne, TopDirections
from .frames import Blocks, Cosines, Modes, Pooled, Seeded, SparseModes
from .residual import Details, Discard, Feedback, Folded, Sparse
from .rules import Adam, Rule
from .sites import Site
from .slots import Kind
from .transport import Reset

Group = Mapping[str, Any]


def check_composition(group: Group) -> None:
    """Raise for parts that do not go together, whatever they are used on.

    Raises:
        TypeError: a finder that does not fill the frame, a cadence that cannot compare two of them.
        ValueError: any other pair.
    """
    frame, finder, cadence = group["frame"], group["finder"], group["cadence"]
    rule, residual = group["rule"], group["residual"]
    makes, fills = frame.makes, finder.fills
    if makes not in fills:
        raise TypeError(
            f"finder {finder} cannot fill frame {frame}: it finds a "
            f"{' or '.join(kind.__name__ for kind in fills)}, the frame is a {makes.__name__}"
        )
    if cadence.compares and makes not in cadence.compares:
        raise TypeError(
            f"cadence {cadence} cannot compare frames of {frame}: it compares a "
            f"{' or '.join(kind.__name__ for kind in cadence.compares)}, the frame is a {makes.__name__}"
        )
    if finder.ahead > group["refresh_every"]:
        raise ValueError(
            f"finder {finder} is refused with refresh_every={group['refresh_every']}: a search would have to begin "
            f"before the frame of the last one is in use, from which it goes on; use by={group['refresh_every']} or "
            f"less, or a longer period"
        )
    if isinstance(residual, Sparse) and isinstance(group["transport"], Reset) and residual.statistics != "reset":
        raise ValueError(
            f"residual {residual} is refused: transport Reset() sets the rule's clock back at every refresh, and the "
            f"bias correction of sparse moments that go on would be wrong; use statistics='reset'"
        )
    inner = frame.inner if isinstance(frame, Blocks) else frame
    if isinstance(residual, Folded | Details):
        if rule != Adam():
            raise ValueError(
                f"residual {residual} is refused: it divides by the second moment of Adam(), not of {rule}"
            )
        if not hasattr(inner.makes, "lift_squares"):
            raise ValueError(
                f"residual {residual} is refused: frame {frame} has no factors by which each entry would have its "
                f"share of the second moments; use Pooled(), or Modes()"
            )
    if not isinstance(group["bases"], Full):
        _check_bases(group["bases"], inner)
    for role in ("codec", "moments", "bases"):
        if not group[role].signed:
            raise ValueError(f"{role}={group[role]} is refused: it stores no signs, and serves second moments alone")
        if role != "moments" and isinstance(group[role], InWeights):
            raise ValueError(f"{role}={group[role]} is refused: it is for moments, which are of the weights' entries")
    if rule.definite and not isinstance(group["moments"], Full):
        raise ValueError(
            f"moments={group['moments']} is refused: it rounds covariances, which may then have negative eigenvalues, "
            f"and rule {rule} takes their roots by an iteration that diverges on these"
        )


def _check_bases(codec: object, frame: object) -> None:
    """Raise unless the codec can hold the frame's factors."""
    reason = None
    if isinstance(codec, RankOne):
        reason = "it keeps sums of rows and columns alone, which no basis can be had back from"
    elif isinstance(codec, TopDirections):
        reason = "it takes directions apart, of which the columns of a basis have no strongest"
    elif isinstance(frame, Cosines | Seeded | Pooled):
        reason = f"frame {frame} has no factors that would need more bytes than its integers"
    elif not isinstance(frame, Modes | SparseModes):
        reason = (
            f"frame {frame} is a network of small transfer tensors, and what rounds one of them turns every direction "
            f"that passes through it; use Modes() or SparseModes()"
        )
    if reason is not None:
        raise ValueError(f"bases={codec} is refused: {reason}")


def check_site(site: Site, group: Group) -> None:
    """Raise for hyper-parameters that do not go with how a parameter is stepped.

    Raises:
        ValueError: naming the parameter, the hyper-parameter, and why.
    """
    if site.deferred:
        _check_deferred(site, group)
    unfit = embedded.trouble(site.block(0) if site.blocks else site, group)
    if unfit is not None:
        raise ValueError(f"moments={group['moments']} is refused: {site.name} is {_kind(site)}, {unfit}")
    for role, applies, reason in _PROJECTED if site.projected else _WHOLE:
        if applies(site, group):
            kind = "half precision" if role == "rounding" else _kind(site)
            value = group["betas"][1] if role == "betas[1]" else group[role]
            text = reason.format(**{name: group[name] for name in ("transport", "frame", "rule")})
            raise ValueError(f"{role}={value!r} is refused: {site.name} is {kind}, {text}")


def _check_deferred(site: Site, group: Group) -> None:
    """Raise unless updates lie in a frame of one side, and there are steps between its refreshes."""
    reason = None
    if not site.projected:
        reason = f"and is not projected ({site.reason}): leave its layer out by skip="
    elif type(group["frame"]) is not Modes or site.view.name != "tensor" or not _one_side_of_a_matrix(site):
        reason = f"and frame {group['frame']} is not one factor on one side of the matrix: use Modes(), side='auto'"
    elif not isinstance(group["residual"], Discard):
        reason = f"and residual {group['residual']} may move it outside of that frame: use Discard()"
    elif group["decay"] != "all":
        reason = f"and decay={group['decay']!r} would move it outside of that frame: use decay='all'"
    elif group["refresh_every"] == 1:
        reason = "and with refresh_every=1 each step may merge it, and one that merges makes no update: use 2 or more"
    if reason is not None:
        raise ValueError(f"{site.name} keeps its change in a frame beside its codes (compensate=), {reason}")


def _kind(site: Site) -> str:
    if site.projected:
        return "projected"
    if site.whole:
        return "stepped in the whole frame"
    return "complex" if site.view.dtype.is_complex else "stored in codes" if site.coded else "not rounded to nearest"


def kinds(rule: Rule, core: tuple[int, ...]) -> dict[str, Kind]:
    """The kinds of a rule's slots for a core of this shape, by their names."""
    return {slot.name: slot.kind for slot in rule.slots(core)}


def _one_side_of_a_matrix(site: Site) -> bool:
    site = site.block(0) if site.blocks else site
    return sum(d > 1 for d in site.view.shape) == 2 and sum(r is not None for r in site.ranks) == 1


def _by_modes(site: Site, group: Group) -> bool:
    return any(slot.mode >= 0 or slot.turned_by for slot in group["rule"].slots(site.core_shape))


def _slots_change_with_rank(site: Site, group: Group) -> bool:
    whole = kinds(group["rule"], site.view.shape)
    ends = [(d,) if r is None else (1, d) for r, d in zip(site.ranks, site.view.shape, strict=True)]
    return any(kinds(group["rule"], core) != whole for core in product(*ends))


def _varies(site: Site, group: Group) -> bool:
    return Kind.VARIANCE in kinds(group["rule"], site.core_shape).values()


Refusal = tuple[str, Callable[[Site, Group], bool], str]

_HALF = (torch.float16, torch.complex32)
_AMSGRAD: Refusal = ("amsgrad", lambda s, g: not s.plain and g["amsgrad"],
                     "a running maximum has no meaning in a moving subspace")  # fmt: skip
_ROUNDING: Refusal = ("rounding",
                      lambda s, g: g["rounding"] == "stochastic" and s.view.stored_dtype in _HALF and not s.coded,
                      "and only bfloat16 has float32's exponents, so that 16 random bits choose between neighbours: "
                      "use bfloat16, or rounding='nearest'")  # fmt: skip
_WHOLE: tuple[Refusal, ...] = (
    _ROUNDING,
    ("amsgrad", lambda s, g: s.rounded and g["amsgrad"], "and torch's AdamW, which keeps maxima, rounds to nearest"),
    ("amsgrad", lambda s, g: s.coded and g["amsgrad"], "and torch's AdamW, which keeps maxima, cannot write to codes"),
    _AMSGRAD,
    ("fused", lambda s, g: s.coded and bool(g["fused"]), "and torch's kernel cannot write to codes"),
    ("fused", lambda s, g: s.rounded and bool(g["fused"]), "and torch's kernel rounds to nearest"),
    ("fused", lambda s, g: not s.plain and bool(g["fused"]),
     "torch's kernel would keep two second moments for one complex number"),
)  # fmt: skip
_PROJECTED: tuple[Refusal, ...] = (
    _ROUNDING,
    _AMSGRAD,
    ("betas[1]", lambda s, g: g["betas"][1] == 0 and _varies(s, g), "0 leaves no second moment to carry"),
    ("ranks", lambda s, g: g["ranks"].adaptive and not g["transport"].resizes,
     "and transport {transport} cannot take moments from one rank to another"),
    ("ranks", lambda s, g: g["ranks"].adaptive and type(g["frame"]) is not Modes,
     "and frame {frame} has no spectrum for each mode to choose ranks by"),
    ("ranks", lambda s, g: g["ranks"].adaptive and _slots_change_with_rank(s, g),
     "and rule {rule} has slots of another kind for long modes than for short ones: use ranks=Fixed(), a rule whose "
     "max_size is no less than any mode, or one_sided=False"),
    ("ranks", lambda s, g: g["ranks"].adaptive and g["finder"].ahead > 0,
     "and its next frame is searched ahead, before its ranks are chosen: use ranks=Fixed(), or a finder other than "
     "Delayed()"),
    ("rule", lambda s, g: bool(g["rule"].momentum) and g["rule"].momentum not in kinds(g["rule"], s.core_shape),
     "and it keeps no momentum, which is carried from frame to frame and tells error feedback what came of "
     "a gradient: give it some (decay > 0), or a whole frame (rank=1.0)"),
    ("rule", lambda s, g: not g["rule"].momentum,
     "and it keeps its momentum in factors of the whole tensor, which no frame moves: use rank=1.0"),
    ("rule", lambda s, g: not g["frame"].modal and _by_modes(s, g),
     "and it keeps statistics of single modes of the core, while that of frame {frame} has none that could follow it"),
    ("scale", lambda s, g: g["scale"] == "spectral" and not _one_side_of_a_matrix(s),
     'it is for one compressed side of a matrix, as view="matrix" makes of any tensor'),
    ("transport", lambda s, g: g["transport"].projects and _varies(s, g) and not g["rule"].corrected,
     "and it would undo a bias correction that {rule} does not make: use Keep() or Reset()"),
    ("residual", lambda s, g: isinstance(g["residual"], Feedback) and not g["rule"].linear,
     "and the momentum of {rule} is no average of gradients, in which lost momentum could return"),
    ("finder", lambda s, g: g["finder"].inertia > 0 and not g["rule"].linear,
     "and the momentum of {rule} is no average of gradients that it could look at"),
)  # fmt: skip
