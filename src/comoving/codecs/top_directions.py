"""4-bit storage with the strongest directions apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import cosine_columns, largest, norm, orthonormalize_unseen, over, pairs
from ..validate import check_float, check_int
from . import companding
from .base import Spec
from .grid import Grid, grid
from .root import Root, root

_RANGE = torch.finfo(torch.float32)
_PARTS = ("left", "right", "rest")


@dataclass(frozen=True)
class TopDirections:
    """x ~ size (U S + R) in 4 bits each, for what is orthogonalized afterwards (MuonQ, arXiv 2605.11396).

    x is seen as a matrix m x n, its first mode against all others. With y = x / |x| and V = S of the last time with its
    rows at unit length, k of them,

    U = orth(y V^H),   S = U^H y,   R = y - U S,   size = |x|

    U by columns, S and R by rows, each in blocks companded by the mu-law (:func:`comoving.codecs.companding.compress`).
    Rounding x as it is leaves errors as large as its strong directions ask for in all of them, and orthogonalization
    makes the weak ones as large as the strong. Here each part is rounded by its own size: of a matrix with a few strong
    directions the polar factor is then off by less than half as much (a test), though x itself is off by more. The
    first V has columns of the cosine transform, from the second on; one step of the power iteration follows at every
    encoding.

    The paper has one scale for all of U's column and S's row: here blocks are shorter where these are long.

    Args:
        rank: k over min(m, n), rounded down, in [0, 1); with k = 0 there is R alone.
        block: largest number of reals in a block, >= 8.
        mu: > 0.
    """

    batched: ClassVar[bool] = True
    signed = True

    rank: float = 1 / 16
    block: int = 256
    mu: float = 255.0

    def __post_init__(self) -> None:
        check_float("rank", self.rank, 0.0, 1.0, open_high=True)
        check_int("block", self.block, 8)
        check_float("mu", self.mu, 0.0, open_low=True)

    @property
    def positive(self) -> Root:
        """Roots in as many bits."""
        return root(self.block, bits=4)

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """Codes, uint8, and steps, float32, of "left" (k, m), "right" (k, n) and "rest"; and "size" (1, 1, 1).

        Those of "right" are kept from one encoding to the next.
        """
        found = dict[str, Spec]()
        for part, own in self._shapes(shape).items():
            cut, kept = grid(own, dtype, self.block), part == "right"
            codes = Spec((cut.rows, cut.blocks, (cut.width + 1) // 2), torch.uint8, kept=kept)
            found |= {f"{part}.codes": codes, f"{part}.step": Spec((cut.rows, cut.blocks, 1), torch.float32, kept=kept)}
        return found | {"size": Spec((1, 1, 1), torch.float32)}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """size (U S + R), a new tensor."""
        shapes, size = self._shapes(shape), stored["size"]
        lead = tuple(size.shape[:-3])
        x = self._expanded(stored, "rest", shape, dtype)
        if "left" in shapes:
            left, right = (self._expanded(stored, part, shapes[part], dtype) for part in ("left", "right"))
            x = x.add_((left.mT @ right).view(lead + shape))
        return x.mul_(size.reshape((*lead, *[1] * len(shape))))

    def decode_onto(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """x plus the stored tensor."""
        return self.decode(stored, tuple(x.shape)[stored["size"].ndim - 3 :], x.dtype).add_(x)

    def encode(self, x: Tensor, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """A step of the power iteration from the last S, and all three parts."""
        shape = tuple(x.shape)[rows:]
        shapes, most = self._shapes(shape), largest(x, rows)
        # Squares of the entries may leave the range.
        y = x / over(most.clamp_min(torch.finfo(x.dtype).tiny), x)
        length = norm(y, rows)
        y = y.div_(over(torch.where(length > 0, length, 1), y))
        size = most * length
        stored["size"].copy_(size.clamp(_RANGE.tiny, _RANGE.max).view(stored["size"].shape))
        if "left" in shapes:
            m, n = shapes["left"][1], shapes["right"][1]
            matrix = y.reshape(*y.shape[:rows], m, n)
            last = self._expanded(stored, "right", shapes["right"], x.dtype)
            u = orthonormalize_unseen(matrix @ _directions(last).mH)
            s = u.mH @ matrix
            y = (matrix - u @ s).view(y.shape)
            self._compress(u.mT, stored, "left", shapes["left"], rows)
            self._compress(s, stored, "right", shapes["right"], rows)
        self._compress(y, stored, "rest", shape, rows)
        return size

    def scaled(self, stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """What is stored times a factor > 0."""
        return {**stored, "size": stored["size"] * factor}

    def error(self, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """size (|R's| + |U's| (|S| + |S's|) + |U| |S's|), with |.'s| the bounds of each part's rounding."""
        lost = {
            part: norm(companding.gaps(stored[f"{part}.codes"], stored[f"{part}.step"], self.mu), rows)
            for part in _PARTS
            if f"{part}.codes" in stored
        }
        total = lost["rest"]
        if "left" in lost:
            k = stored["left.codes"].shape[rows]
            # |U| <= sqrt(k) + |U's|, and |S| <= |y| = 1.
            total = total + lost["left"] * (1 + lost["right"]) + k**0.5 * lost["right"]
        return total * stored["size"].view(total.shape)

    def _shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of the parts; of the rest alone for what is no matrix, or has too few directions."""
        m, n = (shape[0], prod(shape[1:])) if len(shape) > 1 else (0, 0)
        k = int(min(m, n) * self.rank)
        return ({"left": (k, m), "right": (k, n)} if k else {}) | {"rest": shape}

    def _cut(self, shape: tuple[int, ...], dtype: torch.dtype) -> Grid:
        return grid(shape, dtype, self.block)

    def _expanded(self, stored: Mapping[str, Tensor], part: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        codes, step, cut = stored[f"{part}.codes"], stored[f"{part}.step"], self._cut(shape, dtype)
        return companding.expand(codes, step, self.mu, cut, shape, dtype)

    def _compress(self, x: Tensor, stored: Mapping[str, Tensor], part: str, shape: tuple[int, ...], rows: int) -> None:
        codes, step = companding.compress(x, self.mu, self._cut(shape, x.dtype), rows)
        stored[f"{part}.codes"].copy_(codes)
        stored[f"{part}.step"].copy_(step)


def _directions(s: Tensor) -> Tensor:
    """V, (*rows, k, n): the rows of S at unit length, or what the iteration begins with where there is none."""
    k, n = s.shape[-2:]
    length = torch.linalg.vector_norm(pairs(s).flatten(s.ndim - 1), dim=-1, keepdim=True)
    # Not the constant one: normalized layers have gradients that are orthogonal to it, up to rounding.
    waves = cosine_columns(n, torch.arange(1, k + 1, device=s.device), s.dtype.to_real()).mT.to(s.dtype)
    return torch.where(length > 0, s / torch.where(length > 0, length, 1), waves)
