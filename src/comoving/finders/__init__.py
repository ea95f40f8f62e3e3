"""Finders: what a frame is made from, and how."""

from .base import Finder, Memory, Memoryless
from .exact import Exact
from .operand import Operand
from .power import Power

__all__ = ["Exact", "Finder", "Memory", "Memoryless", "Operand", "Power"]
