"""Frames: orthonormal sets of directions in gradient space, and how each is laid out on a tensor."""

from .base import Frame, Layout
from .blocks import Blocks
from .modes import ModeFrame, Modes

__all__ = ["Blocks", "Frame", "Layout", "ModeFrame", "Modes"]
