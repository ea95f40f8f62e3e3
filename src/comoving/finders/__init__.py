"""Finders: what a frame is made from, and how."""

from .amortized import Amortized
from .base import MERGED, NEXT, REFRESHES, Finder, Memory, Memoryless
from .block_selection import BlockSelection
from .correlation import Correlation
from .cosine import CosineSelection
from .exact import Exact
from .growing import Growing
from .incremental import IncrementalSVD
from .lazy import Lazy
from .nystroem import Nystroem
from .oja import Oja
from .operand import Operand
from .power import Power
from .random import RandomProjection
from .randomized import Randomized
from .streaming_tucker import StreamingTucker
from .train import TrainIncrement, TrainRandomized, TrainSVD
from .tree import TreeIncrement, TreeSVD

__all__ = [
    "Amortized",
    "BlockSelection",
    "Correlation",
    "CosineSelection",
    "Exact",
    "Finder",
    "Growing",
    "IncrementalSVD",
    "Lazy",
    "MERGED",
    "Memory",
    "Memoryless",
    "NEXT",
    "Nystroem",
    "Oja",
    "Operand",
    "Power",
    "REFRESHES",
    "RandomProjection",
    "Randomized",
    "StreamingTucker",
    "TrainIncrement",
    "TrainRandomized",
    "TrainSVD",
    "TreeIncrement",
    "TreeSVD",
]
