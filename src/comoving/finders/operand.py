"""What finders look at: a dense tensor plus a term that already has low rank."""

from dataclasses import dataclass

from torch import Tensor

from ..frames import ModeFrame
from ..linalg import correlate, gram, multilinear


@dataclass(frozen=True)
class Operand:
    """O = share * x + F w, with x dense, and w the coordinates of a second term in a frame F.

    Finders see it only through contractions, so that F w is not formed for a matrix with one compressed side, and so
    that ranks that share the work would have one place to sum over.

    Args:
        dense: x of shape (d_1, ..., d_N).
        share: the factor of x.
        frame: F, or None where there is no second term.
        core: w in F's coordinates, or None.
    """

    dense: Tensor
    share: float = 1.0
    frame: ModeFrame | None = None
    core: Tensor | None = None

    @classmethod
    def mix(cls, dense: Tensor, share: float, frame: ModeFrame, core: Tensor) -> "Operand":
        """share * dense + lift(core), formed at once where several modes are compressed and each would lift it anew."""
        if sum(u is not None for u in frame.factors) == 1:
            return cls(dense, share, frame, core)
        return cls(frame.add_lift(dense * share, core, 1.0))

    @property
    def order(self) -> int:
        """N, the number of modes."""
        return self.dense.ndim

    def full(self) -> Tensor:
        """O as one dense tensor."""
        if self.frame is None or self.core is None:
            return self.dense if self.share == 1.0 else self.dense * self.share
        return self.frame.add_lift(self.dense * self.share, self.core, 1.0)

    def gram(self, mode: int) -> Tensor:
        """O_(n) O_(n)^H, (d_n, d_n)."""
        return gram(self.full(), mode, self.order)

    def contract(self, mode: int, factor: Tensor) -> Tensor:
        """O x_n factor^H, factor of shape (d_n, r): mode n becomes r long."""
        matrices: list[Tensor | None] = [None] * self.order
        matrices[mode] = factor.mH
        result = multilinear(self.dense, matrices)
        if self.frame is None or self.core is None:
            return result if self.share == 1.0 else result.mul_(self.share)
        lifts = list(self.frame.factors)
        own = lifts[mode]
        if own is factor:  # a warm start: F^H F = I
            lifts[mode] = None
        else:
            lifts[mode] = factor.mH if own is None else factor.mH @ own
        return result.mul_(self.share).add_(multilinear(self.core, lifts))

    def correlate(self, mode: int, z: Tensor) -> Tensor:
        """O_(n) Z_(n)^H, (d_n, r), for z of O's shape but r long in mode n."""
        result = correlate(self.dense, z, mode, self.order)
        if self.frame is None or self.core is None:
            return result if self.share == 1.0 else result.mul_(self.share)
        down = [u.mH if u is not None and n != mode else None for n, u in enumerate(self.frame.factors)]
        small = correlate(self.core, multilinear(z, down), mode, self.order)
        own = self.frame.factors[mode]
        return result.mul_(self.share).add_(small if own is None else own @ small)
