"""What the default optimizer is made of: for each role the composition that measured best at the bytes there are."""

from .choice import Choice
from .table import Table, measured

__all__ = ["Choice", "Table", "measured"]
