"""Drivers: who feeds gradients to the engine, and guards it against bad ones."""

from .backward import Backward
from .base import Driver
from .guard import Guard
from .whole import Whole

__all__ = ["Backward", "Driver", "Guard", "Whole"]
