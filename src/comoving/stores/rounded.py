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

    def write(self, weights: Tensor, seeds: Sequence[int]) -> None:
        """Round by random bits of these seeds; to the nearest without any."""
        restored = self._view.restore(weights)
        if seeds:
            restored = rounding.stochastic_bfloat16(restored, rounding.generator(self._p.device, seeds))
        self._p.copy_(restored)
