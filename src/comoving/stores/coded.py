"""Weights in codes."""

from collections.abc import Sequence

from torch import Tensor

from ..views import View
from ..weights import QuantizedLinear


class Coded:
    """Decodes the weight of a :class:`comoving.weights.QuantizedLinear`, and encodes it again.

    Args:
        codes: the module.
        view: how its weight is seen.
    """

    def __init__(self, codes: QuantizedLinear, view: View) -> None:
        self._codes, self._view = codes, view
        self.shares, self.weights = False, view.see(codes.decode())

    def prepared(self, weights: Tensor, seeds: Sequence[int]) -> Tensor:
        """In the weight's shape."""
        return self._view.restore(weights)

    def write(self, prepared: Tensor) -> None:
        """Encode it, rounded as the codec rounds."""
        self._codes.encode(prepared)
