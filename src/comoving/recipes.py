"""Every method as a composition of parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from .adamw import AdamW
from .codecs import Full, Int8
from .finders import (
    Exact,
    NystroemTucker,
    Power,
    StreamingTucker,
    TrainIncrement,
    TrainSVD,
    TreeIncrement,
    TreeSVD,
)
from .frames import Trains, Trees
from .frames.base import Rank
from .groups import param_groups
from .optimizer import LowRankOptimizer
from .parts import part
from .precondition import Kronecker
from .residual import Discard, Feedback
from .rules import SOAP, Shampoo
from .transport import Keep, Rotate


@dataclass(frozen=True)
class Recipe:
    """A method: what it is, where it is published, and what it is made of.

    Args:
        name: its name in :func:`build`.
        summary: one line.
        paper: the arXiv id, or where else it is described.
        options: hyper-parameters of :class:`comoving.LowRankOptimizer` that make the method.
        relative_rate: its usual learning rate as a multiple of AdamW's.
        full_rank: whether it ignores ``rank``.
    """

    name: str
    summary: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=lambda: {})
    relative_rate: float = 1.0
    full_rank: bool = False

    @property
    def parts(self) -> dict[str, str]:
        """Role -> part, in words, of what the recipe sets."""
        return {role: _in_words(value) for role, value in self.options.items()}


def _in_words(part: Any) -> str:
    """A part without the fields that have their default value."""
    if not hasattr(part, "__dataclass_fields__"):
        return str(part)
    set_fields = [f"{f.name}={getattr(part, f.name)!r}" for f in fields(part) if getattr(part, f.name) != f.default]
    return f"{type(part).__name__}({', '.join(set_fields)})"


_FOLLOWING: dict[str, Any] = dict(transport=Rotate(), residual=Feedback(), codec=Full(), refresh_every=4, scale="match")
"""What the recipes share whose moments follow the frame, with error feedback; a "+ef" makes no difference to them."""
_WITHOUT = _FOLLOWING | {"residual": Discard()}

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
        relative_rate=10.0,
    ),
    Recipe(
        "ldadam",
        "power iteration at every step, moments rotated along, generalized error feedback",
        "2410.16103",
        dict(
            finder=Power(momentum=0.908, start="exact"),
            transport=Rotate(),
            residual=Feedback(window=False),
            codec=Full(),
            refresh_every=1,
            scale=1.0,
            betas=(0.908, 0.99),
        ),  # fmt: skip
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
        ),  # fmt: skip
    ),
    Recipe(
        "tucker-adam",
        "update-aware Tensor-GaLore: moments rotated through every change of factors, error feedback",
        "2501.02379 with 2410.16103, mode by mode",
        _FOLLOWING | {"finder": Power(momentum=0.9)},
    ),
    Recipe(
        "nystrom-tucker-adam",
        "tucker-adam with factors from a small sample of fibres, drawn by the energy of their slices",
        "this package; sampling as in Drineas, Kannan and Mahoney, 2006",
        _FOLLOWING | {"finder": NystroemTucker()},
    ),
    Recipe(
        "streaming-tucker-adam",
        "tucker-adam with factors from sketches that every gradient is added to",
        "1904.10951 for the sketch",
        _FOLLOWING | {"finder": StreamingTucker()},
    ),
    Recipe(
        "tt-adam",
        "moments rotated between tensor trains, found by TT-SVD",
        "Oseledets 2011",
        _WITHOUT | {"frame": Trains(), "finder": TrainSVD(momentum=0.9)},
    ),
    Recipe(
        "tt-ice-adam",
        "moments rotated between tensor trains, found by increments",
        "2211.12487",
        _WITHOUT | {"frame": Trains(), "finder": TrainIncrement(momentum=0.9)},
    ),
    Recipe(
        "ht-adam",
        "moments rotated between hierarchical Tucker trees, found by SVD",
        "Grasedyck 2010",
        _WITHOUT | {"frame": Trees(), "finder": TreeSVD(momentum=0.9)},
    ),
    Recipe(
        "ht-rise-adam",
        "moments rotated between hierarchical Tucker trees, found by increments",
        "2412.16544",
        _WITHOUT | {"frame": Trees(), "finder": TreeIncrement(momentum=0.9)},
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
    ),
    Recipe(
        "low-rank-soap",
        "tucker-adam with SOAP instead of Adam in the core (one-sided for matrices), bases carried along",
        "2409.11321 in the core of 2501.02379",
        _FOLLOWING | {"finder": Power(momentum=0.9), "rule": SOAP(one_sided=True)},
    ),
    Recipe(
        "shampoo-tucker",
        "tucker-adam on gradients that Shampoo's factors have preconditioned in the full space",
        "1802.09568 before 2501.02379",
        _FOLLOWING | {"finder": Power(momentum=0.9), "precondition": Kronecker(every=4)},
    ),
    Recipe(
        "comoving",
        "the default: warm power iteration every 4 steps, moments rotated along, 8-bit error feedback",
        "this package",
        _FOLLOWING | {"finder": Power(momentum=0.9), "codec": Int8(), "scale": "auto"},
        relative_rate=2.0,
    ),
)

_SUFFIXES: dict[str, dict[str, Any]] = {"+ef": {"residual": Feedback()}}


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    return {recipe.name: recipe for recipe in _RECIPES}


def build(recipe: str, model: nn.Module, lr: float = 1e-3, rank: Rank = 0.25, **options: Any) -> LowRankOptimizer:
    """An optimizer for a model, by the name of its method.

    Args:
        recipe: a name of :func:`recipes`, optionally with the suffix "+ef" for error feedback.
        model: the model; :func:`comoving.param_groups` chooses what is projected.
        lr: learning rate.
        rank: of the projected parameters; ignored by full-rank recipes.
        **options: more hyper-parameters, over the recipe's own; ``dense``, ``project``, ``pairs``,
            ``experts`` and ``heads`` go to :func:`comoving.param_groups`. Parts may be given by name, such as
            ``transport="rotate"``.

    Raises:
        ValueError: an unknown recipe or suffix, or a value outside its interval.
        TypeError: an unknown hyper-parameter.
    """
    name, plus, suffix = recipe.partition("+")
    known = recipes()
    if name not in known or (plus and plus + suffix not in _SUFFIXES):
        raise ValueError(
            f"unknown recipe {recipe!r}; known are {', '.join(known)}, with suffixes {', '.join(_SUFFIXES)}"
        )
    method = known[name]
    choice = {key: options.pop(key) for key in ("dense", "project", "pairs", "experts", "heads") if key in options}
    groups = param_groups(model, rank=1.0 if method.full_rank else rank, **choice)
    given = {role: part(role, value) for role, value in options.items()}
    settings = {**method.options, **_SUFFIXES.get(plus + suffix, {}), **given}
    kind = AdamW if name == "comoving" else LowRankOptimizer
    return kind(groups, lr, **settings)
