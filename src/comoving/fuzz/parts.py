"""Parts with drawn options, and compositions of them that mostly make sense."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from ..cadence import Growing, Lazy
from ..codecs import BFloat16, Int4, Int8, RankOne, TopDirections
from ..finders import (
    Amortized,
    BlockSelection,
    Correlation,
    CosineSelection,
    Delayed,
    Exact,
    Grassmann,
    IncrementalSVD,
    Nystroem,
    Oja,
    Power,
    Randomized,
    RandomProjection,
    RandomWalk,
    Standing,
    StreamingTucker,
    TrainIncrement,
    TrainRandomized,
    TrainSVD,
    TreeIncrement,
    TreeSVD,
)
from ..frames import Cosines, Modes, Pooled, Seeded, SparseModes, Trains, Trees
from ..precondition import Factored, Kronecker
from ..ranks import Energy, Temperature, Tolerance
from ..residual import Channel, Details, Discard, Feedback, Fira, Folded, MomentumBuffer, Raw, Sign, Sparse, SubsetNorm
from ..rules import (
    SOAP,
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
    Scheduled,
    Shampoo,
)
from ..transport import Carry, Keep, Reset, Rotate

__all__ = ["composition", "pick", "shown"]

Draw = Callable[[Random], Any]

_MOMENTA = (0.0, 0.5, 0.9)


def _flag(r: Random) -> bool:
    return r.random() < 0.5


MODE_FINDERS: tuple[Draw, ...] = (
    lambda r: Exact(r.choice(_MOMENTA), r.choice((0, 1, 2)), r.choice(("gram", "svd")), _flag(r)),
    lambda r: Exact(r.choice(_MOMENTA), r.choice((1, 2)), sequential=_flag(r), warm=True),
    lambda r: Power(
        r.choice(_MOMENTA), r.choice((1, 2)), r.choice(("random", "exact")), exact_up_to=r.choice((0, 8, 32))
    ),
    lambda r: Randomized(r.choice(_MOMENTA), r.choice((0, 2, 8)), r.choice((1, 2, 3, 4)), _flag(r), r.randrange(4)),
    lambda r: Nystroem(
        r.choice(_MOMENTA), r.choice((1.0, 2.0, 16, 0.02, 0.5)), r.choice(("uniform", "energy", "slices"))
    ),
    lambda r: Amortized(r.choice((1, 2))),
    lambda r: Oja(r.choice(_MOMENTA), r.choice((0.1, 1.0)), r.choice(("random", "exact"))),
    lambda r: Grassmann(r.choice(_MOMENTA), r.choice((None, 0.1, 10.0)), r.choice(("random", "exact"))),
    lambda r: RandomWalk(r.choice((0.1, 1.0)), r.choice(("random", "exact")), r.randrange(4)),
    lambda r: Correlation(r.choice((0.1, 1.0)), r.choice((1, 2, 5))),
    lambda r: IncrementalSVD(r.choice(_MOMENTA), r.choice((0.5, 0.9, 1.0)), r.choice((1, 8))),
    lambda r: StreamingTucker(r.choice((0.5, 0.9, 1.0)), r.choice((0, 2, 8)), r.choice((0.0, 1.0))),
)
WHOLE_FINDERS: tuple[Draw, ...] = (
    *MODE_FINDERS,
    lambda r: Delayed(r.choice((Power(), Power(0.0), Exact(), Amortized(), Randomized())), r.choice((1, 1, 2, 3))),
)
"""With those that stand inside no other."""
BOND_FINDERS: tuple[Draw, ...] = (
    lambda r: TrainSVD(r.choice(_MOMENTA), r.choice(("gram", "svd"))),
    lambda r: TrainRandomized(r.choice(_MOMENTA), r.choice((0, 8)), r.choice((1, 2))),
    lambda r: TrainIncrement(r.choice(_MOMENTA), r.choice((2, 8)), r.choice((None, 1, 2))),
    lambda r: TreeSVD(r.choice(_MOMENTA)),
    lambda r: TreeIncrement(r.choice(_MOMENTA)),
)
RULES: tuple[Draw, ...] = (
    lambda r: Adam(),
    lambda r: Adam(),
    lambda r: Momentum(_flag(r)),
    lambda r: Scheduled(r.choice((0.9, 0.999, 1.0)), r.choice((-0.5, -0.8))),
    lambda r: Adafactor(
        r.choice((-0.8, None)), r.choice((1e-30, 0.0)), r.choice((1.0, 1.0, None)), r.choice(("gradient", "update"))
    ),
    lambda r: Lion(r.choice((None, 0.8)), r.choice((None, 0.9))),
    lambda r: Muon(
        r.choice((0.9, 0.95)),
        _flag(r),
        _flag(r),
        r.choice(("newton-schulz", "newton-schulz", "polar", "rows")),
        scale=r.choice(("match", "spectral", 0.5)),
        over=r.choice(("auto", "flat", "each")),
        bf16=_flag(r),
        before=r.choice(("none", "none", "rows")),
        after=r.choice(("none", "none", "rows", "columns", "both")),
        normalized=r.random() < 0.2,
    ),  # fmt: skip
    lambda r: NorMuon(0.9, _flag(r), scale=r.choice(("match", "spectral", 0.5)), bf16=_flag(r), decay2=0.8),
    lambda r: Columns(r.choice(("auto", "left", "right"))),
    lambda r: Normalized(
        r.choice((0.9, 0.95)),
        _flag(r),
        r.choice((1, 2, 10, 11)),
        r.choice(("rows", "columns")),
        r.choice((0.0, 1e-3, 0.5)),
        r.choice((1.0, 0.18)),
    ),  # fmt: skip
    lambda r: AdamS(),
    lambda r: Shampoo(
        r.choice((0.9, 0.999)),
        _flag(r),
        r.choice((None, None, 0.5)),
        r.choice((1e-12, 1e-6)),
        r.choice((1, 3, 10)),
        r.choice((4, 2048)),
        r.choice(("eigh", "newton")),
        r.random() < 0.8,
    ),  # fmt: skip
    lambda r: SOAP(r.choice((None, 0.8)), r.choice((1, 2, 3, 10)), r.choice((4, 2048)), _flag(r)),
    lambda r: SOAP(every=r.choice((1, 2, 5, 10))),
)
THIN: dict[str, Draw] = {
    "lora-pre": lambda r: LowRankAdam(r.choice((1, 2, 0.1, 0.25, 1.0)), _flag(r), r.choice((5.0, 5.0, 1.0, None))),
    "lora-pre-muon": lambda r: LowRankMuon(r.choice((1, 2, 0.1, 0.25, 1.0)), Muon(r.choice((0.9, 0.95)), _flag(r))),
}
"""Rules of whole frames alone, by the recipe that is made of one."""
PRECONDITIONERS: tuple[Draw, ...] = (
    lambda r: Factored(r.choice((0.5, 0.8, 1.0)), r.choice((1e-30, 1e-6)), r.choice((1.0, 0.5, None))),
    lambda r: Kronecker(
        r.choice((0.5, 0.99)),
        r.choice((None, 0.5)),
        r.choice((1e-12, 1e-3)),
        r.choice((1, 2, 4)),
        r.choice((4, 2048)),
        r.choice(("diagonal", "none")),
        r.choice(("eigh", "newton")),
        r.random() < 0.8,
    ),  # fmt: skip
)
RESIDUALS: tuple[Draw, ...] = (
    lambda r: Feedback(_flag(r), r.choice((1.0, 0.7)), r.choice((None, 3)), _flag(r)),
    lambda r: Feedback(_flag(r)),
    lambda r: Feedback(decay=r.choice((1.0, 0.7)), window=r.choice((None, 3)), momentum=_flag(r), own=True),
    lambda r: Fira(r.choice(("channel", "tensor")), r.choice((1.01, 1.01, 1.5, None))),
    lambda r: Channel(r.choice(("channel", "tensor")), r.choice((1.01, 1.01, 1.5, None))),
    lambda r: Sign(r.choice((1.0, 0.3))),
    lambda r: Raw(r.choice((1.0, 0.3))),
    lambda r: Sparse(
        r.choice((0.05, 0.2)),
        r.choice(("top", "random", "probabilistic")),
        _flag(r),
        r.choice((1.0, 0.5)),
        r.choice(("carry", "keep", "reset")),
        r.choice((Adam(), Lion(), Scheduled())),
    ),  # fmt: skip
    lambda r: MomentumBuffer(r.choice((0.5, 0.95))),
    lambda r: Folded(),
    lambda r: Details(r.choice((1.01, 1.5, None)), r.choice((1.0, 10.0, 10.0, None))),
    lambda r: SubsetNorm(r.choice((None, 0.9)), r.choice((1.0, 10.0, 10.0, None))),
)
TRANSPORTS: tuple[Draw, ...] = (
    lambda r: Keep(),
    lambda r: Reset(),
    lambda r: Rotate(r.choice(("carry", "keep", "reset"))),
    lambda r: Rotate(),
    lambda r: Carry(r.choice(("carry", "keep", "reset"))),
    lambda r: Carry(),
)
CODECS: tuple[Draw, ...] = (
    lambda r: BFloat16(),
    lambda r: Int8(r.choice((8, 256)), r.choice(("linear", "dynamic")), r.choice(("nearest", "stochastic"))),
    lambda r: Int8(),
    lambda r: Int4(r.choice((8, 64)), r.choice(("linear", "normal")), r.choice(("nearest", "stochastic"))),
    lambda r: RankOne(),
    lambda r: TopDirections(r.choice((0.0, 1 / 16, 0.4)), r.choice((8, 256)), r.choice((1.0, 255.0))),
)
CADENCES: tuple[Draw, ...] = (
    lambda r: Growing(r.choice((1.0, 1.2, 2.0))),
    lambda r: Lazy(r.choice((0.0, 0.4, 0.9)), r.choice((1, 2, 5)), r.choice((2, 3))),
)
POLICIES: tuple[Draw, ...] = (
    lambda r: Energy(r.choice((0.3, 0.5)), r.choice((0.8, 0.95)), step=r.choice((1, 2, 8))),
    lambda r: Tolerance(r.choice((0.1, 0.3)), r.choice((0.5, 0.8)), step=r.choice((1, 2, 8))),
    lambda r: Temperature(steps=r.choice((5, 20)), step=r.choice((1, 2, 8))),
)


def composition(r: Random) -> dict[str, Any]:
    """Parts for :class:`comoving.LowRankOptimizer`, most of them by chance; few of the results are refused."""
    rule = r.choice(RULES)(r)
    modal = any(slot.mode >= 0 or slot.turned_by for slot in rule.slots((8, 8)))
    frame, finder = _subspace(r, modal)
    transport = r.choice(TRANSPORTS)(r)
    if isinstance(rule, Scheduled):
        transport = r.choice((Keep(), Reset()))
    residual = r.choice(RESIDUALS)(r) if r.random() < 0.75 else Discard()
    while (
        (isinstance(residual, Feedback) and not rule.linear)
        or (isinstance(residual, Sparse) and isinstance(transport, Reset) and residual.statistics != "reset")
        or (residual.reads and (rule != Adam() or not hasattr(frame.makes, "lift_squares")))
    ):
        residual = r.choice(RESIDUALS)(r)
    while finder.inertia > 0 and not rule.linear:
        frame, finder = _subspace(r, modal)
    parts = {"frame": frame, "finder": finder, "transport": transport, "rule": rule, "residual": residual}
    if r.random() < 0.25:
        parts["precondition"] = r.choice(PRECONDITIONERS)(r)
    if r.random() < 0.4:
        parts["codec"] = r.choice(CODECS)(r)
    if r.random() < 0.35 and not rule.definite:
        parts["moments"] = r.choice(CODECS)(r)
    if r.random() < 0.25 and isinstance(frame, Modes | SparseModes) and type(frame) not in (Cosines, Seeded, Pooled):
        parts["bases"] = r.choice(CODECS[:-2])(r)
    resizes = transport.resizes and not (isinstance(rule, SOAP | Shampoo) and rule.max_size < 40)
    if r.random() < 0.25 and type(frame) is Modes and resizes:
        parts["ranks"] = r.choice(POLICIES)(r)
    if r.random() < 0.25:
        cadence = r.choice(CADENCES)(r)
        if not cadence.compares or type(frame).makes in cadence.compares:
            parts["cadence"] = cadence
    return parts


def _subspace(r: Random, modal: bool) -> tuple[Any, Any]:  # noqa: PLR0911  (one case a layout)
    """A frame, and a finder that fills it; ``modal`` rules need modes."""
    kind = r.choices(("modes", "cosines", "seeded", "pooled", "sparse", "trains", "trees"), (8, 1, 1, 1, 1, 1, 1))[0]
    if modal and kind in {"sparse", "trains", "trees"}:
        kind = "modes"
    match kind:
        case "cosines":
            return Cosines(), CosineSelection(r.choice(_MOMENTA), r.choice((1, 2)))
        case "seeded":
            return Seeded(stored=_flag(r)), RandomProjection()
        case "pooled":
            return Pooled(r.choice((2, 4, 8))), Standing()
        case "sparse":
            return SparseModes(r.choice((1, 2, 3)), r.choice((0.3, 0.5, 1.0))), BlockSelection(
                r.choice(MODE_FINDERS)(r)
            )
        case "trains":
            return Trains(), r.choice(BOND_FINDERS)(r)
        case "trees":
            return Trees(), r.choice(BOND_FINDERS)(r)
        case _:
            return Modes(r.choice((2, 4, 8))), r.choice(WHOLE_FINDERS)(r)


def shown(options: Mapping[str, Any]) -> str:
    """Options as they would be written in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def pick(r: Random, weighted: Sequence[tuple[Any, float]]) -> Any:
    """One of some values, by their weights."""
    return r.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]
