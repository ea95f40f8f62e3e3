"""What a gradient says about a frame, and which of the frame's directions it speaks for."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import gram, multilinear, norm, orthonormalize
from .base import Reading

Directions = Sequence[Tensor | None]
"""A unitary V_n per compressed mode: the columns of U_n V_n are the principal directions of g_(n) inside U_n."""


def read(frame: ModeFrame, gradient: Tensor) -> tuple[Reading | None, Directions]:
    """The reading, None for a gradient of zero, and the principal directions, most energetic first.

    One contraction of the gradient per compressed mode, one eigenproblem of the frame's rank, one read on the host.
    """
    total, spectra, directions = norm(gradient), list[Tensor](), list[Tensor | None]()
    for n, u in enumerate(frame.factors):
        if u is None:
            directions.append(None)
            continue
        down = [u.mH if m == n else None for m in range(gradient.ndim)]
        z = multilinear(gradient, down) / total.clamp_min(torch.finfo(total.dtype).tiny)
        square = gram(z, n, z.ndim)
        values, vectors = torch.linalg.eigh(square.to(torch.complex128 if square.is_complex() else torch.float64))
        spectra.append(values.flip(-1).clamp_min(0))
        directions.append(vectors.flip(-1).to(u.dtype))
    figures: list[float] = torch.cat([total.double().reshape(1), *spectra]).tolist()
    if not figures[0] > 0 or not all(map(isfinite, figures)):
        return None, [None] * len(frame.factors)
    shares = iter(figures[1:])
    return Reading(
        tuple(None if u is None else tuple(next(shares) for _ in range(u.shape[-1])) for u in frame.factors)
    ), directions


def leading(frame: ModeFrame, directions: Directions, ranks: Ranks) -> ModeFrame:
    """The frame, cut to its most energetic directions in every mode that shall have fewer."""
    return ModeFrame(
        tuple(
            u if u is None or v is None or r is None or r >= u.shape[-1] else orthonormalize(u @ v[:, :r])
            for u, v, r in zip(frame.factors, directions, ranks, strict=True)
        )
    )
