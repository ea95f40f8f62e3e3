"""Every method as a composition of parts, by what it is about."""

from . import matrices, subspaces, tensors, whole
from .recipe import Recipe

RECIPES = (*whole.RECIPES, *matrices.RECIPES, *subspaces.RECIPES, *tensors.RECIPES)

__all__ = ["RECIPES", "Recipe"]
