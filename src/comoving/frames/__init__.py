"""Frames: orthonormal sets of directions in gradient space, and how each is laid out on a tensor."""

from .base import Frame, Layout
from .blocks import Blocks
from .bond import BondFrame
from .modes import ModeFrame, Modes
from .overlap import Overlap
from .pooled import Pooled, PooledFrame
from .sampled import CosineFrame, Cosines, Seeded, SeededFrame
from .shared import SharedFrame
from .sparse import SparseFrame, SparseModes, SparseOverlap
from .train import Trains
from .tree import Trees

__all__ = [
    "Blocks",
    "BondFrame",
    "CosineFrame",
    "Cosines",
    "Frame",
    "Layout",
    "ModeFrame",
    "Modes",
    "Overlap",
    "Pooled",
    "PooledFrame",
    "Seeded",
    "SeededFrame",
    "SharedFrame",
    "SparseFrame",
    "SparseModes",
    "SparseOverlap",
    "Trains",
    "Trees",
]
