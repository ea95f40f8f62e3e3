"""Memory: planned before the run, and measured."""

from .plan import Plan, plan
from .tracker import StorageTracker, Usage, measure

__all__ = ["Plan", "StorageTracker", "Usage", "measure", "plan"]
