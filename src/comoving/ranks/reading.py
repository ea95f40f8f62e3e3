"""What a gradient says about a frame, and which of the frame's directions it speaks for."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import abs_squared, eigh, gram, multilinear, norm, orthonormalize, unfold
from .base import Reading

Directions = Sequence[Tensor | None]
"""A unitary V_n per compressed mode: the columns of U_n V_n are the principal directions of the momentum F m."""


def read(frame: ModeFrame, gradient: Tensor, momentum: Tensor) -> tuple[Reading | None, Directions]:
    """The reading, None for a gradient of zero, and the principal directions, those with most momentum first.

    The directions come from the momentum, which has not seen this gradient; their energies from the gradient. Principal
    directions of the gradient itself would promise more than they hold for the next one. One contraction of the
    gradient per compressed mode, one eigenproblem of the frame's rank, one read on the host.

    Args:
        frame: in use.
        gradient: of the full shape.
        momentum: m in the frame.
    """
    total, spectra, directions = norm(gradient), list[Tensor](), list[Tensor | None]()
    for n, u in enumerate(frame.factors):
        if u is None:
            directions.append(None)
            continue
        v = _principal(momentum, n)
        matrices = [(u @ v).mH if m == n else None for m in range(gradient.ndim)]
        z = multilinear(gradient, matrices) / total.clamp_min(torch.finfo(total.dtype).tiny)
        spectra.append(abs_squared(unfold(z, n, z.ndim)).sum(-1, dtype=torch.float64))
        directions.append(v)
    figures: list[float] = torch.cat([total.double().reshape(1), *spectra]).tolist()
    if not figures[0] > 0 or not all(map(isfinite, figures)):
        return None, directions
    shares = iter(figures[1:])
    return Reading(
        tuple(None if u is None else tuple(next(shares) for _ in range(u.shape[-1])) for u in frame.factors)
    ), directions


def _principal(m: Tensor, mode: int) -> Tensor:
    """Eigenvectors of m_(n) m_(n)^H, largest first, in m's dtype."""
    square = gram(m / m.abs().amax().clamp_min(torch.finfo(m.dtype).tiny), mode, m.ndim)
    vectors = eigh(square.to(torch.complex128 if m.is_complex() else torch.float64))[1]
    return vectors.flip(-1).to(m.dtype)


def leading(frame: ModeFrame, directions: Directions, ranks: Ranks) -> ModeFrame:
    """The frame, cut to its first principal directions in every mode that shall have fewer."""
    return ModeFrame(
        tuple(
            u if u is None or v is None or r is None or r >= u.shape[-1] else orthonormalize(u @ v[:, :r])
            for u, v, r in zip(frame.factors, directions, ranks, strict=True)
        )
    )
