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
    COVARIANCE = auto()
    """(r_n, r_n), Hermitian: an average of Z_(n) Z_(n)^H over the core's unfoldings; L' = R_n L R_n^H."""
    BASIS = auto()
    """(r_n, r_n), orthonormal: directions Q of mode n of the core; R_n Q made orthonormal, earlier columns first."""
    FACTORED = auto()
    """(r_n,), real: mean squares of the slices of mode n, the diagonal of a COVARIANCE; moves by |R_n|^2."""
    CACHE = auto()
    """(r_n, r_n): follows from other slots; where these have moved it is dropped, and the rule makes it anew."""
    THIN = auto()
    """Of a shape of its own, ``Slot.size``: a factor of what a rule keeps at low rank, in whole frames alone."""
    SCALAR = auto()
    """One real number, beside the step count."""


@dataclass(frozen=True)
class Slot:
    """One slot of a rule or transport.

    Args:
        name: in the state.
        kind: how it moves.
        mean: for a VARIANCE, the LINEAR slot of the same entries.
        mode: n, for the kinds that belong to one mode of the core.
        turned_by: for a VARIANCE whose entries are those of z x_n Q_n^H: the BASIS slots, by their modes; empty for
            those of z itself.
        size: for THIN, its shape.
        real: for THIN, whether it is real where the parameter is complex.
        waves: for THIN, whether it begins with the lowest columns of the cosine transform, instead of zeros.
    """

    name: str
    kind: Kind
    mean: str = ""
    mode: int = -1
    turned_by: tuple[tuple[int, str], ...] = ()
    size: tuple[int, ...] = ()
    real: bool = False
    waves: bool = False
