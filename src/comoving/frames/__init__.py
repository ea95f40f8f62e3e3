"""Frames: orthonormal sets of directions in gradient space, and how each is laid out on a tensor."""

from .base import Frame, Layout
from .modes import ModeFrame, Modes
from .sampled import CosineFrame, Cosines, Seeded, SeededFrame

__all__ = ["CosineFrame", "Cosines", "Frame", "Layout", "ModeFrame", "Modes", "Seeded", "SeededFrame"]
