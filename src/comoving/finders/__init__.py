"""Finders: what a frame is made from, and how.

What their formulas are about:

- O, the operand: the tensor, (d_1, ..., d_N), of which the new frame is to hold as much energy |F^H O|^2 as it can. It
  is rho times the first moment, without its bias, plus 1 - rho times the newest gradient with what error feedback adds
  to it; rho is the field ``inertia`` (:class:`Finder`).
- O_(n), its unfolding: the matrix of shape (d_n, product of all other d_m) whose columns are the fibres of O along mode
  n. A matrix is its own unfolding along mode 0, and its transpose that along mode 1.
- U_n, the factor: an orthonormal matrix of shape (d_n, r_n) for each compressed mode n. r_n is the rank, and the frame
  F is all the factors together.
- O x_n A, the product along mode n: the tensor whose unfolding along mode n is A O_(n).
- A refresh: a step at which the optimizer asks for a new frame, as its cadence says (:mod:`comoving.cadence`).
"""

from .amortized import Amortized
from .base import Finder, Memory, Memoryless
from .block_selection import BlockSelection
from .correlation import Correlation
from .cosine import CosineSelection
from .delayed import Delayed
from .exact import Exact
from .grassmann import Grassmann
from .incremental import IncrementalSVD
from .nystroem import Nystroem
from .oja import Oja
from .operand import Operand
from .power import Power
from .random import RandomProjection
from .random_walk import RandomWalk
from .randomized import Randomized
from .standing import Standing
from .streaming_tucker import StreamingTucker
from .train import TrainIncrement, TrainRandomized, TrainSVD
from .tree import TreeIncrement, TreeSVD

__all__ = [
    "Amortized",
    "BlockSelection",
    "Correlation",
    "CosineSelection",
    "Delayed",
    "Exact",
    "Finder",
    "Grassmann",
    "IncrementalSVD",
    "Memory",
    "Memoryless",
    "Nystroem",
    "Oja",
    "Operand",
    "Power",
    "RandomProjection",
    "RandomWalk",
    "Randomized",
    "Standing",
    "StreamingTucker",
    "TrainIncrement",
    "TrainRandomized",
    "TrainSVD",
    "TreeIncrement",
    "TreeSVD",
]
