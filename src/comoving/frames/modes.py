"""Mode-wise (Tucker) frames: one orthonormal factor per compressed mode, every other mode whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..codecs import Spec
from ..draws import sent
from ..linalg import abs_squared, add_multilinear, multilinear, orthogonality_defect, orthonormalize
from ..validate import check_choice, check_int
from .base import SIDES, Rank, Ranks, Side
from .overlap import Overlap


@dataclass(frozen=True)
class ModeFrame:
    """U = (U_1, ..., U_N), U_n of shape (*rows, d_n, r_n) with orthonormal columns, or None where the mode is whole.

    project  z = g x_1 U_1^H ... x_N U_N^H        (*rows, d_1, ..., d_N) -> (*rows, r_1, ..., r_N)
    lift     F z = z x_1 U_1 ... x_N U_N          (*rows, r_1, ..., r_N) -> (*rows, d_1, ..., d_N)

    A frame with rows is as many frames of the same ranks, one for each row of a batch of tensors. All factors None is
    the whole frame, the identity. Factors and operands share one dtype, real or complex.
    """

    factors: tuple[Tensor | None, ...]

    @property
    def ranks(self) -> Ranks:
        """r_n per mode, None where the mode is whole."""
        return tuple(None if u is None else u.shape[-1] for u in self.factors)

    @classmethod
    def stack(cls, frames: Sequence[Any]) -> Self:
        """Frames without rows, of the same ranks, as the rows of one: U_n of shape (len(frames), d_n, r_n)."""
        return cls(stacked([frame.factors for frame in frames]))

    def project(self, x: Tensor) -> Tensor:
        """The coordinates F^H x."""
        return multilinear(x, [None if u is None else u.mH for u in self.factors])

    def lift(self, z: Tensor) -> Tensor:
        """The tensor F z."""
        return multilinear(z, self.factors)

    def add_lift(self, out: Tensor, z: Tensor, alpha: float, beta: float = 1.0) -> Tensor:
        """out <- beta out + alpha F z, in place and without a temporary of out's size where its layout allows it."""
        return add_multilinear(out, z, self.factors, alpha, beta)

    def lift_squares(self, v: Tensor) -> Tensor:
        """|F|^2 v, entry by entry: the variances of F z for independent z of the real variances v."""
        spread = multilinear(v, [None if u is None else abs_squared(u) for u in self.factors])
        return spread.nan_to_num(nan=inf, posinf=inf)  # of 0 times infinity

    def overlap(self, older: "ModeFrame") -> Overlap:
        """R_n = U'_n^H U_n per mode, (*rows, r'_n, r_n), U' this frame and U the older one; None where both are whole.

        A whole side counts as the identity: R_n = U'_n^H when only the older frame is whole there, U_n when only this
        one is.
        """
        pairs = zip(self.factors, older.factors, strict=True)
        return Overlap(
            tuple(
                (None if old is None else old)
                if new is None
                else (new.mH.resolve_conj().contiguous() if old is None else new.mH @ old)
                for new, old in pairs
            )
        )

    def defect(self) -> Tensor:
        """The largest max |U_n^H U_n - I| over the modes, real, (*rows); 0 for the whole frame, which has no rows."""
        defects = [orthogonality_defect(u) for u in self.factors if u is not None]
        return torch.stack(defects).amax(0) if defects else torch.zeros(())

    def tensors(self) -> dict[str, Tensor]:
        """What the optimizer's state stores: {"frame.n": U_n} for the compressed modes."""
        return {f"frame.{n}": u for n, u in enumerate(self.factors) if u is not None}


def stacked(of_rows: Sequence[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """For each mode, the tensors of all rows as one, None where they have none."""
    modes = list[Tensor | None]()
    for mode in zip(*of_rows, strict=True):
        given = [x for x in mode if x is not None]
        modes.append(torch.stack(given) if given else None)
    return tuple(modes)


@dataclass(frozen=True)
class Modes:
    """Which modes of a tensor are compressed, and to how many directions.

    A matrix (a tensor with two modes longer than 1) compresses one side: the shorter, the first on a tie
    (GaLore, arXiv 2403.03507), or both for ``side="both"``. Any other tensor compresses each mode of at least
    ``min_size`` entries; convolution windows, for instance, stay whole. A tuple of ranks overrides both choices.

    Args:
        min_size: shortest mode that is compressed in tensors of higher order, >= 2.
    """

    makes = ModeFrame
    batched: ClassVar[bool] = True
    modal = True

    min_size: int = 8

    def __post_init__(self) -> None:
        check_int("min_size", self.min_size, 2)

    def ranks(self, shape: tuple[int, ...], rank: Rank, side: Side = "auto") -> Ranks:
        """r_n for each mode of a tensor of this shape, None for a mode that stays whole.

        Args:
            shape: (d_1, ..., d_N).
            rank: an int, that many directions for each compressed mode (a mode no longer than that stays whole); a
                float in (0, 1], that fraction of the entries in the core, spread evenly over the compressed modes; or
                a tuple with one entry per mode, None for whole.
            side: "auto", "left" (the first mode), "right" (the second) or "both"; concerns matrices only.

        Raises:
            ValueError: a rank outside these intervals, a tuple of the wrong length or with an entry above its mode.
            TypeError: a rank of another type.
        """
        check_rank(rank)
        check_choice("side", side, SIDES)
        if isinstance(rank, tuple):
            return _checked_tuple(shape, rank)
        modes = self._compressed(shape, side)
        if isinstance(rank, int):
            wanted = {n: rank for n in modes}
        elif rank == 1.0:
            wanted = {}
        else:
            wanted = _spread(rank, {n: shape[n] for n in modes})
        return tuple(wanted[n] if n in wanted and wanted[n] < d else None for n, d in enumerate(shape))

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """What a frame of these ranks stores."""
        return {
            f"frame.{n}": Spec((d, r), dtype)
            for n, (d, r) in enumerate(zip(shape, ranks, strict=True))
            if r is not None
        }

    def core_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """r_n along compressed modes, d_n along whole ones."""
        return tuple(d if r is None else r for d, r in zip(shape, ranks, strict=True))

    def mass_shape(self, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        """r_n along compressed modes, 1 along whole ones."""
        return tuple(1 if r is None else r for r in ranks)

    def load(self, state: Mapping[str, Tensor], shape: tuple[int, ...], like: Tensor | None = None) -> ModeFrame:
        """The frame whose tensors are in the state; modes without one are whole."""
        return ModeFrame(tuple(state.get(f"frame.{n}") for n in range(len(shape))))

    def start(self, like: Tensor, ranks: Ranks, older: ModeFrame | None, seed: int) -> ModeFrame:
        """An orthonormal frame of these ranks to search from.

        Args:
            like: a tensor of the shape, dtype and device to be framed.
            ranks: r_n per mode.
            older: the frame so far, whose leading directions are kept, or None. One with rows must have these ranks.
            seed: of the Gaussian directions that fill up; drawn on the CPU, hence equal on all devices and ranks.
        """
        generator = torch.Generator().manual_seed(seed)
        known = older.factors if older is not None else (None,) * len(ranks)
        sizes = like.shape[like.ndim - len(ranks) :]
        return ModeFrame(
            tuple(
                None if r is None else _fill(u, d, r, like, generator)
                for d, r, u in zip(sizes, ranks, known, strict=True)
            )
        )

    def _compressed(self, shape: tuple[int, ...], side: Side) -> tuple[int, ...]:
        modes = tuple(n for n, d in enumerate(shape) if d > 1)
        if len(modes) != 2:
            return tuple(n for n in modes if shape[n] >= self.min_size) if len(modes) > 2 else ()
        left, right = modes
        if side == "both":
            return modes
        if side == "auto":
            return (left,) if shape[left] <= shape[right] else (right,)
        return (left,) if side == "left" else (right,)


def _fill(u: Tensor | None, d: int, r: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """r orthonormal directions of d: u's first ones, then random ones."""
    if u is not None and u.shape[-1] == r:
        return u  # measured when it was found, mended when it was loaded
    kept = like.new_empty((d, 0)) if u is None else u[:, :r]
    fresh = torch.randn((d, r - kept.shape[-1]), generator=generator, dtype=torch.float64)
    return orthonormalize(torch.cat([kept, sent(fresh, like)], dim=-1))


def check_rank(rank: object) -> None:
    """Raise unless rank is an int >= 1, a float in (0, 1], or a tuple of ints >= 1 and None."""
    if isinstance(rank, bool) or not isinstance(rank, int | float | tuple):
        raise TypeError(f"rank must be an int, a float or a tuple of ints and None, got {rank!r}")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank must be an int >= 1, got {rank}")
    if isinstance(rank, float) and not 0.0 < rank <= 1.0:
        raise ValueError(f"a float rank is a fraction in (0, 1], got {rank}")
    if isinstance(rank, tuple):
        for entry in rank:
            if entry is not None and (isinstance(entry, bool) or not isinstance(entry, int)):
                raise TypeError(f"a tuple rank holds ints and None, got {entry!r} in {rank!r}")
            if entry is not None and entry < 1:
                raise ValueError(f"every entry of a tuple rank must be >= 1 or None, got {entry} in {rank}")


def _checked_tuple(shape: tuple[int, ...], rank: Ranks) -> Ranks:
    if len(rank) != len(shape):
        raise ValueError(f"rank {rank} has {len(rank)} entries, a tensor of shape {shape} needs {len(shape)}")
    for n, (r, d) in enumerate(zip(rank, shape, strict=True)):
        if r is not None and r > d:
            raise ValueError(f"rank {rank} asks for {r} directions in mode {n}, which has only {d}: use 1..{d} or None")
    return tuple(None if r == d else r for r, d in zip(rank, shape, strict=True))


def _spread(fraction: float, sizes: Mapping[int, int]) -> dict[int, int]:
    """Ranks r_n = round(s d_n), clipped to [1, d_n], with s such that prod r_n is nearest to fraction * prod d_n."""
    if not sizes:
        return {}

    def at(s: float) -> dict[int, int]:
        return {n: min(d, max(1, round(s * d))) for n, d in sizes.items()}

    target = fraction * prod(sizes.values())
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if prod(at(middle).values()) < target else (low, middle)
    return min(at(low), at(high), key=lambda ranks: abs(prod(ranks.values()) - target))
