"""Low-rank methods of 2025 and 2026 that walk, sample or orthogonalize in their subspace."""

from typing import Any

from ..codecs import Full
from ..finders import Grassmann, Randomized, RandomProjection, RandomWalk
from ..frames import Seeded
from ..residual import Fira, Raw
from ..rules import Muon
from ..transport import Rotate
from .recipe import Recipe

_RECOVERING: dict[str, Any] = dict(
    transport=Rotate(), residual=Fira(), codec=Full(), refresh_every=200, scale=0.25
)  # fmt: skip
"""What the recipes share whose moments are projected along, with the rest of the gradient at Adam's scale."""

RECIPES = (
    Recipe(
        "sumo",
        "momentum in a frame of a randomized SVD, turned along with it and orthogonalized by an SVD; the rest of the "
        "gradient as it is",
        "2505.24749",
        dict(
            finder=Randomized(inertia=0.0),
            transport=Rotate(),
            rule=Muon(nesterov=False, method="polar"),
            residual=Raw(),
            codec=Full(),
            refresh_every=200,
            scale=1.0,
        ),  # fmt: skip
        relative_rate=4.0,
    ),
    Recipe(
        "subtrack",
        "a step along a geodesic of the Grassmann manifold, of one direction, towards what the frame loses; moments "
        "projected along, the rest of the gradient at Adam's scale (SubTrack++)",
        "2502.01586",
        _RECOVERING | dict(finder=Grassmann(rate=10.0)),
        relative_rate=20.0,
    ),
    Recipe(
        "grasswalk",
        "subtrack with random steps on the Grassmann manifold",
        "2510.01878",
        _RECOVERING | dict(finder=RandomWalk()),
        relative_rate=20.0,
    ),
    Recipe(
        "grassjump",
        "subtrack in a new random frame each time",
        "2510.01878",
        _RECOVERING | dict(frame=Seeded(stored=True), finder=RandomProjection()),
        relative_rate=5.0,
    ),
)
