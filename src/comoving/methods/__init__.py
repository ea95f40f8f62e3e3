"""Every method as a composition of parts, by what it is about."""

from . import compressed, matrices, tensors, whole
from .recipe import Recipe

RECIPES = (*whole.RECIPES, *matrices.RECIPES, *compressed.RECIPES, *tensors.RECIPES)

__all__ = ["RECIPES", "Recipe"]
