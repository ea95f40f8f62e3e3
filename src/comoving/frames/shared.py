"""A mode-wise frame of a tensor that processes share, each of which has some entries of one mode."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from ..comm import LOCAL, Comm
from ..linalg import multilinear
from .modes import ModeFrame


@dataclass(frozen=True)
class SharedFrame(ModeFrame):
    """U = (U_1, ..., U_N) as all processes have it, for tensors of which each has its rows of mode k = ``comm.split``.

    With U_k[p] the rows of U_k that belong to process p, whose entries are x[p], and the same core in all processes

    project  z = sum over p of x[p] x_k U_k[p]^H x_n U_n^H over all n != k
    lift     (F z)[p] = z x_k U_k[p] x_n U_n over all n != k

    so that a projection is a sum over processes, in which all of them take part, and a lift sends nothing. Where mode k
    is whole, as in frames that were saved elsewhere, z has all of its entries too, and each process lifts its own.

    Args:
        factors: whole, (*rows, d_n, r_n), the same in all processes.
        comm: joins what processes have.
    """

    comm: Comm = LOCAL

    @classmethod
    def stack(cls, frames: Sequence[Any]) -> Self:
        """Frames without rows, of the same ranks and processes, as the rows of one."""
        return cls(ModeFrame.stack(frames).factors, frames[0].comm)

    def project(self, x: Tensor) -> Tensor:
        """The coordinates of the whole tensor, of which x is what is here; a collective call."""
        k = self._mode
        z = multilinear(x, [None if u is None else u.mH for u in self._here])
        return self.comm.whole(z, k - len(self.factors)) if self.factors[k] is None else self.comm.joined(z, (k,))

    def lift(self, z: Tensor) -> Tensor:
        """What is here of the tensor F z."""
        return multilinear(self._of(z), self._here)

    def add_lift(self, out: Tensor, z: Tensor, alpha: float, beta: float = 1.0) -> Tensor:
        """out <- beta out + alpha F z, in place, of what is here."""
        return ModeFrame(self._here).add_lift(out, self._of(z), alpha, beta)

    @property
    def _mode(self) -> int:
        assert self.comm.split is not None
        return self.comm.split

    @property
    def _here(self) -> tuple[Tensor | None, ...]:
        """The factors, with this process's rows of U_k."""
        k, u = self._mode, self.factors[self._mode]
        return self.factors if u is None else (*self.factors[:k], self.comm.here(u, -2), *self.factors[k + 1 :])

    def _of(self, z: Tensor) -> Tensor:
        """The coordinates that this process lifts."""
        k = self._mode
        return self.comm.here(z, k - len(self.factors)) if self.factors[k] is None else z
