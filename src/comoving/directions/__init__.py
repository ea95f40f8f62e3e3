"""The few directions in which training moves: watching them, and learning faster along them."""

from .targets import TARGETS, targets

__all__ = ["TARGETS", "targets"]
