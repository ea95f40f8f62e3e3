"""Finders: what a frame is made from, and how."""

from .base import Finder, Memory, Memoryless
from .exact import Exact
from .hooi import HOOI
from .nystroem_tucker import NystroemTucker
from .operand import Operand
from .power import Power
from .randomized_tucker import RandomizedTucker
from .sequential import SequentialHOSVD
from .streaming_tucker import StreamingTucker

__all__ = [
    "HOOI",
    "Exact",
    "Finder",
    "Memory",
    "Memoryless",
    "NystroemTucker",
    "Operand",
    "Power",
    "RandomizedTucker",
    "SequentialHOSVD",
    "StreamingTucker",
]
