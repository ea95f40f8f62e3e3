"""Methods whose moments are folded or restricted, beside the whole rest of the gradient."""

from typing import Any

from ..codecs import Full
from ..finders import Exact, Standing
from ..frames import Pooled
from ..residual import Details, Folded, SubsetNorm
from ..rules import Momentum
from ..transport import Keep, Reset
from .recipe import Recipe

_POOLED: dict[str, Any] = dict(
    frame=Pooled(), finder=Standing(), transport=Keep(), codec=Full(), refresh_every=1000, scale=0.25
)  # fmt: skip
"""What the recipes share whose frame is fixed; at a refresh it is found as it is."""

RECIPES = (
    Recipe(
        "foam",
        "Adam on the means of neighbours, the rest of the gradient added to both moments",
        "2512.07112",
        _POOLED | dict(residual=Folded()),
        relative_rate=10.0,
    ),
    Recipe(
        "gwt",
        "Adam on the approximation coefficients of a Haar transform, details divided by the same roots",
        "2501.07237",
        _POOLED | dict(residual=Details()),
        relative_rate=2.0,
    ),
    Recipe(
        "snsm",
        "momentum in an SVD's span and the raw rest, one AdaGrad step size for each row",
        "2411.07120",
        dict(
            finder=Exact(),
            transport=Reset(),
            rule=Momentum(),
            residual=SubsetNorm(),
            codec=Full(),
            refresh_every=200,
            scale=5.0,  # the authors' rate of 1 is for AdaGrad on all parameters; here the others have AdamW
        ),  # fmt: skip
        relative_rate=5.0,
    ),
)
