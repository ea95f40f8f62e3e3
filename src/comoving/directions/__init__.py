"""The few directions in which training moves: watching them, and learning faster along them."""

from .branches import Branch, Branches, add_branches
from .extraction import Extracted, Extraction, extract, prepare
from .gain import Amplifier, Gain, amplify
from .targets import TARGETS, targets

__all__ = [
    "TARGETS",
    "Amplifier",
    "Branch",
    "Branches",
    "Extracted",
    "Extraction",
    "Gain",
    "add_branches",
    "amplify",
    "extract",
    "prepare",
    "targets",
]
