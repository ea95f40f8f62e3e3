"""Finders: what a frame is made from, and how."""

from .amortized import Amortized
from .base import MERGED, NEXT, REFRESHES, Finder, Memory, Memoryless
from .block_selection import BlockSelection
from .correlation import Correlation
from .cosine import CosineSelection
from .exact import Exact
from .growing import Growing
from .hooi import HOOI
from .incremental import IncrementalSVD
from .lazy import Lazy
from .nystroem import Nystroem
from .nystroem_tucker import NystroemTucker
from .oja import Oja
from .operand import Operand
from .power import Power
from .random import RandomProjection
from .randomized import Randomized
from .randomized_tucker import RandomizedTucker
from .sequential import SequentialHOSVD
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
    "HOOI",
    "IncrementalSVD",
    "Lazy",
    "MERGED",
    "Memory",
    "Memoryless",
    "NEXT",
    "Nystroem",
    "NystroemTucker",
    "Oja",
    "Operand",
    "Power",
    "REFRESHES",
    "RandomProjection",
    "Randomized",
    "RandomizedTucker",
    "SequentialHOSVD",
    "StreamingTucker",
    "TrainIncrement",
    "TrainRandomized",
    "TrainSVD",
    "TreeIncrement",
    "TreeSVD",
]
