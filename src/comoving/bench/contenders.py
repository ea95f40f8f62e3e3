"""Which finder fills which frame."""

from dataclasses import dataclass, fields
from typing import Any

from comoving import finders, frames

INERTIA = 0.9
EXACT = "Exact (HOSVD)"
RATES = (0.01, 0.02, 0.05, 0.1, 0.25)


@dataclass(frozen=True)
class Contender:
    """A finder, the layout of its frame, and a name that no other contender has."""

    name: str
    finder: Any
    layout: Any

    @property
    def frame(self) -> str:
        """The layout's name."""
        return type(self.layout).__name__


# Name in tables, finder, its layout, options. Where a finder takes an inertia it is 0.9, unless said.
CONTENDERS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    (EXACT, "Exact", "Modes", {}),
    ("Exact, SVD", "Exact", "Modes", {"method": "svd"}),
    ("Exact, 1 HOOI sweep", "Exact", "Modes", {"sweeps": 1}),
    ("Power", "Power", "Modes", {}),
    ("Power, 2 iterations", "Power", "Modes", {"iterations": 2}),
    ("Randomized", "Randomized", "Modes", {}),
    ("Nystroem", "Nystroem", "Modes", {}),
    ("Nystroem, energy", "Nystroem", "Modes", {"columns": "energy", "decay": 0.99}),
    ("Oja", "Oja", "Modes", {}),
    ("Grassmann", "Grassmann", "Modes", {}),
    ("Correlation", "Correlation", "Modes", {}),
    ("Amortized", "Amortized", "Modes", {}),
    ("IncrementalSVD", "IncrementalSVD", "Modes", {"inertia": 0.0}),
    ("IncrementalSVD, momentum", "IncrementalSVD", "Modes", {}),
    ("CosineSelection", "CosineSelection", "Cosines", {}),
    ("RandomProjection", "RandomProjection", "Seeded", {}),
    ("Standing", "Standing", "Pooled", {}),
    ("RandomWalk", "RandomWalk", "Modes", {}),
    ("Exact, sequential", "Exact", "Modes", {"sequential": True}),
    ("HOOI, warm", "Exact", "Modes", {"sequential": True, "warm": True, "sweeps": 1}),
    ("Randomized, sequential", "Randomized", "Modes", {"sequential": True, "reads": 2}),
    ("Nystroem, slices", "Nystroem", "Modes", {"columns": "slices", "samples": 0.02}),
    ("Nystroem, uniform 2%", "Nystroem", "Modes", {"samples": 0.02}),
    ("StreamingTucker", "StreamingTucker", "Modes", {}),
    ("BlockSelection", "BlockSelection", "SparseModes", {}),
    ("TrainSVD", "TrainSVD", "Trains", {}),
    ("TrainRandomized", "TrainRandomized", "Trains", {}),
    ("TrainIncrement", "TrainIncrement", "Trains", {}),
    ("TreeSVD", "TreeSVD", "Trees", {}),
    ("TreeIncrement", "TreeIncrement", "Trees", {}),
)


def contenders() -> list[Contender]:
    """All of them, Exact first."""
    return [
        Contender(name, _finder(kind, options), getattr(frames, layout)())
        for name, kind, layout, options in CONTENDERS
        if hasattr(finders, kind)
    ]


def sampled() -> list[Contender]:
    """Exact, and Nystroem at each rate of :data:`RATES`, by slices and uniformly."""
    kinds = [
        Contender(f"{columns} {rate:.0%}", _finder("Nystroem", {"samples": rate, "columns": columns}), frames.Modes())
        for columns in ("slices", "uniform")
        for rate in RATES
    ]
    return [Contender(EXACT, _finder("Exact", {}), frames.Modes()), *kinds]


def _finder(kind: str, options: dict[str, Any]) -> Any:
    """Finders without an inertia of their own choice say so by refusing the argument."""
    make = getattr(finders, kind)
    if any(field.name == "inertia" for field in fields(make)):
        options = {"inertia": INERTIA} | options
    return make(**options)
