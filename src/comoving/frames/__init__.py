"""Frames: orthonormal sets of directions in gradient space, and how each is laid out on a tensor."""

from .base import Frame, Layout
from .modes import ModeFrame, Modes

__all__ = ["Frame", "Layout", "ModeFrame", "Modes"]
