"""The blocks of a Tucker core that hold the most energy."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..codecs import Spec
from ..frames import ModeFrame, SparseFrame
from ..frames.base import Ranks
from .base import Finder, Memory, check_inner, check_start
from .operand import Operand
from .power import Power


@dataclass(frozen=True)
class BlockSelection:
    """Factors U of another finder, and between them the blocks of O x_n U_n^H that have the most energy.

    For frames of :class:`comoving.frames.SparseModes`; costs one projection beside the inner finder's own work. Ties go
    to the blocks that are kept already, then to the first ones, so that nothing changes where nothing is seen.

    Args:
        inner: a finder of mode-wise frames; its inertia is that of this one.
    """

    fills = (SparseFrame,)
    batched = False
    alone = False
    joint = False
    ahead = 0

    inner: Finder = field(default_factory=Power)

    def __post_init__(self) -> None:
        check_inner(self.inner)

    @property
    def inertia(self) -> float:
        """The inner finder's."""
        return self.inner.inertia

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """What the inner finder remembers."""
        return self.inner.schema(shape, ranks, dtype)

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """The inner finder takes note of it."""
        self.inner.observe(gradient, memory)

    def find(self, operand: Operand, start: SparseFrame, warm: bool, memory: Memory) -> SparseFrame:
        """Factors first, then the blocks of their core."""
        check_start(self, start)
        seen = _between_factors(operand)
        modes: ModeFrame = self.inner.find(seen, start.modes, warm, memory)
        if start.kept is None:
            return SparseFrame(modes, None)
        core = seen.project(modes, modes.overlap(seen.frame) if isinstance(seen.frame, ModeFrame) else None)
        core = core / core.abs().amax().clamp_min(torch.finfo(core.dtype).tiny)  # squares stay in float32's range
        energies, before = start.kept.energies(core), start.kept.blocks
        every = torch.arange(energies.shape[0], device=before.device)
        preferred = every[torch.ones_like(every).index_fill_(0, before, 0).argsort(stable=True)]
        best = energies[preferred].sort(descending=True, stable=True).indices[: before.shape[0]]
        return SparseFrame(modes, replace(start.kept, blocks=preferred[best].sort().values))


def _between_factors(operand: Operand) -> Operand:
    """The same operand with its terms in mode-wise frames, whose cores have zeros where nothing is kept."""
    frame, core, past = operand.frame, operand.core, operand.past
    if isinstance(frame, SparseFrame):
        core = None if core is None else frame.spread(core)
        operand = replace(operand, frame=frame.modes, core=core, inside=None)
    if past is not None and isinstance(past[0], SparseFrame):
        operand = replace(operand, past=(past[0].modes, past[0].spread(past[1])))
    return operand
