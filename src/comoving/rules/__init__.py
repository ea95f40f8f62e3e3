"""Update rules: what turns core coordinates into a direction."""

from .adam import Adam
from .base import Rule
from .momentum import Momentum

__all__ = ["Adam", "Momentum", "Rule"]
