"""Low-rank methods for tensors of any order."""

from ..codecs import Full
from ..finders import (
    Exact,
    Nystroem,
    Power,
    StreamingTucker,
    TrainIncrement,
    TrainSVD,
    TreeIncrement,
    TreeSVD,
)
from ..frames import Trains, Trees
from ..precondition import Kronecker
from ..residual import Discard, Sparse
from ..rules import SOAP
from ..transport import Keep
from .following import FOLLOWING
from .recipe import Recipe

_WITHOUT = FOLLOWING | {"residual": Discard()}

RECIPES = (
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
        FOLLOWING | {"finder": Power(inertia=0.9)},
        relative_rate=2.0,
    ),
    Recipe(
        "nystrom-tucker-adam",
        "tucker-adam with factors from a small sample of fibres, drawn by the energy of their slices",
        "this package; sampling as in Drineas, Kannan and Mahoney, 2006",
        FOLLOWING | {"finder": Nystroem(samples=0.02, columns="slices")},
        relative_rate=2.0,
    ),
    Recipe(
        "streaming-tucker-adam",
        "tucker-adam with factors from sketches that every gradient is added to",
        "1904.10951 for the sketch",
        FOLLOWING | {"finder": StreamingTucker()},
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
        "low-rank-soap",
        "tucker-adam with SOAP instead of Adam in the core (one-sided for matrices), bases carried along",
        "2409.11321 in the core of 2501.02379",
        FOLLOWING | {"finder": Power(inertia=0.9), "rule": SOAP(one_sided=True)},
    ),
    Recipe(
        "shampoo-tucker",
        "tucker-adam on gradients that Shampoo's factors have preconditioned in the full space",
        "1802.09568 before 2501.02379",
        FOLLOWING | {"finder": Power(inertia=0.9), "precondition": Kronecker(every=4)},
    ),
)
