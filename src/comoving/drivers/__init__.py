"""Drivers: who feeds gradients to the engine, and guards it against bad ones."""

from .backward import Backward
from .guard import Guard
from .whole import Whole

__all__ = ["Backward", "Guard", "Whole"]
