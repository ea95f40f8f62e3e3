"""Ranks: how many directions each mode keeps, and when that changes."""

from .base import Policy, Reading, Record
from .energy import Energy
from .fixed import Fixed
from .temperature import Temperature
from .tolerance import Tolerance

__all__ = ["Energy", "Fixed", "Policy", "Reading", "Record", "Temperature", "Tolerance"]
