"""Codecs: how a large slot is stored."""

from .base import Codec, Spec
from .full import BFloat16, Full
from .in_weights import InWeights
from .int4 import Int4
from .int8 import Int8
from .rank_one import RankOne
from .root import Root
from .store import store
from .top_directions import TopDirections

__all__ = [
    "BFloat16",
    "Codec",
    "Full",
    "InWeights",
    "Int4",
    "Int8",
    "RankOne",
    "Root",
    "Spec",
    "TopDirections",
    "store",
]
