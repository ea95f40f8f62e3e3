"""Cadences: when frames are refreshed.

tau is the group's ``refresh_every``, the period that every cadence starts from; it may be edited between two steps. The
phase, below tau, is each parameter's own: by it refreshes are staggered, so that no step pays for all.
"""

from .base import Cadence, When
from .every import Every
from .growing import Growing
from .lazy import Lazy

__all__ = ["Cadence", "Every", "Growing", "Lazy", "When"]
