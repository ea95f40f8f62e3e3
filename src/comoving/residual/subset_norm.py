"""Subset-Norm: one step size for each slice of a tensor, beside a momentum in a subspace."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec, Spec
from ..linalg import pairs
from ..validate import check_float
from .base import HELD, Holding, Update
from .details import limited

NORM, WEIGHT = "subset.norm", "subset.weight"
"""The slots for b, and for the weight of its average where it is one."""


@dataclass(frozen=True)
class SubsetNorm(Holding):
    """The raw rest of the gradient beside the direction, and AdaGrad's step size for subsets (arXiv 2411.07120).

    b_i^2 <- b_i^2 + |g_i|^2                               of each slice g_i along the longest mode, the first on a tie
    u = (F d + g - F z) / (b + eps)
    w <- shrink w - lr scale u

    With the rule :class:`comoving.rules.Momentum` that is Subset-Norm with Subspace-Momentum (SNSM): momentum in the
    frame, plain descent outside. With ``decay`` b^2 is an average, b_i^2 <- decay b_i^2 + (1 - decay) |g_i|^2, divided
    by the sum of its weights, as in AdamSNSM. For a matrix the longest mode is the choice of the paper's heuristics.

    An entry of u is at most ``limit``, which is ours: F d may be where a slice has never had a gradient.

    Several gradients of one step add up. The state is b, one number for each slice, in the slot "subset.norm", and with
    ``decay`` that sum, one number, in "subset.weight".

    Args:
        decay: in [0, 1); None for the sum of all squares.
        limit: > 0; None for none.
    """

    batched: ClassVar[bool] = True

    decay: float | None = None
    limit: float | None = 10.0

    def __post_init__(self) -> None:
        if self.decay is not None:
            check_float("decay", self.decay, 0.0, 1.0, open_high=True)
        if self.limit is not None:
            check_float("limit", self.limit, 0.0, open_low=True)

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """b, and the sum of its weights where it is an average."""
        real = dtype.to_real()
        norms = {NORM: Spec((max(shape),), real)}
        return norms if self.decay is None else norms | {WEIGHT: Spec((), real)}

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """w <- shrink w + factor u."""
        gradient, rows = state.pop(HELD), update.rows
        own, keep = _sizes(gradient, rows), self.decay
        if keep is None:
            b = state[NORM] = torch.hypot(state[NORM], own)
        else:
            state[NORM] = torch.hypot(state[NORM] * keep**0.5, own * (1 - keep) ** 0.5)
            total = state[WEIGHT] = state[WEIGHT] * keep + (1 - keep)
            b = state[NORM] / total.sqrt().unsqueeze(-1)
        shape = gradient.shape[rows:]
        scale = b.add(update.eps).reshape(
            *b.shape[:-1], *(d if n == _longest(shape) else 1 for n, d in enumerate(shape))
        )
        whole = gradient.clone(memory_format=torch.contiguous_format)
        whole = update.frame.add_lift(whole, update.direction - update.core, 1.0)
        update.move(weights, limited(whole, scale.expand(whole.shape), self.limit))


def _longest(shape: torch.Size) -> int:
    return max(range(len(shape)), key=lambda n: shape[n])


def _sizes(x: Tensor, rows: int) -> Tensor:
    """The norm of each slice along the longest mode, (*rows, its length); squares stay in the range of float32."""
    mode = rows + _longest(x.shape[rows:])
    slices = pairs(x.movedim(mode, rows)).reshape(*x.shape[:rows], x.shape[mode], -1)
    most = slices.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(slices.dtype).tiny)
    return torch.linalg.vector_norm(slices / most, dim=-1) * most.squeeze(-1)
