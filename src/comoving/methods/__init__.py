"""Every method as a composition of parts, by what it is about."""

from . import compressed, matrices, stateless, subspaces, tensors, whole
from .recipe import Recipe

DEFAULT = Recipe(
    "comoving",
    "the default: for each role the composition that measured best at the bytes that budget= allows",
    "this package",
    full_rank=True,
    state="within budget=",
)
"""Built by :class:`comoving.Optimizer`."""

RECIPES = (
    DEFAULT,
    *whole.RECIPES,
    *stateless.RECIPES,
    *matrices.RECIPES,
    *subspaces.RECIPES,
    *compressed.RECIPES,
    *tensors.RECIPES,
)

__all__ = ["RECIPES", "Recipe"]
