"""Brand's incremental SVD: the frame and its singular values are carried from refresh to refresh."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Spec
from ..decompositions import turning
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import orthonormalize, over, reorthonormalize, to_unit, unfold
from ..validate import check_float, check_int
from .base import DRAWS, Memory, check_start, counted, drawing, peak
from .operand import Operand

_SINGULAR = ".singular"


@dataclass(frozen=True)
class IncrementalSVD:
    """U_n, s_n <- the leading left singular vectors and values of [forgetting U_n diag(s_n), O_(n)] (Brand, 2002).

    With Q the ``add`` leading directions of what O_(n) has outside U_n, found by a sketch of it, the small problem is

    [ forgetting diag(s)   U^H O ]
    [        0             Q^H O ]

    of which the left singular vectors W turn the basis: U <- [U Q] W, cut to r_n columns. So all of O is seen inside U
    and along Q; only what lies outside both is dropped, where :func:`comoving.decompositions.incremental_svd`, of which
    this is the small problem, has its new columns in hand and drops nothing. O is compressed by contraction with the
    basis that there is and not to a few columns, because these would weaken, at every refresh, all but a few of U's own
    directions. The cost is that of one product with r_n + 2 add directions and the eigenvectors of an (r_n +
    add)-square matrix. The defect of the basis is measured at every refresh, and mended where it passes the tolerance.

    The first frame looks for r_n more directions. s_n is in the state; a checkpoint of another rank starts it anew.

    Args:
        inertia: rho, the first moment's share of the operand O, in [0, 1); the finder remembers by itself.
        forgetting: the factor of old singular values per refresh, in (0, 1].
        add: new directions that each refresh tries, >= 1.
        seed: of the sketches, >= 0.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0

    inertia: float = 0.0
    forgetting: float = 0.9
    add: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("inertia", self.inertia, 0.0, 1.0, open_high=True)
        check_float("forgetting", self.forgetting, 0.0, 1.0, open_low=True)
        check_int("add", self.add, 1)
        check_int("seed", self.seed, 0)

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """The singular values of each compressed mode, and how often a sketch was drawn."""
        values = {f"{n}{_SINGULAR}": Spec((r,), dtype.to_real()) for n, r in enumerate(ranks) if r is not None}
        return {DRAWS: drawing} | values

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Nothing to note."""

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Update ``start`` and the singular values."""
        check_start(self, start)
        count = counted(memory)
        factors: list[Tensor | None] = []
        for n, u in enumerate(start.factors):
            if u is not None:
                name = f"{n}{_SINGULAR}"
                u, memory[name] = self._updated(operand, n, u, memory[name], warm, count)  # noqa: PLW2901
            factors.append(u)
        return ModeFrame(tuple(factors))

    def _updated(
        self, operand: Operand, mode: int, u: Tensor, values: Tensor, warm: bool, count: int
    ) -> tuple[Tensor, Tensor]:
        (d, rank), lead = u.shape[-2:], operand.rows
        basis, seen = u, unfold(operand.whole(mode, operand.contract(mode, u)), mode, operand.order)
        add = min(self.add if warm else self.add + rank, d - rank)
        if add > 0:
            outside = to_unit(operand.sketch(mode, add, self.seed, count, mode), lead)
            for _ in range(2):  # then the basis seldom needs mending
                outside = outside.sub_(u @ (u.mH @ outside))
            basis = reorthonormalize(torch.cat([u, orthonormalize(to_unit(outside, lead))], dim=-1))
            new = operand.whole(mode, operand.contract(mode, basis[..., rank:]))
            seen = torch.cat([seen, unfold(new, mode, operand.order)], dim=-2)
        faded = self.forgetting * values
        tiny = torch.finfo(seen.dtype).tiny
        size = peak(seen, lead)
        unit = torch.maximum(size, faded.amax(-1)).clamp_min(tiny)
        vectors, found = turning(seen / over(unit, seen), rank, faded / over(unit, faded))
        turned = torch.where(over(size > 0, u), reorthonormalize(basis @ vectors), u)
        return turned, torch.where(over(size > 0, faded), found * over(unit, found), faded)
