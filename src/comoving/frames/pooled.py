"""Frames of sums of neighbours: nothing is searched, and the state holds the number of blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ..codecs import Spec
from ..linalg import multilinear, pairs
from .base import Rank, Ranks, Side
from .modes import Modes
from .overlap import Overlap


@dataclass(frozen=True)
class PooledFrame:
    """The entries of a mode in r_n runs of neighbours, of d_n / r_n each, or of lengths that differ by one.

    project  z_j = (sum over run j) / sqrt(its length)      lift  (F z)_i = z_j / sqrt(its length),  i in run j

    mode by mode: entry i is of run floor(i r_n / d_n). U_n of shape (d_n, r_n) has orthonormal columns and is not made
    where r_n divides d_n. A tensor may have rows in front, which all have the same frame.

    Args:
        sizes: d_n.
        ranks: r_n, None where the mode is whole.
        dtype, device: of explicit factors, in overlaps with other frames.
    """

    sizes: tuple[int, ...]
    ranks: Ranks
    dtype: torch.dtype
    device: torch.device

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """U_n, made anew at each call."""
        return self._factors(self.dtype, self.device)

    def project(self, x: Tensor) -> Tensor:
        """The coordinates F^H x."""
        if not self._even:
            return multilinear(x, [None if u is None else u.mT for u in self._factors(x.dtype, x.device)])
        for mode, r, length in self._runs:
            x = x.unflatten(mode, (r, length)).sum(mode).mul_(length**-0.5)
        return x

    def lift(self, z: Tensor) -> Tensor:
        """The tensor F z."""
        return self._repeated(z, -0.5)

    def add_lift(self, out: Tensor, z: Tensor, alpha: float, beta: float = 1.0) -> Tensor:
        """out <- beta out + alpha F z, in place and, where each r_n divides d_n, without a temporary of out's size."""
        if beta != 1.0:
            pairs(out).mul_(beta)
        if not self._even:
            return out.add_(self.lift(z), alpha=alpha)
        view, spread, scale = out, z, alpha
        for mode, r, length in self._runs:  # the last first, so that the others keep their places
            place = out.ndim + mode
            view, spread = view.unflatten(place, (r, length)), spread.unsqueeze(place + 1)
            scale = scale * length**-0.5
        view.add_(spread, alpha=scale)
        return out

    def lift_squares(self, v: Tensor) -> Tensor:
        """|F|^2 v, entry by entry: the variances of F z for independent z of the real variances v."""
        return self._repeated(v, -1.0)

    def overlap(self, older: Any) -> Overlap:
        """R_n = U'_n^H U_n per mode; None where both have the same runs, and where both are whole."""
        matrices = list[Tensor | None]()
        for new, old, r, before in zip(self.factors, older.factors, self.ranks, older.ranks, strict=True):
            if r == before and (r is None or isinstance(older, PooledFrame)):
                matrices.append(None)
            elif new is None or old is None:
                matrices.append(old if new is None else new.mT.contiguous())
            else:
                matrices.append(new.mT @ old)
        return Overlap(tuple(matrices))

    def defect(self) -> Tensor:
        """0: it is orthonormal to rounding."""
        return torch.zeros(())

    def tensors(self) -> dict[str, Tensor]:
        """{"frame.n.rank": int64 on the host} for compressed modes, the same for all rows."""
        return {f"frame.{n}.rank": torch.tensor(r, device="cpu") for n, r in enumerate(self.ranks) if r is not None}

    @property
    def _even(self) -> bool:
        """Whether all runs of a mode are of one length."""
        return all(r is None or d % r == 0 for d, r in zip(self.sizes, self.ranks, strict=True))

    @property
    def _runs(self) -> list[tuple[int, int, int]]:
        """(dimension from behind, r_n, d_n / r_n) of each compressed mode, the last first."""
        order, modes = len(self.sizes), enumerate(zip(self.sizes, self.ranks, strict=True))
        return [(n - order, r, d // r) for n, (d, r) in modes if r is not None][::-1]

    def _repeated(self, z: Tensor, power: float) -> Tensor:
        """Each entry over its run, times a power of the run's length."""
        for n, (d, r) in enumerate(zip(self.sizes, self.ranks, strict=True)):
            if r is None:
                continue
            mode = n - len(self.sizes)
            if d % r == 0:
                z = (z * (d // r) ** power).repeat_interleave(d // r, mode)
            else:
                of = _run_of(d, r, z.device)
                starts = (torch.arange(r + 1, device=z.device) * d + r - 1) // r
                z = (z * starts.diff().to(z.dtype.to_real()).pow(power).view(-1, *[1] * (-1 - mode))).index_select(
                    mode, of
                )
        return z

    def _factors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, ...]:
        modes = zip(self.sizes, self.ranks, strict=True)
        return tuple(None if r is None else _runs_of(d, r, dtype, device) for d, r in modes)


def _run_of(d: int, r: int, device: torch.device) -> Tensor:
    """The run that each entry is of."""
    return torch.arange(d, device=device) * r // d


def _runs_of(d: int, r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """U of shape (d, r), with 1 / sqrt(length of run j) in the rows of that run."""
    of = _run_of(d, r, device)
    ones = (of.unsqueeze(-1) == torch.arange(r, device=device)).to(dtype.to_real())
    return (ones / ones.sum(0).sqrt()).to(dtype)


@dataclass(frozen=True)
class Pooled(Modes):
    """One mode in runs of neighbours, each of which has one coordinate: its sum over the root of its length.

    The frame of FOAM (arXiv 2512.07112) and, for runs of 2^l entries, of the approximation coefficients of an l-level
    Haar transform (GWT, arXiv 2501.07237). It never changes; the state holds r_n, an integer.

    A share as rank, 2^-l for level l, is that of the entries of the mode: r_n = ceil(share d_n), and any share will do.
    Where r_n does not divide d_n, runs differ by one entry; the papers fill up with zeros. A matrix compresses the
    second side, in which neighbours are next to each other, another tensor its last mode of at least ``min_size``;
    ``side="left"``, "both", or a tuple of ranks say otherwise.

    Args:
        min_size: as for :class:`Modes`.
    """

    makes = PooledFrame

    def ranks(self, shape: tuple[int, ...], rank: Rank, side: Side = "auto") -> Ranks:
        """As :meth:`Modes.ranks`, but a share of a single mode is rounded up."""
        found = super().ranks(shape, rank, side)
        modes = self._compressed(shape, side)
        if not isinstance(rank, float) or rank == 1.0 or len(modes) != 1:
            return found
        (n,) = modes
        wanted = max(1, ceil(rank * shape[n] * (1 - 1e-9)))  # a third of nine is three
        return tuple(wanted if m == n and wanted < d else None for m, d in enumerate(shape))

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """The numbers of runs."""
        return {f"frame.{n}.rank": Spec((), torch.int64, scalar=True) for n, r in enumerate(ranks) if r is not None}

    def load(self, state: Mapping[str, Tensor], shape: tuple[int, ...], like: Tensor | None = None) -> PooledFrame:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The frame of the ranks that are in the state."""
        said = [state.get(f"frame.{n}.rank") for n in range(len(shape))]
        ranks = tuple(None if rank is None else int(rank) for rank in said)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        return PooledFrame(shape, ranks, dtype, torch.device("cpu") if like is None else like.device)

    def start(self, like: Tensor, ranks: Ranks, older: Any, seed: int) -> PooledFrame:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The older frame where its ranks are these, else the frame of these ranks; nothing is drawn."""
        if isinstance(older, PooledFrame) and older.ranks == ranks:
            return older
        sizes = tuple(like.shape[like.ndim - len(ranks) :])
        return PooledFrame(sizes, ranks, like.dtype, like.device)

    def _compressed(self, shape: tuple[int, ...], side: Side) -> tuple[int, ...]:
        found = super()._compressed(shape, "right" if side == "auto" else side)
        return found if side == "both" else found[-1:]
