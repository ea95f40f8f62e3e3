"""The largest rank that fits into a memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..frames.base import Rank
from ..methods import DEFAULT
from ..recipes import build, recipes
from ..units import show_bytes
from .needs import Cache
from .plan import STATE, Plan, drafted
from .shapes import Subject

_LADDER: tuple[tuple[str, dict[str, str]], ...] = (
    ("the recipe's own", {}),
    ("8 bits", {"moments": "int8", "codec": "int8"}),
    ("4 bits", {"moments": "int4", "codec": "int4"}),
)
"""From the least loss to the least memory: of the moments, and of what feedback keeps."""
_BUDGETS: tuple[tuple[str, dict[str, str]], ...] = (
    ("the best", {}),
    *((f"budget {share}", {"budget": share}) for share in ("1/8", "1/16", "1/32", "0")),
)
"""The same of the default optimizer, whose budget chooses codecs."""


@dataclass(frozen=True)
class Candidate:
    """What one choice of codecs comes to.

    Args:
        codecs: in words.
        plan: at the largest rank that fits; where none does, at the smallest.
        fits: whether it does.
        limited: whether a larger rank would not fit; False where every rank does, or the recipe has none.
    """

    codecs: str
    plan: Plan
    fits: bool
    limited: bool


@dataclass(frozen=True)
class Fit:
    """What fits into ``limit`` bytes: one candidate for each choice of codecs."""

    limit: int
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The largest rank that fits, of equal ones that with the least loss; else what comes nearest."""
        fitting = [c for c in self.candidates if c.fits]
        if not fitting:
            return min(self.candidates, key=lambda c: c.plan.peak_bytes)
        return max(fitting, key=lambda c: c.plan.rank if isinstance(c.plan.rank, int) else 0)

    @property
    def verdict(self) -> str:
        """One sentence: the rank and codecs that fit and what binds, or by how much nothing does."""
        best, limit = self.best, show_bytes(self.limit)
        size = show_bytes(best.plan.peak_bytes)
        rank = "" if best.plan.rank is None else f"rank {best.plan.rank}"
        codecs = f"{best.codecs} codecs" if best.codecs == "the recipe's own" else best.codecs
        choice = f"{rank} with {codecs}" if rank else f"full rank with {codecs}"
        if not best.fits:
            over, most = show_bytes(best.plan.peak_bytes - self.limit), binding(best.plan)
            return f"nothing fits into {limit}: {choice} needs {size}, {over} too much; most of it is {most}"
        if not best.limited:
            return f"{choice} needs {size} of {limit}" + ("; nothing binds, every rank fits" if rank else "")
        return f"{choice} needs {size} of {limit}; what binds is {binding(best.plan)}"


def binding(plan: Plan) -> str:
    """The largest part of a plan, its state as one part but with its own largest named, and its share of the peak."""
    parts = plan.parts()
    merged = {name: size for name, size in parts.items() if name not in STATE} | {"state": plan.state_bytes}
    name = max(merged, key=lambda part: merged[part])
    share = f"{merged[name] / max(1, plan.peak_bytes):.0%}"
    if name != "state":
        return f"{name} ({share})"
    own = max(plan.state, key=lambda part: plan.state[part])
    return f"state ({share}), {own} most of all ({show_bytes(plan.state[own])})"


def fit(model: Subject, recipe: str, limit: int, *, options: Mapping[str, Any], **settings: Any) -> Fit:
    """The largest rank, an int for every projected parameter, whose peak is at most ``limit`` bytes.

    Codecs that are given in ``options`` are kept; otherwise the recipe's own, 8 and 4 bits are tried, or of the default
    optimizer several budgets. Temporaries, and with them the peak, are rehearsed at every rank that decides. Looked at
    are the ranks at which as much is projected as at rank 1: beyond them parameters are stepped as dense ones.

    Args:
        model: without data.
        recipe: a name of :func:`comoving.recipes`.
        limit: bytes.
        options: of :func:`comoving.build`.
        **settings: the other settings of :func:`comoving.memory.plan.drafted`.
    """
    cache: Cache = {}
    method = recipes()[recipe.partition("+")[0]] if recipe.partition("+")[0] in recipes() else None
    full = method is not None and method.full_rank
    ladder = _BUDGETS if method is DEFAULT and "budget" not in options else _LADDER
    if {"budget", "codec", "moments"} & set(options) or (method is not None and "moments" in method.options):
        given = ", ".join(f"{role}={options[role]}" for role in ("budget", "moments", "codec") if role in options)
        ladder = ((given or "the recipe's own", {}),)
    candidates: list[Candidate] = []
    for codecs, choice in ladder:
        own = {role: codec for role, codec in choice.items() if not (full and role == "codec")}
        try:
            top = 0 if full else _largest(model, recipe, {**options, **own})
        except ValueError:
            if not own:
                raise
            continue  # codecs that this recipe refuses

        def draft(rank: Rank | None, rehearsed: bool = True, own: Mapping[str, Any] = own) -> Plan:
            known = cache if rehearsed else None
            return drafted(model, recipe, rank, options={**options, **own}, cache=known, **settings)

        candidates.append(_candidate(codecs, draft, top, limit))
    return Fit(limit, tuple(candidates))


def _candidate(codecs: str, draft: Callable[..., Plan], top: int, limit: int) -> Candidate:
    """The largest rank from 1 to ``top``; ``top`` 0 stands for a recipe without."""
    if top == 0:
        only = draft(None)
        return Candidate(codecs, only, only.peak_bytes <= limit, False)
    # The peak without temporaries bounds the rank from above, and with those of that rank from below.
    high = _last(lambda rank: draft(rank, False).peak_bytes <= limit, 1, top)
    plan = draft(max(1, high))
    if plan.peak_bytes <= limit:
        return Candidate(codecs, plan, True, high < top)
    spare = limit - plan.temporaries
    low = _last(lambda rank: draft(rank, False).peak_bytes <= spare, 1, max(1, high))
    rank = _last(lambda rank: draft(rank).peak_bytes <= limit, max(1, low), max(1, high - 1))
    plan = draft(max(1, rank))
    return Candidate(codecs, plan, plan.peak_bytes <= limit, True)


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest integer of [low, high] for which a falling predicate holds; low - 1 where it never does."""
    if high < low or not holds(low):
        return low - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _largest(model: Subject, recipe: str, options: Mapping[str, Any]) -> int:
    """The largest rank at which as many entries are projected as at rank 1; 0 where none are."""

    def projected(rank: int) -> int:
        optimizer = build(recipe, model.module, rank=rank, **options)
        return sum(p.numel() for p, site in optimizer.sites.items() if site.projected)

    all_of_them = projected(1)
    longest = max((max(p.shape, default=1) for p in model.module.parameters()), default=1)
    return 0 if all_of_them == 0 else _last(lambda rank: projected(rank) == all_of_them, 1, longest)
