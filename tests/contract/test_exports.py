"""Every exported part is in the lists that the contract runs over, and every field that can be wrong is checked."""

import re
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest

from comoving import cadence, codecs, finders, frames, precondition, ranks, residual, rules, transport
from comoving.cadence import Growing, Lazy
from comoving.codecs import Int4, Int8, InWeights, RankOne, Root, TopDirections
from comoving.finders import (
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
    RandomWalk,
    StreamingTucker,
    TrainIncrement,
    TrainRandomized,
    TrainSVD,
    TreeIncrement,
    TreeSVD,
)
from comoving.frames import Blocks, Cosines, Modes, Pooled, Seeded, SparseModes, Trains, Trees
from comoving.precondition import Factored, Kronecker
from comoving.ranks import Energy, Fixed, Temperature, Tolerance
from comoving.residual import Channel, Details, Feedback, Fira, MomentumBuffer, Raw, Sign, Sparse, SubsetNorm
from comoving.rules import (
    SOAP,
    SWAN,
    Adafactor,
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
from comoving.transport import Carry, Rotate
from contract.support import (
    APART,
    BOND_FINDERS,
    CADENCES,
    COARSE,
    CODECS,
    DRAWN,
    FINDERS,
    MOVING,
    POSITIVE,
    PRECONDITIONERS,
    RESIDUALS,
    RULES,
    SAMPLED,
    SPARSE,
    STATELESS,
    THIN,
    TRANSPORTS,
)

SAMPLED_LAYOUTS = [layout for _, layout in SAMPLED]
FRAMES = [Modes(), Modes(min_size=2), Blocks(), Trains(), Trees(), *SAMPLED_LAYOUTS, *(layout for _, layout in SPARSE)]
RANKS = [Fixed(), Energy(), Tolerance(minimum=2, maximum=0.5), Temperature(curve="exponential")]
ROLES = {
    "finder": (finders, [*FINDERS, *BOND_FINDERS, *(finder for finder, _ in (*SAMPLED, *SPARSE))], {"Operand"}),
    "cadence": (cadence, CADENCES, set()),
    "transport": (transport, TRANSPORTS, {"Clock", "Overlap", "Slot"}),
    "codec": (codecs, [*CODECS, *DRAWN, *COARSE, *APART, *POSITIVE, InWeights()], set()),
    "residual": (residual, [*RESIDUALS, *MOVING], {"Cores", "Passage", "Update"}),
    "precondition": (precondition, PRECONDITIONERS, set()),
    "rule": (rules, [*RULES, *STATELESS, *THIN], set()),
    "frame": (
        frames,
        FRAMES,
        {
            "ModeFrame",
            "SharedFrame",
            "BondFrame",
            "CosineFrame",
            "SeededFrame",
            "PooledFrame",
            "SparseFrame",
            "Overlap",
            "SparseOverlap",
        },
    ),
    "ranks": (ranks, RANKS, {"Reading"}),
}


MUON = [
    ("decay", 1.0, r"\[0, 1\)"),
    *((field, 2, "True, False") for field in ("nesterov", "ema", "bf16", "normalized")),
    ("method", "qr", "'newton-schulz', 'polar', 'rows'"),
    ("steps", 0, ">= 1"),
    ("coefficients", (1.0, 2.0), "a tuple of three numbers"),
    ("coefficients", "cubic", "'quintic', 'polar-express'"),
    ("scale", "shape", r"\(0, inf\)"),
    ("scale", 0.0, r"\(0, inf\)"),
    ("over", "all", "'auto', 'flat', 'each'"),
    ("before", "both", "'none', 'rows'"),
    ("after", "each", "'none', 'rows', 'columns', 'both'"),
]
PARTS = [part for _, parts, _ in ROLES.values() for part in parts]


@pytest.mark.parametrize("role", ROLES)
def test_every_exported_part_is_in_the_list(role):
    module, parts, helpers = ROLES[role]
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    exported = {n for n in names if is_dataclass(getattr(module, n)) and isinstance(getattr(module, n), type)}
    assert exported - helpers == {type(part).__name__ for part in parts}


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_parts_are_frozen_values(part):
    twin = type(part)(**{f.name: getattr(part, f.name) for f in fields(part)})
    assert twin == part
    assert hash(twin) == hash(part)
    for f in fields(part):
        with pytest.raises(FrozenInstanceError):
            setattr(part, f.name, getattr(part, f.name))
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        part.surplus = 1
    with pytest.raises(TypeError, match="surplus"):
        type(part)(surplus=1)


@pytest.mark.parametrize(
    ("kind", "field", "value", "interval"),
    [
        (Exact, "inertia", 1.0, r"\[0, 1\)"),
        (Exact, "inertia", -0.1, r"\[0, 1\)"),
        (Exact, "inertia", float("nan"), r"\[0, 1\)"),
        (Exact, "sweeps", -1, ">= 0"),
        (Exact, "method", "qr", "'gram', 'svd'"),
        (Exact, "sequential", "first", "True, False"),
        (Exact, "warm", None, "True, False"),
        (Power, "inertia", 1.5, r"\[0, 1\)"),
        (Power, "iterations", 0, ">= 1"),
        (Power, "cold", 0, ">= 1"),
        (Power, "exact_up_to", -1, ">= 0"),
        (Power, "start", "warm", "'random', 'exact'"),
        (Randomized, "inertia", 1.0, r"\[0, 1\)"),
        (Randomized, "oversampling", -1, ">= 0"),
        (Randomized, "reads", 0, ">= 1"),
        (Randomized, "sequential", 2, "True, False"),
        (Randomized, "seed", -1, ">= 0"),
        (Nystroem, "inertia", -0.5, r"\[0, 1\)"),
        (Nystroem, "samples", 0, ">= 1"),
        (Nystroem, "samples", 0.0, r"\(0, inf\)"),
        (Nystroem, "samples", float("inf"), r"\(0, inf\)"),
        (Nystroem, "columns", "norm", "'uniform', 'energy', 'slices'"),
        (Nystroem, "decay", 1.0, r"\[0, 1\)"),
        (Nystroem, "seed", -2, ">= 0"),
        (Oja, "inertia", 1.0, r"\[0, 1\)"),
        (Oja, "rate", 0.0, r"\(0, inf\)"),
        (Oja, "start", "warm", "'random', 'exact'"),
        (Grassmann, "inertia", 1.0, r"\[0, 1\)"),
        *((kind, "rate", 0.0, r"\(0, inf\)") for kind in (Grassmann, RandomWalk)),
        *((kind, "start", "warm", "'random', 'exact'") for kind in (Grassmann, RandomWalk)),
        (RandomWalk, "seed", -1, ">= 0"),
        (Correlation, "rate", 0.0, r"\(0, inf\)"),
        (Correlation, "recalibrate", 0, ">= 1"),
        (Factored, "decay", 0.0, r"\(0, 1\]"),
        (Factored, "floor", 0.0, r"\(0, inf\)"),
        (Factored, "clip", 0.0, r"\(0, inf\)"),
        (Momentum, "corrected", 2, "True, False"),
        (Momentum, "nesterov", 2, "True, False"),
        (IncrementalSVD, "inertia", 1.0, r"\[0, 1\)"),
        (IncrementalSVD, "forgetting", 0.0, r"\(0, 1\]"),
        (IncrementalSVD, "forgetting", 1.1, r"\(0, 1\]"),
        (IncrementalSVD, "add", 0, ">= 1"),
        (IncrementalSVD, "seed", -1, ">= 0"),
        (CosineSelection, "inertia", 1.0, r"\[0, 1\)"),
        (CosineSelection, "norm", 3, "1, 2"),
        (Cosines, "min_size", 1, ">= 2"),
        (Seeded, "min_size", 0, ">= 2"),
        (Pooled, "min_size", 1, ">= 2"),
        (Seeded, "stored", "no", "True"),
        (StreamingTucker, "decay", 0.0, r"\(0, 1\]"),
        (StreamingTucker, "decay", float("nan"), r"\(0, 1\]"),
        (StreamingTucker, "oversampling", -1, ">= 0"),
        (StreamingTucker, "newest", -0.5, r"\[0, inf\)"),
        (StreamingTucker, "seed", -1, ">= 0"),
        *((kind, "block", 7, ">= 8") for kind in (Int4, Int8, Root)),
        (Int4, "table", "log", "'linear', 'normal'"),
        (Int8, "table", "normal", "'linear', 'dynamic'"),
        (Root, "table", "normal", "'linear', 'dynamic'"),
        (TopDirections, "rank", 1.0, r"\[0, 1\)"),
        (TopDirections, "block", 7, ">= 8"),
        (TopDirections, "mu", 0.0, r"\(0, inf\)"),
        *((kind, "rounding", "up", "'nearest', 'stochastic'") for kind in (Int4, Int8, Root)),
        (Root, "bits", 5, "8, 4"),
        (RankOne, "signed", 2, "True, False"),
        (InWeights, "codec", Int8(rounding="stochastic"), "rounding='nearest'"),
        (Amortized, "iterations", 0, ">= 1"),
        (MomentumBuffer, "decay", 1.1, r"\[0, 1\]"),
        *((Lion, field, 1.0, r"\[0, 1\)") for field in ("b1", "b2")),
        *((kind, *row) for kind in (Muon, NorMuon) for row in MUON),
        (NorMuon, "decay2", 1.0, r"\[0, 1\)"),
        *((kind, "rank", 0, ">= 1") for kind in (LowRankAdam, LowRankMuon)),
        *((kind, "rank", 1.5, r"\(0, 1\]") for kind in (LowRankAdam, LowRankMuon)),
        (LowRankAdam, "limit", 0.0, r"\(0, inf\)"),
        (LowRankAdam, "newest", 2, "True, False"),
        (LowRankMuon, "inner", Adafactor(), "be a Muon"),
        (Adafactor, "decay", 0.0, r"\[-inf, 0\)"),
        (Adafactor, "floor", -1e-30, r"\[0, inf\)"),
        (Adafactor, "clip", 0.0, r"\(0, inf\)"),
        (Adafactor, "average", "both", "'gradient', 'update'"),
        (Normalized, "decay", 1.0, r"\[0, 1\)"),
        (Normalized, "nesterov", 2, "True, False"),
        (Normalized, "passes", 0, ">= 1"),
        (Normalized, "first", "both", "'rows', 'columns'"),
        (Normalized, "threshold", -0.1, r"\[0, inf\)"),
        (Normalized, "scale", 0.0, r"\(0, inf\)"),
        (SWAN, "steps", 0, ">= 1"),
        (SWAN, "beta", 0.0, r"\(0, 0.86"),
        (SWAN, "scale", 0.0, r"\(0, inf\)"),
        (SWAN, "over", "all", "'auto', 'flat', 'each'"),
        (Scheduled, "growth", 0.0, r"\(0, 1\]"),
        (Scheduled, "decay", 0.1, r"\[-inf, 0\)"),
        (Columns, "along", "both", "'auto', 'left', 'right'"),
        (Columns, "orthonormal", 2, "True, False"),
        *((kind, "statistics", "move", "'carry', 'keep', 'reset'") for kind in (Rotate, Carry)),
        *((kind, "decay", 1.0, r"\[0, 1\)") for kind in (Shampoo, SOAP, Kronecker)),
        *((kind, "exponent", 0.0, r"\(0, inf\)") for kind in (Shampoo, Kronecker)),
        *((kind, "eps", 0.0, r"\(0, inf\)") for kind in (Shampoo, Kronecker)),
        *((kind, "every", 0, ">= 1") for kind in (Shampoo, SOAP, Kronecker)),
        *((kind, "max_size", 0, ">= 1") for kind in (Shampoo, SOAP, Kronecker)),
        *((kind, "root", "svd", "'eigh', 'newton'") for kind in (Shampoo, Kronecker)),
        (SOAP, "one_sided", 2, "True, False"),
        (Shampoo, "average", 2, "True, False"),
        (Shampoo, "graft", "adam", "True, False"),
        (Kronecker, "above", "matrix", "'diagonal', 'none'"),
        (Kronecker, "norm_matched", None, "True, False"),
        (Modes, "min_size", 1, ">= 2"),
        (Feedback, "lazy", 2, "True, False"),
        (Feedback, "decay", 0.0, r"\(0, 1\]"),
        (Feedback, "decay", 1.1, r"\(0, 1\]"),
        (Feedback, "window", 0, ">= 1"),
        *((kind, "per", "row", "'channel', 'tensor'") for kind in (Fira, Channel)),
        *((kind, "growth", 0.9, r"\[1, inf\)") for kind in (Fira, Channel)),
        (Raw, "rate", 0.0, r"\(0, inf\)"),
        (Details, "growth", 0.9, r"\[1, inf\)"),
        (SubsetNorm, "decay", 1.0, r"\[0, 1\)"),
        *((kind, "limit", 0.0, r"\(0, inf\)") for kind in (Details, SubsetNorm)),
        (Sign, "rate", 0.0, r"\(0, inf\)"),
        (Sign, "floor", 1.0, r"\[0, 1\)"),
        (Sparse, "fraction", 0.0, r"\(0, 1\)"),
        (Sparse, "fraction", 1.0, r"\(0, 1\)"),
        (Sparse, "choose", "largest", "'top', 'random', 'probabilistic'"),
        (Sparse, "first", 2, "True, False"),
        (Sparse, "scale", 0.0, r"\(0, inf\)"),
        (Sparse, "statistics", "move", "'carry', 'keep', 'reset'"),
        (Sparse, "rule", SOAP(), "elementwise, without statistics of modes"),
        (Sparse, "rule", Muon(), "elementwise"),
        (Sparse, "seed", -1, ">= 0"),
        (Feedback, "momentum", 2, "True, False"),
        (Feedback, "own", 2, "True, False"),
        (Blocks, "mode", -1, ">= 0"),
        (BlockSelection, "inner", BlockSelection(), "fills a ModeFrame"),
        (Delayed, "inner", Delayed(), "at once"),
        (Delayed, "by", 0, ">= 1"),
        (Lazy, "threshold", 1.5, r"\[0, 1\]"),
        (Lazy, "patience", 0, ">= 1"),
        (Lazy, "growth", 1, ">= 2"),
        (Growing, "base", 0.5, r"\[1, inf\)"),
        (SparseModes, "block", 0, ">= 1"),
        (SparseModes, "density", 0.0, r"\(0, 1\]"),
        (SparseModes, "density", 1.1, r"\(0, 1\]"),
        (SparseModes, "min_size", 1, ">= 2"),
        (Trains, "bond", 0, ">= 1"),
        (Trees, "bond", 0, ">= 1"),
        (Trees, "tree", (0, 2), "nested pairs"),
        *((kind, "inertia", 1.0, r"\[0, 1\)") for kind in (TrainSVD, TrainRandomized, TrainIncrement)),
        *((kind, "inertia", 1.0, r"\[0, 1\)") for kind in (TreeSVD, TreeIncrement)),
        (TrainSVD, "method", "qr", "'gram', 'svd'"),
        (TreeSVD, "method", "qr", "'gram', 'svd'"),
        (TrainRandomized, "oversampling", -1, ">= 0"),
        (TrainRandomized, "reads", 3, "1, 2"),
        (TrainRandomized, "seed", -1, ">= 0"),
        *((kind, "columns", 0, ">= 1") for kind in (TrainIncrement, TreeIncrement)),
        *((kind, "add", 0, ">= 1") for kind in (TrainIncrement, TreeIncrement)),
        *((kind, "seed", -1, ">= 0") for kind in (TrainIncrement, TreeIncrement)),
        (Blocks, "inner", Blocks(), "of one frame"),
        *[(kind, "minimum", 0, ">= 1") for kind in (Energy, Tolerance, Temperature)],
        *[(kind, "maximum", 1.5, r"\(0, 1\]") for kind in (Energy, Tolerance, Temperature)],
        *[(kind, "step", 0, ">= 1") for kind in (Energy, Tolerance, Temperature)],
        (Energy, "minimum", 0.0, r"\(0, 1\]"),
        (Energy, "low", 1.0, r"\[0, 1\)"),
        (Energy, "high", 0.5, r"\(0.5, 1\]"),
        (Tolerance, "error", 0.0, r"\(0, 1\)"),
        (Tolerance, "margin", 1.0, r"\(0, 1\)"),
        (Temperature, "start", 0.9, r"\[1, inf\)"),
        (Temperature, "end", 1.1, r"\(0, 1\]"),
        (Temperature, "steps", 0, ">= 1"),
        (Temperature, "curve", "linear", "'cosine', 'exponential'"),
        (Temperature, "patience", 0, ">= 1"),
    ],
)
def test_a_value_outside_its_interval_is_named_with_it(kind, field, value, interval):
    with pytest.raises(ValueError, match=f"{field} must .*{interval}.*{re.escape(str(value))}"):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(Exact, "sweeps", 1.0), (Exact, "sweeps", True), (Exact, "inertia", "0.5"), (Power, "iterations", None),
     (Nystroem, "samples", "10%"), (Nystroem, "samples", True), (StreamingTucker, "oversampling", 8.0),
     (Randomized, "seed", 1.0), (Exact, "inertia", None), (Delayed, "by", 1.0),
     (Power, "inertia", True), (Int8, "block", 64.0), (Modes, "min_size", "8"),
     (Energy, "minimum", "8"), (Energy, "step", 8.0), (Energy, "low", None), (Tolerance, "error", "0.1"),
     (Temperature, "steps", 10.0), (Temperature, "patience", True),
     (Feedback, "window", 2.0), (Feedback, "decay", None), (Fira, "growth", "1"), (Sparse, "rule", "adam"),
     (Sparse, "fraction", True), (Sparse, "seed", 1.0), (Sign, "rate", None),
     (Shampoo, "every", 2.0), (SOAP, "decay", "b2"), (Kronecker, "exponent", "1/4"), (Kronecker, "max_size", True)],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(kind, field, value):
    with pytest.raises(TypeError, match=f"{field} must be .*{value}"):
        kind(**{field: value})


@pytest.mark.parametrize("kind", [Shampoo, Kronecker])
def test_newton_takes_integer_roots_only(kind):
    with pytest.raises(ValueError, match="exponent must be 1/p .*'newton', got 0.3"):
        kind(exponent=0.3, root="newton")
    assert kind(exponent=1 / 3, root="newton").exponent == 1 / 3


def test_every_field_is_covered():
    """A new field of a part needs a row above."""
    marks = test_a_value_outside_its_interval_is_named_with_it.pytestmark[0].args[1]
    assert {(type(part), f.name) for part in PARTS for f in fields(part)} == {
        (kind, field) for kind, field, *_ in marks
    }


@pytest.mark.parametrize(
    ("rank", "error", "says"),
    [
        (0, ValueError, ">= 1, got 0"),
        (-3, ValueError, ">= 1, got -3"),
        (0.0, ValueError, r"\(0, 1\], got 0.0"),
        (1.5, ValueError, r"\(0, 1\], got 1.5"),
        (float("nan"), ValueError, r"\(0, 1\], got nan"),
        ("4", TypeError, "'4'"),
        (True, TypeError, "True"),
        ((2,), ValueError, r"\(2,\) has 1 entries.*\(6, 8\) needs 2"),
        ((2, 9), ValueError, "9 directions in mode 1, which has only 8"),
        ((0, None), ValueError, r">= 1 or None, got 0"),
        ((2.0, None), TypeError, "2.0"),
    ],
    ids=str,
)
def test_ranks_that_do_not_fit_are_refused(rank, error, says):
    with pytest.raises(error, match=says):
        Modes().ranks((6, 8), rank)
