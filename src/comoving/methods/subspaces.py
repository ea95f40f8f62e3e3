"""Low-rank methods of 2025 and 2026 that walk, sample or orthogonalize in their subspace."""

from ..codecs import Full
from ..finders import Randomized
from ..residual import Raw
from ..rules import Muon
from ..transport import Rotate
from .recipe import Recipe

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
)
