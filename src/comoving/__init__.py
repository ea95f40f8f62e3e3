"""Low-rank and tensor-structured optimizers whose state moves with the gradient's subspace."""

from .adamw import AdamW
from .checkpoint import save
from .default import Optimizer
from .explain import explain
from .grouping import param_groups
from .memory import Plan, plan
from .optimizer import LowRankOptimizer
from .recipes import Recipe, build, recipes
from .state import state_bytes

__version__ = "0.1.0"
__all__ = [
    "AdamW",
    "LowRankOptimizer",
    "Optimizer",
    "Plan",
    "Recipe",
    "build",
    "explain",
    "param_groups",
    "plan",
    "recipes",
    "save",
    "state_bytes",
]
