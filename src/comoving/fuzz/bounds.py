"""How far a step may go: the largest update of a composition, as a multiple of the learning rate.

An update is (w_new - (1 - lr weight_decay) w_old) / lr, that of a block where a parameter has blocks. Its root mean
square over the entries and its largest entry are bounded from the parts that make it:

Adam            |m|^2 <= K_t v by Cauchy-Schwarz over the two averages, entry by entry, with rho = b1^2 / b2 and
                K_t = (1 - b1)^2 / (1 - b2) (1 + rho + ... + rho^(t-1)), hence |d| <= B = max_t sqrt(K_t c2_t) / c1_t:
                1 at the first step, 7.3 in the long run for (0.9, 0.999). Eigenbases (SOAP) and grafting (Shampoo)
                keep the norm; a change of frame keeps |m|^2 <= K v, in the coordinates of the moments
Scheduled       likewise with its own decay rates
signs           1
Muon            the singular values of one update: 1.21 s after Newton-Schulz iterations, s after a polar decomposition
Columns         1: every slice has the same length
Adafactor       its clip of the RMS
Momentum        none of its own; with :class:`comoving.precondition.Factored` the clip of that

A frame is orthonormal: |F d| <= |d|, of sqrt(core) entries of unit size. What a residual adds is added.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf, prod, sqrt
from typing import Any

import torch

from ..codecs import BFloat16, Codec, Full, Int4, Int8
from ..frames import Modes
from ..groups import update_scale
from ..precondition import Factored
from ..residual import (
    Channel,
    Details,
    Feedback,
    Fira,
    Folded,
    MomentumBuffer,
    Raw,
    Sign,
    Sparse,
    SubsetNorm,
)
from ..residual.gains import Scaled
from ..rules import (
    SOAP,
    SWAN,
    Adafactor,
    Adam,
    AdamS,
    Columns,
    Lion,
    LowRankAdam,
    LowRankMuon,
    Momentum,
    Muon,
    Normalized,
    NorMuon,
    Rule,
    Scheduled,
    Shampoo,
)
from ..sites import Site
from ..state import group_of_block, parts_of
from ..validate import check_int

__all__ = ["Bound", "adam_bound", "scheduled_bound", "step_bound"]

_QUINTIC = 1.2025
"""The largest value on [0, 1.21] of Muon's polynomial, which maps this interval into itself."""
_BFLOAT16 = 2**-8
_PHASE = 1.02
"""The largest |x / |x|| of complex x, where |x| is a denormal of a few bits."""


@dataclass(frozen=True)
class Bound:
    """The largest update, over the learning rate.

    Args:
        rms: of the root mean square over the entries; infinite where there is none.
        entry: of the largest entry; infinite where there is none.
        reason: why there is none.
    """

    rms: float
    entry: float
    reason: str = ""

    @property
    def none(self) -> bool:
        """Whether there is no bound."""
        return self.rms == inf


class _None(Exception):
    """There is no bound, for this reason."""


@dataclass(frozen=True)
class _Size:
    """Bounds on the Frobenius norm and the largest entry of a direction."""

    norm: float
    entry: float


@lru_cache(maxsize=4096)
def adam_bound(beta1: float, beta2: float, steps: int) -> float:
    """The largest |m / c1| / sqrt(v / c2) within so many steps: max_t sqrt(K_t c2_t) / c1_t; infinite for b2 = 0 < b1.

    Args:
        beta1: in [0, 1).
        beta2: in [0, 1).
        steps: >= 1.
    """
    check_int("steps", steps, 1)
    if beta2 == 0:
        return 1.0 if beta1 == 0 else inf
    rho, total, most = beta1**2 / beta2, 0.0, 0.0
    for t in range(1, steps + 1):
        total = 1 + rho * total
        bound = total * (1 - beta1) ** 2 / (1 - beta2)
        most = max(most, sqrt(bound * (1 - beta2**t)) / (1 - beta1**t))
    return most


@lru_cache(maxsize=4096)
def scheduled_bound(rule: Scheduled, beta1: float, steps: int) -> float:
    """The largest |m| / sqrt(v) of :class:`comoving.rules.Scheduled` within so many steps.

    K_t = K_(t-1) b1_t^2 / b2_t + (1 - b1_t)^2 / (1 - b2_t). Since v may start anew at a change of frame while b1_t
    goes on, b1_t^2 is taken at the first step and (1 - b1_t)^2 at the last.
    """
    check_int("steps", steps, 1)
    keep, intake = beta1**2, (1 - beta1 * rule.growth ** (steps - 1)) ** 2
    bound = most = intake
    for t in range(2, steps + 1):
        share = float(t) ** rule.decay
        bound = bound * keep / (1 - share) + intake / share
        most = max(most, bound)
    return sqrt(most)


def step_bound(site: Site, group: Mapping[str, Any], steps: int, absorbed: int = 1) -> Bound:
    """The largest update that a parameter may be given within its first steps.

    Args:
        site: of the parameter, ``optimizer.sites[p]``.
        group: its hyper-parameters, one of ``optimizer.param_groups``.
        steps: how many steps, >= 1.
        absorbed: the largest number of gradients in one step.

    Raises:
        ValueError: a count below 1.
    """
    check_int("steps", steps, 1)
    check_int("absorbed", absorbed, 1)
    try:
        return _plain(site, group, steps) if site.plain else _ruled(site, group, steps, absorbed)
    except _None as error:
        return Bound(inf, inf, str(error))


def _plain(site: Site, group: Mapping[str, Any], steps: int) -> Bound:
    """Torch's AdamW, whose moments have the parameter's own dtype."""
    if site.view.stored_dtype == torch.float16:
        raise _None("in float16 torch's AdamW rounds eps and small second moments to 0")
    codec = BFloat16() if site.view.stored_dtype == torch.bfloat16 else Full()
    size = _adam(group, codec, steps)
    return Bound(size, size)


def _ruled(site: Site, group: Mapping[str, Any], steps: int, absorbed: int) -> Bound:
    group = parts_of(site, group)
    if site.blocks:
        site, group = site.block(0), group_of_block(group)
    adaptive = site.projected and group["ranks"].adaptive
    full = prod(site.view.shape)
    core = full if adaptive else prod(site.core_shape)
    scale = update_scale(site, group["scale"])
    residual = group["residual"]
    if site.projected and isinstance(residual, SubsetNorm):
        if residual.limit is None:
            raise _None(f"{residual} puts no limit on entries, and slices that never had a gradient have no norm")
        return Bound(scale * residual.limit, scale * residual.limit)
    size = _direction(group, site.core_shape, core, full, steps, absorbed)
    if isinstance(group["rule"], Lion) and site.view.dtype.is_complex:
        scale *= _PHASE
    if adaptive and isinstance(group["scale"], str):
        scale *= sqrt(prod(site.core_shape) / full)  # sqrt(full / core) follows the core, which counts as full here
    lifted = _Size(scale * size.norm, scale * min(size.norm, size.entry * _spread(site, group, adaptive)))
    if not site.projected:
        return Bound(lifted.norm / sqrt(full), lifted.entry)
    total = _beside(lifted, size, group, full, core, steps, scale)
    return Bound(total.norm / sqrt(full), total.entry)


def _spread(site: Site, group: Mapping[str, Any], adaptive: bool) -> float:
    """By how much lifting may enlarge the largest entry: rows of U_n have norms of at most 1, and r_n entries."""
    if not site.projected:
        return 1.0
    if adaptive or not isinstance(group["frame"], Modes):
        return inf
    return sqrt(prod(r for r in site.ranks if r is not None))


def _direction(  # noqa: PLR0911, PLR0912  (one case a rule)
    group: Mapping[str, Any], shape: tuple[int, ...], core: int, full: int, steps: int, absorbed: int
) -> _Size:
    """Of d, for a core of this shape (of ``core`` entries at most, where ranks change)."""
    rule: Rule = group["rule"]
    codec: Codec = group["moments"]
    root = sqrt(core)
    match rule:
        case Adam():
            b = _adam(group, codec, steps)
            return _Size(root * b, b)
        case SOAP():
            b = _adam(group, codec, steps, turned=root)
            return _Size(root * b, root * b)
        case Shampoo():
            if not rule.graft:
                raise _None("Shampoo without grafting has no unit size")
            b = _adam(group, codec, steps)
            return _Size(root * b, root * b)
        case Scheduled():
            if not isinstance(codec, Full):
                raise _None(f"moments={codec} may decode second moments far below the squares of the same entries")
            b = scheduled_bound(rule, float(group["betas"][0]), steps)
            return _Size(root * b, b)
        case Lion():
            return _Size(root, 1.0)
        case Adafactor():
            if rule.clip is None:
                raise _None("Adafactor without clip: a product of means may lie far below the square of an entry")
            size = rule.clip * root
            if rule.average == "update":
                size *= 1 + _rounding(codec)[0] / (1 - float(group["betas"][0])) * root
            return _Size(size, size)
        case Columns():
            return _Size(root, root)
        case Normalized() | SWAN():
            return _Size(root * rule.scale, root * rule.scale)
        case AdamS():
            return _adams(group, root)
        case LowRankAdam():
            if rule.limit is None:
                raise _None("LowRankAdam without limit: the fit of second moments may vanish where the first does not")
            return _Size(root * rule.limit, rule.limit)
        case LowRankMuon():
            return _muon(rule.inner, shape, core, fixed=True)
        case Muon():
            return _muon(rule, shape, core, fixed=not group["ranks"].adaptive and core == prod(shape))
        case Momentum():
            return _momentum(rule, group, full, absorbed)
        case _:
            raise _None(f"nothing is known of rule {rule}")


def _adam(group: Mapping[str, Any], codec: Codec, steps: int, turned: float = 1.0) -> float:
    """Adam's bound; with moments that are rounded, what rounding adds to it.

    Let h be the largest error of m over its block's largest entry, and 1 / l the least level of sqrt(v) over its
    largest. Errors of m of up to h sqrt(K) max sqrt(v) add up by 1 / (1 - b1), where sqrt(v) is as low as
    max sqrt(v) / l. And v stops growing where (1 - b2) |z|^2 is less than rounding takes away again, a share u of v,
    while m goes on to z: |z|^2 = v (1 + u / (1 - b2)). Rounded entries of m that are turned mix, ``turned`` at most.
    """
    beta1, beta2 = (float(b) for b in group["betas"])
    exact = adam_bound(beta1, beta2, steps)
    if exact == inf:
        raise _None(f"betas {group['betas']}: b2 = 0 forgets every gradient but the last, which may be 0")
    if isinstance(codec, Full) or steps == 1:
        return exact
    mean, stuck = _rounding(codec)
    return exact * (1 + mean * turned / (1 - beta1)) + sqrt(1 + stuck / (1 - beta2))


def _adams(group: Mapping[str, Any], root: float) -> _Size:
    """By Cauchy and Schwarz |b1 m + (1 - b1) z| <= sqrt(b1^2 / b2 + (1 - b1)^2 / (1 - b2)) sqrt(v)."""
    beta1, beta2 = (float(b) for b in group["betas"])
    if beta2 == 0 and beta1 > 0:
        raise _None(f"betas {group['betas']}: b2 = 0 divides by the gradient alone, which may be 0")
    b = sqrt((beta1**2 / beta2 if beta1 else 0.0) + (1 - beta1) ** 2 / (1 - beta2))
    return _Size(root * b, b)


def _rounding(codec: Codec) -> tuple[float, float]:
    """(h l, u) of :func:`_adam`."""
    match codec:
        case Full():
            return 0.0, 0.0
        case BFloat16():
            return _BFLOAT16, _BFLOAT16
        case Int8():
            # Linear: h = 1/254, l = 255. Dynamic tables are as coarse near 0 as numbers of one digit.
            h = 255 / 254 if codec.table == "linear" else 5.5
        case Int4():
            h = 15 / 14 if codec.table == "linear" else 15 * 0.16  # NF4's widest gap is 0.31
        case _:
            raise _None(f"moments={codec} may decode second moments far below the squares of the same entries")
    # From level 1 to 1.5, the next one up, or to 2 where it may come by a draw.
    return (h, 1.25) if codec.rounding == "nearest" else (2 * h, 3.0)


def _muon(rule: Muon, shape: tuple[int, ...], core: int, fixed: bool) -> _Size:
    own = isinstance(rule, NorMuon)
    iterated = rule.method == "newton-schulz" and rule.unit == "none"
    if iterated and rule.coefficients not in {"quintic", Muon().coefficients}:
        raise _None(f"Muon's polynomial {rule.coefficients} may map singular values anywhere")
    value = _QUINTIC * (1.03 if rule.bf16 else 1.0) if iterated else 1.0
    if not fixed:  # sqrt(core / max(rows, columns)) singular values: of a core of any shape
        if rule.unit != "none" and rule.scale == "spectral":
            raise _None("sides of unit length and scale='spectral' make updates of a size that depends on ranks")
        size = value * (0.2 if rule.scale == "match" else 1.0 if isinstance(rule.scale, str) else rule.scale)
        return _Size(size * sqrt(core), size * sqrt(core))
    # The modes of a matrix matter for the scale alone: take the larger one.
    long = [d for d in shape if d > 1] or [1]
    cuts = [(long[0], core // long[0])]
    if len(long) > 2 and rule.over != "flat":
        cuts.append((long[0], long[1]))
    sizes: list[_Size] = []
    for rows, columns in cuts:
        s = rule.size(rows, columns)
        norm = s / sqrt({"none": max(rows, columns), "rows": columns, "columns": rows}[rule.unit])
        # One entry of NorMuon's may be all that there is of its matrix.
        sizes.append(_Size(value * norm * sqrt(core), value * (norm * sqrt(rows * columns) if own else s)))
    return _Size(max(size.norm for size in sizes), max(size.entry for size in sizes))


def _momentum(rule: Momentum, group: Mapping[str, Any], full: int, absorbed: int) -> _Size:
    precondition = group["precondition"]
    if not isinstance(precondition, Factored) or precondition.clip is None:
        raise _None("Momentum has the size of the gradients")
    if isinstance(group["residual"], Feedback | MomentumBuffer):
        raise _None("Momentum has the size of gradients, and feedback returns many of them at once")
    if group["ranks"].adaptive and isinstance(group["scale"], str):
        raise _None("Momentum has the size of the gradients, and scale grows where ranks fall")
    if not isinstance(group["moments"], Full | BFloat16):
        raise _None(f"moments={group['moments']}: rounding of momentum adds up")
    norm = precondition.clip * sqrt(full) * absorbed
    return _Size(norm, norm)


def _beside(  # noqa: PLR0911  (one case a residual)
    lifted: _Size, size: _Size, group: Mapping[str, Any], full: int, core: int, steps: int, scale: float
) -> _Size:
    """The whole update: what the residual adds to the lifted direction, or puts in its place."""
    residual = group["residual"]
    match residual:
        case Fira():
            # The first is as large outside the frame as d is inside, entry by entry; adaptive cores count as full.
            share = 1.0 if group["ranks"].adaptive else (full - core) / core
            rest = _grown(size.norm * sqrt(share), residual, steps)
            return _Size(lifted.norm + rest, lifted.entry + rest)
        case Channel():
            rest = scale * _grown(size.norm * sqrt(full / core), residual, steps)
            return _Size(rest, rest)
        case Sign():
            return _Size(lifted.norm + residual.rate * sqrt(full), lifted.entry + residual.rate)
        case Raw():
            raise _None("what Raw adds has the size of the gradients")
        case Folded():
            # Of sums of r coordinates |F m|^2 <= r K |F|^2 v: the bound of a lifted entry is that of the quotient too.
            b1, b2 = (float(b) for b in group["betas"])
            rest = scale * max(sqrt(1 - b2**t) / (1 - b1**t) for t in range(1, steps + 1))
            return _Size((lifted.entry + rest) * sqrt(full), lifted.entry + rest)
        case Details():
            if residual.limit is None:
                raise _None(f"{residual} puts no limit on what it divides: |g - F z| / |z| may be anything")
            rest = scale * residual.limit
            return _Size(lifted.norm + rest * sqrt(full), lifted.entry + rest)
        case Sparse():
            count = residual.count((full,))
            own = _direction({**group, "rule": residual.rule, "moments": Full()}, (count,), count, full, steps, 1)
            return _Size(lifted.norm + residual.scale * own.norm, lifted.entry + residual.scale * own.entry)
        case _:
            return lifted


def _grown(first: float, residual: Scaled, steps: int) -> float:
    """The longest scaled rest after so many steps, each longer than the last by the growth and 1e-8 at most."""
    if residual.growth is None:
        raise _None(f"{residual} puts no limit on what it scales: |g| / |z| may be anything")
    return (first + steps * 1e-8) * residual.growth ** (steps - 1)
