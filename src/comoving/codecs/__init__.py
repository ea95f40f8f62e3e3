"""Codecs: how a large slot is stored."""

from .base import Codec, Part
from .full import BFloat16, Full
from .int8 import Int8
from .root import Root

__all__ = ["BFloat16", "Codec", "Full", "Int8", "Part", "Root"]
