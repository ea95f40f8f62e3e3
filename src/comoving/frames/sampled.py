"""Frames that are sampled from a known basis or drawn from a seed: the state holds integers only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..codecs import Spec
from ..draws import gaussian, gaussian_rows, scramble
from ..linalg import cosine_columns, orthonormalize
from ..validate import check_choice
from .base import Ranks
from .modes import ModeFrame, Modes, stacked


@dataclass(frozen=True)
class CosineFrame(ModeFrame):
    """U_n = columns of the orthonormal DCT-II matrix of size d_n.

    Args:
        factors: the columns.
        indices: which ones, (*rows, r_n) int64, or None where the mode is whole.
    """

    indices: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, indices: tuple[Tensor | None, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Self:
        """The frame of these columns, built; the shape is that of one row."""
        pairs = zip(indices, shape, strict=True)
        return cls(tuple(None if k is None else cosine_columns(d, k, dtype) for k, d in pairs), indices)

    @classmethod
    def stack(cls, frames: Sequence[Any]) -> Self:
        """Frames without rows, of the same ranks, as the rows of one."""
        return cls(stacked([frame.factors for frame in frames]), stacked([frame.indices for frame in frames]))

    def tensors(self) -> dict[str, Tensor]:
        """{"frame.n.indices": (*rows, r_n)} for the compressed modes."""
        return {f"frame.{n}.indices": k for n, k in enumerate(self.indices) if k is not None}


@dataclass(frozen=True)
class Cosines(Modes):
    """Modes whose factors are columns of the DCT-II matrix (DCT-AdamW, arXiv 2505.17967); the state holds indices.

    Args:
        min_size: as for :class:`Modes`.
    """

    makes = CosineFrame

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """The indices."""
        return {f"frame.{n}.indices": Spec((r,), torch.int64) for n, r in enumerate(ranks) if r is not None}

    def load(self, state: Mapping[str, Tensor], shape: tuple[int, ...], like: Tensor | None = None) -> CosineFrame:
        """The frame whose indices are in the state, with factors in like's dtype."""
        indices = tuple(state.get(f"frame.{n}.indices") for n in range(len(shape)))
        return CosineFrame.of(indices, shape, torch.get_default_dtype() if like is None else like.dtype)

    def start(self, like: Tensor, ranks: Ranks, older: Any, seed: int) -> CosineFrame:
        """The older frame's first columns, then the lowest frequencies; nothing is drawn."""
        if isinstance(older, CosineFrame) and older.ranks == ranks:
            return older
        known = older.indices if isinstance(older, CosineFrame) else (None,) * like.ndim
        indices = tuple(
            None if r is None else _extended(k, d, r, like.device)
            for k, d, r in zip(known, like.shape, ranks, strict=True)
        )
        return CosineFrame.of(indices, tuple(like.shape), like.dtype)


def _extended(kept: Tensor | None, d: int, r: int, device: torch.device) -> Tensor:
    every = torch.arange(d, device=device)
    if kept is None:
        return every[:r].clone()  # a slice would keep all of them alive
    order = torch.zeros_like(every).index_fill_(0, kept, 1).argsort(stable=True)
    return torch.cat([kept[:r], every[order][: max(0, r - kept.shape[0])]])


Seed = int | tuple[int, ...]
"""What one factor is drawn from: a number, or one for each row."""


@dataclass(frozen=True)
class SeededFrame(ModeFrame):
    """U_n = the orthonormalized Gaussian matrix of a seed.

    Args:
        factors: the bases, (*rows, d_n, r_n).
        seeds: of each, or None where the mode is whole.
        stored: whether the state holds the bases too.
    """

    seeds: tuple[Seed | None, ...]
    stored: bool = False

    @classmethod
    def of(
        cls, seeds: tuple[Seed | None, ...], shape: tuple[int, ...], ranks: Ranks, like: Tensor, stored: bool = False
    ) -> Self:
        """The frame of these seeds and ranks, drawn, in like's dtype and on its device; the shape is one row's."""
        factors = tuple(
            None if seed is None or r is None else orthonormalize(_drawn((d, r), like, seed), trusted=True)
            for seed, d, r in zip(seeds, shape, ranks, strict=True)
        )
        return cls(factors, seeds, stored)

    @classmethod
    def stack(cls, frames: Sequence[Any]) -> Self:
        """Frames without rows, of the same ranks, as the rows of one."""
        seeds = tuple(None if None in mode else mode for mode in zip(*(frame.seeds for frame in frames), strict=True))
        return cls(stacked([frame.factors for frame in frames]), seeds, frames[0].stored)

    def next(self) -> "SeededFrame":
        """Another frame like this one, each seed made from the last."""
        seeds = tuple(None if seed is None else _following(seed) for seed in self.seeds)
        drawn = [u for u in self.factors if u is not None]
        shape = tuple(1 if u is None else u.shape[-2] for u in self.factors)
        return SeededFrame.of(seeds, shape, self.ranks, drawn[0], self.stored) if drawn else self

    def tensors(self) -> dict[str, Tensor]:
        """{"frame.n.seed": int64 on the host, (*rows)} for compressed modes, and the bases, or their ranks.

        A rank is a single int64 on the host, the same for all rows.
        """
        seeds = {f"frame.{n}.seed": _on_host(seed) for n, seed in enumerate(self.seeds) if seed is not None}
        if self.stored:
            return super().tensors() | seeds
        return seeds | {f"frame.{n}.rank": _on_host(rank) for n, rank in enumerate(self.ranks) if rank is not None}


def _drawn(shape: tuple[int, int], like: Tensor, seed: Seed) -> Tensor:
    """The Gaussian matrix of a seed, or those of all rows, each as it is drawn alone."""
    return gaussian(shape, like, seed) if isinstance(seed, int) else gaussian_rows(shape, like, seed)


def _following(seed: Seed) -> Seed:
    return scramble(seed) if isinstance(seed, int) else tuple(map(scramble, seed))


def _on_host(number: Seed) -> Tensor:
    return torch.tensor(number, device="cpu")


def _read(seed: Tensor | None) -> Seed | None:
    """A seed in the state as a number, or those of all rows."""
    if seed is None:
        return None
    return tuple(seed.tolist()) if seed.ndim else int(seed)


@dataclass(frozen=True)
class Seeded(Modes):
    """Modes whose factors are drawn from seeds; the state holds the seeds, and the ranks.

    A factor is drawn anew whenever the frame is loaded, once or twice a step, which costs 2 d r^2 operations and no
    memory between steps.

    Args:
        min_size: as for :class:`Modes`.
        stored: keep the factors beside the seeds, d r numbers a mode, and draw at a refresh only.
    """

    stored: bool = False
    makes = SeededFrame

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stored", self.stored, (True, False))

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """The seeds, and the factors where they are stored, else the ranks."""
        number, modes = Spec((), torch.int64, scalar=True), [n for n, r in enumerate(ranks) if r is not None]
        seeds = {f"frame.{n}.seed": number._replace(seed=True) for n in modes}
        if self.stored:
            return super().schema(shape, ranks, dtype) | seeds
        return seeds | {f"frame.{n}.rank": number for n in modes}

    def load(self, state: Mapping[str, Tensor], shape: tuple[int, ...], like: Tensor | None = None) -> SeededFrame:
        """The frame whose seeds and ranks are in the state, drawn in like's dtype.

        Raises:
            ValueError: like, a tensor of the core's shape with the rows in front, is missing or has another shape, or
                a rank is.
        """
        seeds = tuple(_read(state.get(f"frame.{n}.seed")) for n in range(len(shape)))
        if self.stored:
            return SeededFrame(super().load(state, shape, like).factors, seeds, stored=True)
        if all(seed is None for seed in seeds):
            return SeededFrame((None,) * len(shape), seeds)
        said = [state.get(f"frame.{n}.rank") for n in range(len(shape))]
        ranks = tuple(None if rank is None else int(rank) for rank in said)
        lead = tuple(len(seed) for seed in seeds if isinstance(seed, tuple))[:1]
        core = (*lead, *(d if r is None else r for d, r in zip(shape, ranks, strict=True)))
        fits = all(r is not None and 1 <= r <= d for r, s, d in zip(ranks, seeds, shape, strict=True) if s is not None)
        if like is None or tuple(like.shape) != core or not fits:
            has = None if like is None else tuple(like.shape)
            raise ValueError(f"a core of shape {has} belongs to no frame of ranks {ranks} of a tensor of shape {shape}")
        return SeededFrame.of(seeds, shape, ranks, like)

    def start(self, like: Tensor, ranks: Ranks, older: Any, seed: int) -> SeededFrame:
        """The older frame where its ranks are these, else its seeds at these ranks; without one, seeds from ``seed``.

        Of another rank a seed draws another basis: moments move by the overlap of the two.
        """
        if isinstance(older, SeededFrame) and older.ranks == ranks:
            return older
        known = older.seeds if isinstance(older, SeededFrame) else (None,) * like.ndim
        seeds = tuple(
            None if r is None else scramble(seed, n) if old is None else old
            for n, (r, old) in enumerate(zip(ranks, known, strict=True))
        )
        return SeededFrame.of(seeds, tuple(like.shape), ranks, like, self.stored)
