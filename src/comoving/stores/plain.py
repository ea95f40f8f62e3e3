"""Weights in the parameter itself, in its own dtype."""

from collections.abc import Sequence

from torch import Tensor

from ..views import View


class Plain:
    """Reads and writes a parameter; rounding, where its dtype is a short one, is to the nearest.

    Args:
        p: the parameter.
        view: how it is seen.
    """

    def __init__(self, p: Tensor, view: View) -> None:
        self._p, self._view, storage = p, view, view.see_storage(p)
        self.shares = storage is not None
        self.weights = view.see(p) if storage is None else storage

    def prepared(self, weights: Tensor, seeds: Sequence[int]) -> Tensor:
        """In the parameter's shape."""
        return weights if weights is self.weights else self._view.restore(weights)

    def write(self, prepared: Tensor) -> None:
        """Copy what is not the parameter's own storage back."""
        if prepared is not self.weights:
            self._p.copy_(prepared)
        elif not self.shares:
            self._p.copy_(self._view.restore(prepared))
