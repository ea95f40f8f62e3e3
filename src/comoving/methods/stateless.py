"""Methods of full rank that keep little or nothing."""

from ..rules import Normalized
from .recipe import Recipe

RECIPES = (
    Recipe(
        "sinkgd",
        "rows and columns of the gradient brought to unit size in turn; no state",
        "2502.06742",
        dict(rule=Normalized()),
        full_rank=True,
    ),
)
