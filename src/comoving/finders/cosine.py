"""The columns of the cosine transform that hold the most energy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..frames import CosineFrame
from ..linalg import abs_squared, cosine_transform, over
from ..validate import check_choice, check_float
from .base import Memory, Memoryless, check_start, peak
from .operand import Operand


@dataclass(frozen=True)
class CosineSelection(Memoryless):
    """The r_n columns of the DCT-II matrix D with the largest rows in D^T O_(n) (DCT-AdamW, arXiv 2505.17967).

    One FFT per compressed mode, and no decomposition; for frames of :class:`comoving.frames.Cosines`. A column that
    stays selected keeps its place in the frame, so that moments which are left where they are (``Keep``) stay with it;
    ties go to the columns that are there already.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1).
        norm: of a row, 1 for the sum of absolute values or 2 for the energy, which loses least of the operand.
    """

    fills = (CosineFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.9
    norm: int = 2

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        check_choice("norm", self.norm, (1, 2))

    def find(self, operand: Operand, start: CosineFrame, warm: bool, memory: Memory) -> CosineFrame:
        """Select anew for each compressed mode."""
        check_start(self, start)
        x, rows = operand.full(), operand.rows
        x = x / over(peak(x, rows).clamp_min(torch.finfo(x.dtype).tiny), x)
        pairs = enumerate(start.indices)
        indices = tuple(None if k is None else _selected(x, n, k, self.norm, rows) for n, k in pairs)
        return CosineFrame.of(indices, operand.shape, x.dtype)


def _selected(x: Tensor, mode: int, before: Tensor, power: int, rows: int) -> Tensor:
    """The columns of most energy, (*rows, r), those among ``before`` in the places that they have there."""
    others = [n for n in range(rows, x.ndim) if n != rows + mode]
    waves = cosine_transform(x, rows + mode)
    size = (abs_squared(waves) if power == 2 else waves.abs()).sum(others)
    preferred = _members(before, size).logical_not().long().argsort(stable=True)
    best = size.gather(-1, preferred).sort(descending=True, stable=True).indices[..., : before.shape[-1]]
    chosen = preferred.gather(-1, best)
    # Columns that are new to the frame take the places of those that leave it, of which there are as many.
    stays = _members(chosen, size).gather(-1, before)
    places = stays.long().argsort(stable=True)
    fresh = chosen.gather(-1, _members(before, size).gather(-1, chosen).long().argsort(stable=True))
    filled = torch.where(stays.gather(-1, places), before.gather(-1, places), fresh)
    return before.scatter(-1, places, filled)


def _members(indices: Tensor, like: Tensor) -> Tensor:
    """Which of like's last indices are among these, (*rows, d)."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(-1, indices, True)
