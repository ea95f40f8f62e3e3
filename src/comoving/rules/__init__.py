"""Update rules: what turns core coordinates into a direction."""

from .adam import Adam
from .base import Rule

__all__ = ["Adam", "Rule"]
