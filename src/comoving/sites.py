"""A site: what was decided, once, about one parameter."""

from dataclasses import dataclass
from math import prod, sqrt

from .views import View


@dataclass(frozen=True)
class Site:
    """How one parameter is optimized.

    Args:
        name: the parameter's name, or its place in its group where it has none.
        view: how it is seen.
        ranks: those of its first frame; all None for a dense parameter.
        core_shape: the shape of its coordinates; the view's for a dense parameter.
        reason: why it is projected or dense, in words.
        phase: at which steps, modulo the refresh period, its frame is refreshed.
        index: its place among all parameters, from which its random directions are seeded.
        base: the ranks that the layout chose, where adaptive ones start from others.
    """

    name: str
    view: View
    ranks: tuple[int | None, ...]
    core_shape: tuple[int, ...]
    reason: str
    phase: int = 0
    index: int = 0
    base: tuple[int | None, ...] = ()

    @property
    def projected(self) -> bool:
        """Whether any mode is compressed."""
        return any(r is not None for r in self.ranks)

    @property
    def plain(self) -> bool:
        """Whether torch's own AdamW serves it: dense and real. A dense complex parameter has a whole frame."""
        return not self.projected and not self.view.dtype.is_complex

    @property
    def gain(self) -> float:
        """sqrt(full / core), the factor that gives a lifted unit-RMS core a unit RMS."""
        return sqrt(prod(self.view.shape) / prod(self.core_shape))
