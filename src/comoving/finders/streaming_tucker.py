"""Tucker factors from sketches that are kept up to date with every gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Spec
from ..decompositions import leading_directions
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import all_but_one, unit_size
from ..validate import check_float, check_int
from .base import Memory, check_start, unless_zero
from .kronecker import fixed_gaussians, widths
from .operand import Operand

_SKETCH = "sketch."


@dataclass(frozen=True)
class StreamingTucker:
    """U_n = the leading left singular vectors of a sketch S_n <- decay S_n + G_(n) Omega_n of all gradients.

    Omega_n (Sun, Guo, Luo, Tropp and Udell, 1904.10951) is a Kronecker product of fixed, seeded Gaussian matrices A_m
    of shape (k_m, d_m), one for each other mode: S_n = G x_m A_m over m != n, of shape (k_1, ..., d_n, ..., k_N). All
    modes together read a gradient twice, and no matrix as wide as an unfolding is ever formed; nor is the tensor
    decomposed at a refresh. The sketch is linear: it is that of the decayed sum of the gradients. Old gradients are
    forgotten at the rate of ``decay``; nearer to 1 the frame is calmer and follows a turning subspace later, by about
    1/(1 - decay) steps.

    As with any sketch in one pass, the tail of the spectrum blurs the directions: next to the HOSVD it loses 1% of the
    energy or less on gradients of neural operators, and 5% where the spectrum falls slowly.

    What the operand holds beyond the newest gradient, error feedback above all, is no part of any gradient. Its sketch
    is added at the refresh, once, with weight ``newest``: without, feedback grows in directions that the frame never
    sees.

    Args:
        decay: in (0, 1].
        oversampling: columns of the sketch beyond r_n, >= 0; a Kronecker product may have more, 4^(N-1) at least.
        newest: weight of the operand beside the stream, >= 0; the newest gradient, in both, counts 1 + newest times.
        seed: of the A_m, >= 0.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = False
    ahead = 0

    decay: float = 0.9
    oversampling: int = 8
    newest: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("decay", self.decay, 0.0, 1.0, open_low=True)
        check_int("oversampling", self.oversampling, 0)
        check_float("newest", self.newest, 0.0)
        check_int("seed", self.seed, 0)

    @property
    def inertia(self) -> float:
        """0: the stream is the mean that the first moment would stand for."""
        return 0.0

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """For each compressed mode "sketch.n", (k_1, ..., d_n, ..., k_N)."""
        k = widths(shape, {n: r + self.oversampling for n, r in enumerate(ranks) if r is not None})
        return {
            f"{_SKETCH}{n}": Spec((*k[:n], shape[n], *k[n + 1 :]), dtype) for n, r in enumerate(ranks) if r is not None
        }

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """S_n <- decay S_n + G x_m A_m."""
        modes = _modes(memory)
        for n, fresh in all_but_one(gradient, self._matrices(gradient, memory, rows), modes).items():
            memory[f"{_SKETCH}{n}"].mul_(self.decay).add_(fresh)

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """Leading directions of the sketches, ``start`` where a sketch is zero."""
        check_start(self, start)
        modes, rows = _modes(memory), operand.rows
        fresh = operand.sketches(self._matrices(operand.dense, memory, rows), modes) if self.newest > 0 else {}
        factors = list(start.factors)
        for n in modes:
            u, sketch = factors[n], memory[f"{_SKETCH}{n}"]
            assert u is not None
            if n in fresh:  # an eighth of the sum, which may leave the range
                sketch = sketch.mul(0.125).add_(fresh[n], alpha=0.125 * self.newest)
            sketch = unit_size(sketch, rows)
            factors[n] = unless_zero(sketch, leading_directions(sketch, n, u.shape[-1], rows=rows), u, rows)
        return ModeFrame(tuple(factors))

    def _matrices(self, like: Tensor, memory: Memory, rows: int) -> tuple[Tensor | None, ...]:
        """The A_m, whose sizes are those of the sketches; none for the only compressed mode, which nobody contracts."""
        shape = tuple(like.shape[rows:])
        k = list(shape)
        for n in _modes(memory):
            size = memory[f"{_SKETCH}{n}"].shape[rows:]
            k = [size[m] if m != n else k[m] for m in range(len(k))]
        return fixed_gaussians(shape, tuple(k), self.seed, like.dtype, like.device)


def _modes(memory: Memory) -> tuple[int, ...]:
    return tuple(sorted(int(name.removeprefix(_SKETCH)) for name in memory if name.startswith(_SKETCH)))
