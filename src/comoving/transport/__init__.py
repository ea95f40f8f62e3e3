"""Transports: what happens to the moments when their frame changes.

A transport dispatches on the kind of a slot and knows no rule. Notation: R_n = U'_n^H U_n is the overlap of the new and
the old frame in mode n (None where both are whole), |R|^2 is taken entry by entry, and c1, c2 are the total weights
1 - b1^t and 1 - b2^t that the moments have given to past gradients.
"""

from .base import State, Transport, initial
from .carry import Carry, mass_of
from .keep import Keep
from .reset import Reset
from .rotate import Rotate

__all__ = ["Carry", "Keep", "Reset", "Rotate", "State", "Transport", "initial", "mass_of"]
