"""Finders: what a frame is made from, and how."""

from .base import Finder, Memory, Memoryless
from .cosine import CosineSelection
from .exact import Exact
from .incremental import IncrementalSVD
from .nystroem import Nystroem
from .oja import Oja
from .operand import Operand
from .power import Power
from .random import RandomProjection
from .randomized import Randomized
from .train import TrainIncrement, TrainRandomized, TrainSVD
from .tree import TreeIncrement, TreeSVD

__all__ = [
    "CosineSelection",
    "Exact",
    "Finder",
    "IncrementalSVD",
    "Memory",
    "Memoryless",
    "Nystroem",
    "Oja",
    "Operand",
    "Power",
    "RandomProjection",
    "Randomized",
    "TrainIncrement",
    "TrainRandomized",
    "TrainSVD",
    "TreeIncrement",
    "TreeSVD",
]
