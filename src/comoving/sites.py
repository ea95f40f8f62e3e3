"""A site: what was decided, once, about one parameter."""

from dataclasses import dataclass

from .frames.modes import rms_gain
from .views import View


@dataclass(frozen=True)
class Site:
    """How one parameter is optimized.

    Args:
        name: the parameter's name, or its place in its group where it has none.
        view: how it is seen.
        ranks: r_n per mode of the view, None where the mode is whole; all None for a dense parameter.
        reason: why it is projected or dense, in words.
        phase: at which steps, modulo the refresh period, its frame is refreshed.
        index: its place among all parameters, from which its random directions are seeded.
    """

    name: str
    view: View
    ranks: tuple[int | None, ...]
    reason: str
    phase: int = 0
    index: int = 0

    @property
    def projected(self) -> bool:
        """Whether any mode is compressed."""
        return any(r is not None for r in self.ranks)

    @property
    def plain(self) -> bool:
        """Whether torch's own AdamW serves it: dense and real. A dense complex parameter has a whole frame."""
        return not self.projected and not self.view.dtype.is_complex

    @property
    def core_shape(self) -> tuple[int, ...]:
        """The shape of the core."""
        return tuple(d if r is None else r for d, r in zip(self.view.shape, self.ranks, strict=True))

    @property
    def gain(self) -> float:
        """sqrt(full / core), the factor that gives a lifted unit-RMS core a unit RMS."""
        return rms_gain(self.view.shape, self.ranks)
