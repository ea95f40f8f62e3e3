"""Every method as a composition of parts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from inspect import signature
from math import sqrt
from typing import Any

import torch
from torch import nn

from . import state as slots
from .adamw import AdamW
from .cadence import Growing, Lazy
from .codecs import Full, Int4, Int8, RankOne, Spec
from .finders import (
    Amortized,
    Correlation,
    CosineSelection,
    Exact,
    Nystroem,
    Oja,
    Power,
    RandomProjection,
    StreamingTucker,
    TrainIncrement,
    TrainSVD,
    TreeIncrement,
    TreeSVD,
)
from .formula import StateFormula, formula_of
from .frames import Cosines, Seeded, Trains, Trees
from .frames.base import Rank
from .groups import param_groups, params_of
from .optimizer import LowRankOptimizer
from .parts import part
from .precondition import Factored, Kronecker
from .residual import Channel, Discard, Feedback, Fira, MomentumBuffer, Sign, Sparse
from .rules import SOAP, Adafactor, Columns, Lion, Momentum, Muon, Scheduled, Shampoo
from .transport import Keep, Reset, Rotate
from .validate import check_known, nearest, plain


@dataclass(frozen=True)
class Recipe:
    """A method: what it is, where it is published, and what it is made of.

    Args:
        name: its name in :func:`build`.
        summary: one line.
        paper: the arXiv id, or where else it is described.
        options: hyper-parameters of :class:`comoving.LowRankOptimizer` that make the method.
        relative_rate: its usual learning rate as a multiple of AdamW's; for most a mean of the best ones on the race's
            tasks (docs/frontier.md).
        full_rank: whether it ignores ``rank``.
        rank: that of the method where it has one of its own, which a user may still override; None for 0.25.
        state: the formula of its state where that is no polynomial of m, n and r.
    """

    name: str
    summary: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=lambda: {})
    relative_rate: float = 1.0
    full_rank: bool = False
    rank: Rank | None = None
    state: str = ""

    def rank_for(self, given: Rank | None) -> Rank | None:
        """The rank that projected parameters get: the given one, or its own; None where it has full rank."""
        if self.full_rank:
            return None
        return given if given is not None else 0.25 if self.rank is None else self.rank

    @property
    def parts(self) -> dict[str, str]:
        """Role -> part, in words, of what the recipe sets."""
        return {role: _in_words(value) for role, value in self.options.items()}

    def state_formula(self) -> StateFormula | None:
        """The state of an m x n matrix, m <= n, at rank r; None where it is no polynomial, or no matrix is taken."""

        def layout(m: int, n: int, r: int) -> Mapping[str, Spec]:
            p = nn.Parameter(torch.empty(m, n, dtype=torch.float32, device="meta"))
            optimizer = LowRankOptimizer([p], rank=1.0 if self.full_rank else r, **self.options)
            return slots.layout(optimizer.sites[p], optimizer.param_groups[0])

        try:
            return formula_of(layout)
        except ValueError:
            return None


def _in_words(part: Any) -> str:
    """A part without the fields that have their default value."""
    if not hasattr(part, "__dataclass_fields__"):
        return str(part)
    set_fields = [f"{f.name}={getattr(part, f.name)!r}" for f in fields(part) if getattr(part, f.name) != f.default]
    return f"{type(part).__name__}({', '.join(set_fields)})"


_FOLLOWING: dict[str, Any] = dict(transport=Rotate(), residual=Feedback(), codec=Full(), refresh_every=4, scale="match")
"""What the recipes share whose moments follow the frame, with error feedback; a "+ef" makes no difference to them."""
_WITHOUT = _FOLLOWING | {"residual": Discard()}

_RANDOM: dict[str, Any] = dict(
    frame=Seeded(), finder=RandomProjection(), codec=Full(), refresh_every=200, scale=1.0
)  # fmt: skip
"""What the recipes share that draw their frames."""

_RECIPES = (
    Recipe("adamw", "AdamW on every parameter: torch's own, |g|^2 for complex ones", "1711.05101", full_rank=True),
    Recipe(
        "galore",
        "periodic SVD of the gradient, moments left in old coordinates",
        "2403.03507",
        dict(
            finder=Exact(),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            refresh_every=200,
            scale=0.25,
        ),  # fmt: skip
        relative_rate=15.0,
    ),
    Recipe(
        "q-galore",
        "galore with 8-bit moments and 4-bit bases, and ever rarer SVDs where the leading direction stays; with "
        "quantize(model) 8-bit weights too",
        "2407.08296",
        dict(
            finder=Exact(),
            cadence=Lazy(),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            moments=Int8(),
            bases=Int4(block=256, table="linear"),
            refresh_every=200,
            scale=0.25,
        ),  # fmt: skip
        relative_rate=15.0,
    ),
    Recipe(
        "loqt",
        "galore with exponentially growing intervals, at which its changes are merged into 4-bit weights; with "
        "quantize(model, Int4(), compensate=5)",
        "2405.16528",
        dict(
            finder=Exact(),
            cadence=Growing(),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            refresh_every=100,
            scale=0.5,
        ),  # fmt: skip
        relative_rate=10.0,
    ),
    Recipe(
        "ldadam",
        "power iteration at every step, moments rotated along, generalized error feedback",
        "2410.16103",
        dict(
            finder=Power(inertia=0.908, start="exact"),
            transport=Rotate(),
            residual=Feedback(lazy=False),
            codec=Full(),
            refresh_every=1,
            scale=1.0,
            betas=(0.908, 0.99),
        ),  # fmt: skip,
        relative_rate=2.5,
    ),
    Recipe(
        "fira",
        "GaLore with the rest of the gradient, scaled as Adam scales what the frame holds",
        "2410.01623",
        dict(
            finder=Exact(),
            transport=Keep(),
            residual=Fira(),
            codec=Full(),
            refresh_every=200,
            scale=0.25,
        ),  # fmt: skip
        relative_rate=20.0,
    ),
    Recipe(
        "apollo",
        "the whole gradient, each channel scaled as Adam scales a random projection of it",
        "2412.05270",
        _RANDOM | dict(frame=Seeded(stored=True), transport=Keep(), residual=Channel()),
        relative_rate=5.0,
    ),
    Recipe(
        "apollo-mini",
        "the whole gradient with one scale for the tensor, from a random projection of rank 1",
        "2412.05270",
        _RANDOM | dict(frame=Seeded(stored=True), transport=Keep(), residual=Channel(per="tensor"), scale=sqrt(128)),
        relative_rate=7.0,
        rank=1,
    ),
    Recipe(
        "frugal",
        "Adam in a random frame, begun anew with each, and signSGD outside of it",
        "2411.07837",
        _RANDOM | dict(transport=Reset(), residual=Sign()),
        relative_rate=0.5,
    ),
    Recipe(
        "tensorgrad",
        "Tensor-GaLore beside the largest entries of the gradient, which have moments of their own",
        "2501.02379 v2",
        dict(
            finder=Exact(sweeps=10),
            transport=Keep(),
            residual=Sparse(fraction=0.05, statistics="keep"),
            codec=Full(),
            refresh_every=1000,
            scale=1.0,
        ),  # fmt: skip
        state="mr + 2 nr + 0.1 mn + 0.2 B mn",
        relative_rate=2.0,
    ),
    Recipe(
        "tensor-galore",
        "Tucker factors of the gradient, refreshed periodically, moments left in old coordinates",
        "2501.02379",
        dict(
            finder=Exact(sweeps=1),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            refresh_every=50,
            scale=1.0,
        ),  # fmt: skip,
        relative_rate=2.0,
    ),
    Recipe(
        "tucker-adam",
        "update-aware Tensor-GaLore: moments rotated through every change of factors, error feedback",
        "2501.02379 with 2410.16103, mode by mode",
        _FOLLOWING | {"finder": Power(inertia=0.9)},
        relative_rate=2.0,
    ),
    Recipe(
        "nystrom-tucker-adam",
        "tucker-adam with factors from a small sample of fibres, drawn by the energy of their slices",
        "this package; sampling as in Drineas, Kannan and Mahoney, 2006",
        _FOLLOWING | {"finder": Nystroem(samples=0.02, columns="slices")},
        relative_rate=2.0,
    ),
    Recipe(
        "streaming-tucker-adam",
        "tucker-adam with factors from sketches that every gradient is added to",
        "1904.10951 for the sketch",
        _FOLLOWING | {"finder": StreamingTucker()},
        relative_rate=2.0,
    ),
    Recipe(
        "tt-adam",
        "moments rotated between tensor trains, found by TT-SVD",
        "Oseledets 2011",
        _WITHOUT | {"frame": Trains(), "finder": TrainSVD(inertia=0.9)},
    ),
    Recipe(
        "tt-ice-adam",
        "moments rotated between tensor trains, found by increments",
        "2211.12487",
        _WITHOUT | {"frame": Trains(), "finder": TrainIncrement(inertia=0.9)},
    ),
    Recipe(
        "ht-adam",
        "moments rotated between hierarchical Tucker trees, found by SVD",
        "Grasedyck 2010",
        _WITHOUT | {"frame": Trees(), "finder": TreeSVD(inertia=0.9)},
    ),
    Recipe(
        "ht-rise-adam",
        "moments rotated between hierarchical Tucker trees, found by increments",
        "2412.16544",
        _WITHOUT | {"frame": Trees(), "finder": TreeIncrement(inertia=0.9)},
    ),
    Recipe(
        "muon",
        "orthogonalized momentum with an update of RMS 0.2; one matrix per frequency for complex tensors",
        "2502.16982",
        dict(rule=Muon(bf16=True)),
        full_rank=True,
        relative_rate=4.0,
    ),
    Recipe(
        "dion",
        "orthonormalized updates of low rank by one amortized power iteration, momentum and feedback in one buffer",
        "2504.05295",
        dict(
            view="matrix",
            finder=Amortized(),
            transport=Rotate(),
            rule=Columns(),
            residual=MomentumBuffer(),
            codec=Full(),
            refresh_every=1,
            scale="spectral",
        ),  # fmt: skip
        relative_rate=15.0,
    ),
    Recipe(
        "flora",
        "Adafactor's preconditioner, then momentum in a random subspace that is drawn anew from a seed now and then",
        "2402.03293",
        dict(
            frame=Seeded(),
            finder=RandomProjection(),
            precondition=Factored(),
            transport=Rotate(),
            rule=Momentum(),
            residual=Discard(),
            codec=Full(),
            refresh_every=1000,
            scale="match",
        ),  # fmt: skip
    ),
    Recipe(
        "online-subspace-descent",
        "a step of online PCA at every step, moments left in old coordinates",
        "2408.12857",
        dict(
            finder=Oja(inertia=0.0, rate=0.1, start="exact"),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            refresh_every=1,
            scale=0.25,
        ),  # fmt: skip
        relative_rate=10.0,
    ),
    Recipe(
        "smmf",
        "Adam whose moments are stored as rank-one matrices and signs",
        "2412.08894",
        dict(rule=Scheduled(), moments=RankOne()),
        full_rank=True,
        relative_rate=2.5,
    ),
    Recipe(
        "lion",
        "signs of interpolated momentum",
        "2302.06675",
        dict(rule=Lion(), betas=(0.9, 0.99)),
        relative_rate=0.3,
        full_rank=True,
    ),
    Recipe(
        "adafactor",
        "second moments as a product of the means of slices, clipped updates, momentum",
        "1804.04235",
        dict(rule=Adafactor(), betas=(0.9, 0.999)),
        full_rank=True,
    ),
    Recipe(
        "coap",
        "descent on what the frame loses and how far the momentum disagrees, an SVD now and then, moments left",
        "2412.00071",
        dict(
            finder=Correlation(),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            refresh_every=32,
            scale=1.0,
        ),  # fmt: skip
        relative_rate=2.0,
    ),
    Recipe(
        "dct-adamw",
        "the columns of the cosine transform that hold most, at every step; moments follow them, 8-bit error feedback",
        "2505.17967",
        dict(
            frame=Cosines(),
            finder=CosineSelection(inertia=0.0, norm=1),
            transport=Rotate(),
            residual=Feedback(lazy=False, momentum=False),
            codec=Int8(),
            refresh_every=1,
            scale=1.0,
        ),  # fmt: skip
    ),
    Recipe(
        "shampoo",
        "Kronecker-factored preconditioning of every mode, updates of Adam's length",
        "1802.09568; grafting as in 2309.06497",
        dict(rule=Shampoo(every=10)),
        full_rank=True,
    ),
    Recipe(
        "soap",
        "Adam in the slowly turning eigenbases of Shampoo's factors",
        "2409.11321",
        dict(rule=SOAP(), betas=(0.95, 0.95)),
        full_rank=True,
        relative_rate=3.0,
    ),
    Recipe(
        "low-rank-soap",
        "tucker-adam with SOAP instead of Adam in the core (one-sided for matrices), bases carried along",
        "2409.11321 in the core of 2501.02379",
        _FOLLOWING | {"finder": Power(inertia=0.9), "rule": SOAP(one_sided=True)},
    ),
    Recipe(
        "shampoo-tucker",
        "tucker-adam on gradients that Shampoo's factors have preconditioned in the full space",
        "1802.09568 before 2501.02379",
        _FOLLOWING | {"finder": Power(inertia=0.9), "precondition": Kronecker(every=4)},
    ),
    Recipe(
        "comoving",
        "the default: power iteration (short modes: exact) every 4 steps, moments rotated, feedback; both in 8 bits",
        "this package",
        _FOLLOWING
        | {"finder": Power(inertia=0.9, exact_up_to=32), "codec": Int8(), "moments": "auto", "scale": "auto"},
        relative_rate=3.0,
    ),
)

_PROJECTING = {"finder", "cadence", "transport", "residual", "codec", "bases", "ranks", "budget", "scale", "+ef"}
"""What concerns projected parameters alone."""
_CHOICE = ("dense", "project", "pairs", "experts", "heads")
"""What goes to :func:`comoving.param_groups`."""
_SUFFIXES: dict[str, dict[str, Any]] = {"+ef": {"residual": Feedback()}}


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    return {recipe.name: recipe for recipe in _RECIPES}


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
            ``experts`` and ``heads`` go to :func:`comoving.param_groups`. Parts may be given by name, such as
            ``transport="rotate"``.

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
    method = known[name]
    own = method.options.get("residual", Discard())
    if plus and not isinstance(own, Discard | Feedback):
        raise ValueError(
            f"{recipe!r} is refused: {name} is made by what it does outside the frame, residual {own}, and "
            f"{plus}{suffix} would put error feedback in its place; pass residual= if that is meant"
        )
    check_known(options, [*_options(), *_CHOICE, "lr", "rank"])
    choice = {key: options.pop(key) for key in _CHOICE if key in options}
    own_rank = plain(method.rank_for(rank))
    groups = _groups(model, 1.0 if own_rank is None else own_rank, choice)
    given = {role: part(role, value) for role, value in options.items()}
    if method.full_rank:
        idle = sorted({*given, *(["+ef"] if plus else [])} & _PROJECTING)
        if idle:
            raise ValueError(f"{recipe} has full rank: {', '.join(idle)} would have nothing to act on")
    settings = {**method.options, **_SUFFIXES.get(plus + suffix, {}), **given}
    kind = AdamW if name == "comoving" else LowRankOptimizer
    return kind(groups, lr, **settings)


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
