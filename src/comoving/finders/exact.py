"""Exact factors of each unfolding, by the Gram matrix of the short side or by SVD."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..frames import ModeFrame
from ..linalg import Method, leading_directions, multilinear, unit_size
from ..validate import check_choice, check_float, check_int
from .base import Memory, Memoryless, check_start, unless_zero
from .operand import Operand


@dataclass(frozen=True)
class Exact(Memoryless):
    """U_n = the leading r_n left singular vectors of the unfolding O_(n); for a matrix, the truncated SVD.

    For tensors this is the truncated HOSVD (De Lathauwer et al., 2000), which ``sweeps`` of HOOI then
    improve: mode by mode, U_n from the unfolding of O projected on all other factors. For a matrix with one whole
    side the SVD is already best and no sweep is made.

    Args:
        momentum: rho of the operand, in [0, 1); 0 looks at the gradient alone, as GaLore does (arXiv 2403.03507).
        sweeps: HOOI sweeps, >= 0 (Tensor-GaLore, arXiv 2501.02379, takes Tucker factors, so > 0).
        method: "gram" takes eigenvectors of O_(n) O_(n)^H or O_(n)^H O_(n), whichever is smaller, accurate for singular
            values above about sqrt(machine epsilon) of the largest; "svd" is accurate for all and slower.
    """

    fills: ClassVar[tuple[type, ...]] = (ModeFrame,)
    batched: ClassVar[bool] = True

    momentum: float = 0.0
    sweeps: int = 0
    method: Method = "gram"

    def __post_init__(self) -> None:
        check_float("momentum", self.momentum, 0.0, 1.0, open_high=True)
        check_int("sweeps", self.sweeps, 0)
        check_choice("method", self.method, ("gram", "svd"))

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Decompose each compressed mode anew; ``start`` only serves where the operand is zero."""
        check_start(self, start)
        rows = operand.rows
        x = unit_size(operand.full(), rows)
        factors = [None if u is None else self._leading(x, n, u, rows) for n, u in enumerate(start.factors)]
        compressed = [n for n, u in enumerate(factors) if u is not None]
        for _ in range(self.sweeps if len(compressed) > 1 else 0):
            for n in compressed:
                others = [u.mH if u is not None and m != n else None for m, u in enumerate(factors)]
                factors[n] = self._leading(multilinear(x, others), n, start.factors[n], rows)
        return ModeFrame(tuple(factors))

    def _leading(self, x: Tensor, mode: int, start: Tensor | None, rows: int) -> Tensor:
        assert start is not None
        return unless_zero(x, leading_directions(x, mode, start.shape[-1], self.method, rows), start, rows)
