"""Slots: the named tensors of a parameter's state, by the way they change with the frame."""

from dataclasses import dataclass
from enum import Enum, auto


class Kind(Enum):
    """How a slot transforms when the frame changes, and what shape it has."""

    LINEAR = auto()
    """Core-shaped, in the parameter's field (real or complex); moves as a vector."""
    VARIANCE = auto()
    """Core-shaped and real; the second moment of a LINEAR slot's entries."""
    MASS = auto()
    """Real, core-shaped but of length 1 along whole modes; the total weight inside a VARIANCE."""
    SCALAR = auto()
    """One real number, beside the step count."""


@dataclass(frozen=True)
class Slot:
    """One slot: its name in the state, its kind, and for a VARIANCE the LINEAR slot of the same entries."""

    name: str
    kind: Kind
    mean: str = ""
