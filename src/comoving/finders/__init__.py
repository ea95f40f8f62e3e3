"""Finders: what a frame is made from, and how."""

from .base import Finder, Memory, Memoryless
from .exact import Exact
from .operand import Operand
from .power import Power
from .train import TrainIncrement, TrainRandomized, TrainSVD
from .tree import TreeIncrement, TreeSVD

__all__ = [
    "Exact",
    "Finder",
    "Memory",
    "Memoryless",
    "Operand",
    "Power",
    "TrainIncrement",
    "TrainRandomized",
    "TrainSVD",
    "TreeIncrement",
    "TreeSVD",
]
