"""The columns of the cosine transform that hold the most energy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..frames import CosineFrame
from ..linalg import abs_squared, cosine_transform
from ..validate import check_choice, check_float
from .base import Memory, Memoryless, check_start
from .operand import Operand


@dataclass(frozen=True)
class CosineSelection(Memoryless):
    """The r_n columns of the DCT-II matrix D with the largest rows in D^T O_(n) (DCT-AdamW, arXiv 2505.17967).

    One FFT per compressed mode, and no decomposition; for frames of :class:`comoving.frames.Cosines`. A column that
    stays selected keeps its place in the frame, so that moments which are left where they are (``Keep``) stay with it;
    ties go to the columns that are there already.

    Args:
        momentum: rho of the operand, in [0, 1).
        norm: of a row, 1 for the sum of absolute values or 2 for the energy, which loses least of the operand.
    """

    fills: ClassVar[tuple[type, ...]] = (CosineFrame,)

    momentum: float = 0.9
    norm: int = 2

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        check_choice("norm", self.norm, (1, 2))

    def find(self, operand: Operand, start: CosineFrame, warm: bool, memory: Memory) -> CosineFrame:
        """Select anew for each compressed mode."""
        check_start(self, start)
        x = operand.full()
        x = x / x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
        indices = tuple(None if k is None else _selected(x, n, k, self.norm) for n, k in enumerate(start.indices))
        return CosineFrame.of(indices, tuple(x.shape), x.dtype)


def _selected(x: Tensor, mode: int, before: Tensor, power: int) -> Tensor:
    others = [n for n in range(x.ndim) if n != mode]
    rows = cosine_transform(x, mode)
    size = (abs_squared(rows) if power == 2 else rows.abs()).sum(others)
    every = torch.arange(x.shape[mode], device=x.device)
    preferred = every[torch.isin(every, before, invert=True).long().argsort(stable=True)]
    chosen = preferred[size[preferred].sort(descending=True, stable=True).indices[: before.shape[0]]]
    # Columns that are new to the frame take the places of those that leave it, of which there are as many.
    stays = torch.isin(before, chosen)
    places = stays.long().argsort(stable=True)
    fresh = chosen[torch.isin(chosen, before).long().argsort(stable=True)]
    after = before.clone()
    after[places] = torch.where(stays[places], before[places], fresh)
    return after
