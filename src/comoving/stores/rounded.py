"""Weights in bfloat16 that are rounded stochastically."""

from collections.abc import Sequence

from torch import Tensor

from .. import rounding
from ..views import View


class Rounded:
    """Reads a bfloat16 parameter in float32, and writes it with :func:`comoving.rounding.stochastic_bfloat16`.

    Args:
        p: the parameter.
        view: how it is seen.
    """

    def __init__(self, p: Tensor, view: View) -> None:
        self._p, self._view = p, view
        self.shares, self.weights = False, view.see(p)

    def prepared(self, weights: Tensor, seeds: Sequence[int]) -> Tensor:
        """Rounded by random bits of these seeds; to the nearest without any."""
        restored = self._view.restore(weights)
        if not seeds:
            return restored
        return rounding.stochastic_bfloat16(restored, rounding.generator(self._p.device, seeds))

    def write(self, prepared: Tensor) -> None:
        """Copy it."""
        self._p.copy_(prepared)
