"""Error feedback and momentum in one buffer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec, Spec, store
from ..finders import Operand
from ..linalg import norm
from ..validate import check_float
from .base import Cores, Inside, Passage

_BUFFER = "feedback.momentum."


@dataclass(frozen=True)
class MomentumBuffer(Inside):
    """The buffer of Dion (arXiv 2504.05295): what the frame misses stays, what it holds decays.

    B = g + M
    M = B - (1 - mu) F F^H B

    Inside the frame M is heavy-ball momentum, outside it is error feedback: the rule sees the momentum already, and
    should average no more itself (:class:`comoving.rules.Columns`). M is as large as the gradient, and stored through
    the codec. Diagnostics have no "bound": what M keeps inside the frame may leave the next one.

    Args:
        decay: mu in [0, 1].
    """

    batched: ClassVar[bool] = True
    feeds: ClassVar[bool] = True
    rescales: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    decay: float = 0.95

    def __post_init__(self) -> None:
        check_float("decay", self.decay, 0.0, 1.0)

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """What the codec stores of a tensor of the gradient's size."""
        return {_BUFFER + name: spec for name, spec in codec.schema(shape, dtype).items()}

    def restore(
        self, gradient: Tensor, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Operand:
        """B."""
        return Operand(codec.decode_onto(gradient, _stored(state)), rows=passage.rows)

    def keep(
        self, dense: Tensor, cores: Cores, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Tensor:
        """M; returns the norm of B outside the frame."""
        frame, rows, core = passage.frame, passage.rows, cores.total
        # A later gradient of the window meets M instead of B: what the frame holds of it becomes mu z of all of them.
        surplus = core * (1 - self.decay) if opening else frame.project(dense).sub_(core, alpha=self.decay)
        frame.add_lift(dense, surplus, -1.0)
        size, stored = store(codec, dense, _stored(state), rows)
        state.update({_BUFFER + name: x for name, x in stored.items()})
        whole = size.clamp_min(torch.finfo(torch.float32).tiny)
        return size * (1 - (norm(core, rows) * (self.decay / whole)).square()).clamp_min(0).sqrt()

    def error(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> Tensor:
        """The codec's own bound."""
        return codec.error(_stored(state), rows)


def _stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_BUFFER): x for name, x in state.items() if name.startswith(_BUFFER)}
