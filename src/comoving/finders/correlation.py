"""Gradient descent on what the frame loses, weighted by how far the momentum disagrees; COAP."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Spec
from ..decompositions import leading_directions
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import abs_squared, multilinear, norm, orthonormalize, over, unfold, unit_size
from ..validate import check_float, check_int
from .base import DRAWS, Memory, check_start, counted, drawing, peak, unless_zero
from .operand import Operand


@dataclass(frozen=True)
class Correlation:
    """A step of gradient descent on U_n at each refresh, mode by mode, an SVD now and then (COAP, arXiv 2412.00071).

    With G = O_(n) of c columns, Z = U^H G, and M the unfolding of the momentum, lifted in every mode but n:

    L(U) = mean |U U^H G - G|^2 (1 - mean_i cos(U M_i, G_i)),                i: the columns
    U   <- orth( U - rate D / max(1, |D|) ),   D the gradient of L
    D    = -2/(d c) (G Z^H - U Z Z^H) (1 - mean cos) - mean |U U^H G - G|^2 (G^ M^H - U (M cos) M^H) / c

    with G^, M in D of unit columns; D is that of an orthonormal U, for which U U^H G - G is orthogonal to U. Every
    ``recalibrate``-th refresh, and the first, take the leading left singular vectors of G Q instead, Q an orthonormal
    basis of the rows of Z.

    As published, U is orthonormal after a recalibration only, and the frame is a matrix with one compressed side (or
    a convolution with two); here the basis is brought back each time, so that its span is the paper's after the first
    step and drifts from it until the next recalibration. L grows with |G|^2: for gradients much smaller than 1 the
    paper's rate, and this one, moves U next to nothing between recalibrations.

    Args:
        rate: of the step, > 0.
        recalibrate: refreshes from one SVD to the next, >= 1.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = False
    ahead = 0

    rate: float = 0.1
    recalibrate: int = 5

    def __post_init__(self) -> None:
        check_float("rate", self.rate, 0.0, open_low=True)
        check_int("recalibrate", self.recalibrate, 1)

    @property
    def inertia(self) -> float:
        """0: the momentum enters by its directions alone."""
        return 0.0

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """How often it was asked."""
        return {DRAWS: drawing}

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Nothing to note."""

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """One step from ``start``, or a recalibration."""
        check_start(self, start)
        if not warm:
            memory[DRAWS] = torch.zeros_like(memory[DRAWS])
        x, rows, order = operand.full(), operand.rows, operand.order
        if counted(memory) % self.recalibrate == 0:
            x = unit_size(x, rows)
            return ModeFrame(
                tuple(
                    None if u is None else _recalibrated(unfold(x, n, order), u, rows)
                    for n, u in enumerate(start.factors)
                )
            )
        momentum = _momentum(operand, start)
        return ModeFrame(
            tuple(
                None if u is None else self._descended(x, momentum, start, n, rows) for n, u in enumerate(start.factors)
            )
        )

    def _descended(self, x: Tensor, momentum: Tensor | None, start: ModeFrame, mode: int, rows: int) -> Tensor:
        u, tiny, order = start.factors[mode], torch.finfo(x.dtype).tiny, x.ndim - rows
        assert u is not None
        size = peak(x, rows).clamp_min(tiny)
        g = unfold(x / over(size, x), mode, order)
        z, (d, columns) = u.mH @ g, g.shape[-2:]
        slope = (g @ z.mH - u @ (z @ z.mH)) * (-2 / (d * columns))
        if momentum is not None:
            lost = (abs_squared(g).sum((-2, -1)) - abs_squared(z).sum((-2, -1))).clamp_min(0) / (d * columns)
            lifts = [None if n == mode else factor for n, factor in enumerate(start.factors)]
            m, g = _unit_columns(unfold(multilinear(momentum, lifts), mode, order)), _unit_columns(g)
            cosines = ((u.mH @ g).conj() * m).sum(-2).real
            turn = g @ m.mH - u @ ((m * cosines.unsqueeze(-2)) @ m.mH)
            slope = slope * over(1 - cosines.mean(-1), u) - turn * over(lost / columns, u)
        # D = size^2 slope, and rate D / max(1, |D|) without the squares of very large or small gradients.
        least = torch.maximum(norm(slope, rows).to(size.dtype), (1 / size).square()).clamp_min(tiny)
        return orthonormalize(u - slope * over(self.rate / least, u))


def _recalibrated(g: Tensor, u: Tensor, rows: int) -> Tensor:
    """The leading left singular vectors of G Q; those of G where U has more columns than G."""
    rank, columns = u.shape[-1], g.shape[-1]
    sketch = g @ orthonormalize(g.mH @ u) if rank <= columns else g
    return unless_zero(g, leading_directions(unit_size(sketch, rows), 0, rank, "svd", rows), u, rows)


def _momentum(operand: Operand, start: ModeFrame) -> Tensor | None:
    """The momentum in the coordinates of ``start``, with entries of about 1; None where there is none."""
    if operand.past is None:
        return None
    frame, momentum = operand.past
    assert isinstance(frame, ModeFrame)
    return unit_size(start.overlap(frame).move(momentum.to(operand.dense.dtype)), operand.rows)


def _unit_columns(x: Tensor) -> Tensor:
    """Columns of norm 1, zero where they are."""
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
