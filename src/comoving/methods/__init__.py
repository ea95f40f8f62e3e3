"""Every method as a composition of parts, by what it is about."""

from . import matrices, stateless, tensors, whole
from .recipe import Recipe

RECIPES = (*whole.RECIPES, *stateless.RECIPES, *matrices.RECIPES, *tensors.RECIPES)

__all__ = ["RECIPES", "Recipe"]
