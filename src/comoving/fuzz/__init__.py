"""Random compositions on structured gradients: ``python -m comoving.fuzz --cases 5000 --seed 0``.

A case is drawn from two integers alone (:func:`comoving.fuzz.cases.draw`), run with every promise checked
(:func:`comoving.fuzz.check.examine`), and repeated by the command that its failure is reported with.
"""

from .bounds import Bound, step_bound
from .cases import Case, Parameter, draw
from .check import Outcome, examine, largest
from .gradients import STRUCTURES, sequence

__all__ = [
    "STRUCTURES",
    "Bound",
    "Case",
    "Outcome",
    "Parameter",
    "draw",
    "examine",
    "largest",
    "sequence",
    "step_bound",
]
