"""Low-rank and tensor-structured optimizers whose state moves with the gradient's subspace."""

from .adamw import AdamW
from .explain import explain
from .groups import param_groups
from .optimizer import LowRankOptimizer
from .recipes import Recipe, build, recipes
from .state import state_bytes

__version__ = "0.1.0"
__all__ = [
    "AdamW",
    "LowRankOptimizer",
    "Recipe",
    "build",
    "explain",
    "param_groups",
    "recipes",
    "state_bytes",
]
