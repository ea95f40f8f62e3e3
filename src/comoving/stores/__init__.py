"""Stores: how the weights of a parameter are read in working precision, and written."""

from .base import Store
from .coded import Coded
from .plain import Plain
from .rounded import Rounded
from .which import store_of

__all__ = ["Coded", "Plain", "Rounded", "Store", "store_of"]
