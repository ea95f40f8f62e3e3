"""Block-sparse Tucker frames: mode-wise factors, and of the core between them only some blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import log, prod
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Spec
from ..linalg import abs_squared, add_multilinear, gram, multilinear
from ..validate import check_float, check_int
from .base import Rank, Ranks, Side
from .modes import ModeFrame, Modes, check_rank
from .overlap import Overlap

_BLOCKS = "frame.blocks"


@dataclass(frozen=True)
class Kept:
    """Some blocks of a core: a selection S, by which z = S x takes their entries out of a core x.

    Args:
        shape: (r_1, ..., r_N), of the core.
        lengths: (b_1, ..., b_N), of a block; b_n divides r_n.
        blocks: (count,) int64, rising: which blocks, counted with the last mode running fastest.
    """

    shape: tuple[int, ...]
    lengths: tuple[int, ...]
    blocks: Tensor

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """(count, b_1, ..., b_N)."""
        return (self.blocks.shape[0], *self.lengths)

    def gather(self, x: Tensor) -> Tensor:
        """S x: the blocks of a core, (r_1, ..., r_N) -> (count, b_1, ..., b_N)."""
        return cut(x, self.lengths).index_select(0, self.blocks)

    def scatter(self, z: Tensor) -> Tensor:
        """S^T z: the core with these blocks and zeros elsewhere, (count, b_1, ..., b_N) -> (r_1, ..., r_N)."""
        order, counts = len(self.shape), _counts(self.shape, self.lengths)
        every = z.new_zeros((prod(counts), *self.lengths)).index_copy_(0, self.blocks, z)
        pairs = [axis for n in range(order) for axis in (n, order + n)]
        return every.reshape(*counts, *self.lengths).permute(pairs).reshape(self.shape)

    def energies(self, x: Tensor) -> Tensor:
        """The energy of every block of a core, kept or not, (number of blocks,), real."""
        return abs_squared(cut(x, self.lengths)).flatten(1).sum(1)


@dataclass(frozen=True)
class SparseOverlap(Overlap):
    """S' (R_1 (x) ... (x) R_N) S^T of two frames that keep the blocks S' and S of their cores.

    S and S' are 0 or 1, so that entry by entry |S' R S^T|^2 = S' |R|^2 S^T: coordinates and variances both move as
    between the whole cores, in which what is not kept counts as zero. Statistics of single modes do not move so, and
    the overlap that diagnostics report is that of the factors alone.

    Args:
        matrices: the R_n, (r'_n, r_n), of the factors.
        new: the blocks that the new frame keeps; None for all of its core, uncut.
        old: those of the old one, likewise.
    """

    new: Kept | None = None
    old: Kept | None = None

    def move(self, x: Tensor) -> Tensor:
        """S' (R_1 (x) ... (x) R_N) S^T x."""
        return self._through(x, self.matrices)

    def move_squares(self, x: Tensor) -> Tensor:
        """S' (|R_1|^2 (x) ... (x) |R_N|^2) S^T x."""
        return self._through(x, self.squares)

    def moved_shape(self, x: Tensor) -> list[int]:
        """The new core's shape, for x of the old one's."""
        if self.new is not None:
            return list(self.new.kept_shape)
        shape = x.shape if self.old is None else self.old.shape
        return [d if r is None else r.shape[-2] for d, r in zip(shape, self.matrices, strict=True)]

    def spread(self, mass: Tensor) -> Tensor:
        """Of kept blocks the mass is core-shaped already; that of a whole frame is repeated over all it was one for."""
        if self.old is not None:
            return mass
        sizes = [d if self.new is None else self.new.shape[n] for n, d in enumerate(mass.shape)]
        return mass.expand([d if r is None else r.shape[-1] for d, r in zip(sizes, self.matrices, strict=True)])

    def _through(self, x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
        core = multilinear(x if self.old is None else self.old.scatter(x), matrices)
        return core if self.new is None else self.new.gather(core)


@dataclass(frozen=True)
class SparseFrame:
    """Directions u_1 (x) ... (x) u_N of a mode-wise frame U, those of the kept blocks of its core only.

    project  z = S (g x_1 U_1^H ... x_N U_N^H)       (d_1, ..., d_N) -> (count, b_1, ..., b_N)
    lift     F z = (S^T z) x_1 U_1 ... x_N U_N       (count, b_1, ..., b_N) -> (d_1, ..., d_N)

    Args:
        modes: U.
        kept: S; None for the whole frame, the identity, whose core is the tensor, uncut.
    """

    modes: ModeFrame
    kept: Kept | None

    @property
    def ranks(self) -> Ranks:
        """r_n per mode, None where the mode is whole."""
        return self.modes.ranks

    def project(self, x: Tensor) -> Tensor:
        """The coordinates F^H x."""
        core = self.modes.project(x)
        return core if self.kept is None else self.kept.gather(core)

    def lift(self, z: Tensor) -> Tensor:
        """The tensor F z."""
        return self.modes.lift(self.spread(z))

    def add_lift(self, out: Tensor, z: Tensor, alpha: float, beta: float = 1.0) -> Tensor:
        """out <- beta out + alpha F z, in place."""
        return add_multilinear(out, self.spread(z), self.modes.factors, alpha, beta)

    def spread(self, z: Tensor) -> Tensor:
        """S^T z, the coordinates of F z in U."""
        return z if self.kept is None else self.kept.scatter(z)

    def overlap(self, older: "SparseFrame") -> SparseOverlap:
        """S' (R_1 (x) ... (x) R_N) S^T, with R_n as for :class:`ModeFrame`."""
        return SparseOverlap(self.modes.overlap(older.modes).matrices, self.kept, older.kept)

    def defect(self) -> Tensor:
        """The largest |U_n^H U_n - I| of two directions that lie in kept blocks and differ in one mode at most."""
        if self.kept is None:
            return self.modes.defect()
        order, defects = len(self.kept.shape), list[Tensor]()
        for n, u in enumerate(self.modes.factors):
            if u is not None:
                ones = u.new_ones(self.kept.kept_shape, dtype=torch.float32)
                together = gram(self.kept.scatter(ones), n, order) > 0
                eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
                defects.append((u.mH @ u - eye).abs().mul(together).amax())
        return torch.stack(defects).amax() if defects else torch.zeros(())

    def tensors(self) -> dict[str, Tensor]:
        """{"frame.n": U_n} for the compressed modes, and {"frame.blocks": (count,) int64}."""
        return self.modes.tensors() if self.kept is None else {**self.modes.tensors(), _BLOCKS: self.kept.blocks}


@dataclass(frozen=True)
class SparseModes:
    """Which modes are compressed, to how many directions, and how many blocks of the core between them are kept.

    The core is cut along every mode, whole ones too, into blocks of b_n entries: the largest divisor of r_n (of d_n
    where the mode is whole) that is at most ``block``. Of the K blocks, count = max(1, round(density K)) are kept. The
    state holds moments of (count, b_1, ..., b_N), the factors, and which blocks they are. At the numbers of a dense
    core there are 1/density times as many combinations of directions to choose from.

    Args:
        block: longest side of a block, >= 1.
        density: share of the blocks that is kept, in (0, 1].
        min_size: as for :class:`Modes`.
    """

    makes = SparseFrame
    modal = False
    batched: ClassVar[bool] = False

    block: int = 2
    density: float = 0.5
    min_size: int = 8

    def __post_init__(self) -> None:
        check_int("block", self.block, 1)
        check_float("density", self.density, 0.0, 1.0, open_low=True)
        check_int("min_size", self.min_size, 2)

    def ranks(self, shape: tuple[int, ...], rank: Rank, side: Side = "auto") -> Ranks:
        """r_n for each mode, None for whole ones, as :meth:`Modes.ranks` chooses them.

        A float is the share of the tensor's entries in the kept blocks: below the density, since a core without its
        other blocks that large would be the whole tensor cut into blocks. Ranks above ``block`` are then multiples of
        it, those of which the share comes nearest.

        Raises:
            ValueError: also for such a share of the density or more.
        """
        check_rank(rank)
        dense = Modes(self.min_size)
        if not isinstance(rank, float) or rank == 1.0 or self.density == 1.0:
            return dense.ranks(shape, rank, side)
        if rank >= self.density:
            raise ValueError(
                f"rank {rank} at density {self.density} asks for more blocks than there are: use a rank below the "
                f"density, or a higher density"
            )
        near, target = dense.ranks(shape, rank / self.density, side), rank * prod(shape)
        options = [self._multiples(r, d) for r, d in zip(near, shape, strict=True)]
        choices = [ranks for ranks in product(*options) if any(r is not None for r in ranks)]
        choices.append(dense.ranks(shape, rank, side))  # one block of near's ranks may be too large
        return min(choices, key=lambda ranks: abs(log(prod(self.core_shape(shape, ranks)) / target)))

    def core_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """(count, b_1, ..., b_N); the tensor's shape where all is whole."""
        if all(r is None for r in ranks):
            return tuple(shape)
        core, lengths = self._cut(shape, ranks)
        return (max(1, round(self.density * prod(_counts(core, lengths)))), *lengths)

    def mass_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """The core's shape, for blocks come and go along whole modes too; 1 everywhere where all is whole."""
        return (1,) * len(shape) if all(r is None for r in ranks) else self.core_shape(shape, ranks)

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """The factors, and the kept blocks."""
        factors = Modes(self.min_size).schema(shape, ranks, dtype)
        return {**factors, _BLOCKS: Spec(self.core_shape(shape, ranks)[:1], torch.int64)} if factors else {}

    def load(self, state: Mapping[str, Tensor], shape: tuple[int, ...], like: Tensor | None = None) -> SparseFrame:
        """The frame whose tensors are in the state; whole where there are none."""
        modes = Modes(self.min_size).load(state, shape)
        blocks = state.get(_BLOCKS)
        return SparseFrame(modes, None if blocks is None else Kept(*self._cut(shape, modes.ranks), blocks))

    def start(self, like: Tensor, ranks: Ranks, older: SparseFrame | None, seed: int) -> SparseFrame:
        """The older frame where its ranks are these; else factors as :meth:`Modes.start` makes them, and first blocks.

        Cores of other ranks are cut into other blocks, so that none of the older ones is kept.
        """
        if older is not None and older.kept is not None and older.ranks == ranks:
            return older
        modes = Modes(self.min_size).start(like, ranks, None if older is None else older.modes, seed)
        shape = tuple(like.shape)
        first = torch.arange(self.core_shape(shape, ranks)[0], device=like.device)
        return SparseFrame(modes, Kept(*self._cut(shape, ranks), first))

    def _cut(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the core and of a block."""
        core = tuple(d if r is None else r for d, r in zip(shape, ranks, strict=True))
        return core, tuple(max(b for b in range(1, min(r, self.block) + 1) if r % b == 0) for r in core)

    def _multiples(self, rank: int | None, size: int) -> tuple[int | None, ...]:
        """The rank, or the multiples of the block's length on both sides of it."""
        if rank is None or rank <= self.block or rank % self.block == 0:
            return (rank,)
        below = rank - rank % self.block
        return (below, below + self.block if below + self.block < size else None)


def cut(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """All blocks of a core, (r_1, ..., r_N) -> (number of blocks, b_1, ..., b_N)."""
    counts = _counts(x.shape, lengths)
    pairs = x.reshape([side for pair in zip(counts, lengths, strict=True) for side in pair])
    return pairs.permute([*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]).reshape(-1, *lengths)


def _counts(shape: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Blocks along each mode."""
    return [r // b for r, b in zip(shape, lengths, strict=True)]
