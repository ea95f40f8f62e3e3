"""Matrices made orthogonal, and what is made of them before and after."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..linalg import svd

Triple = tuple[float, float, float]

QUINTIC: Triple = (3.4445, -4.7750, 2.0315)
"""Jordan's (a, b, c): steepest at zero, and nowhere above 1.21."""
_SAFETY = 1.01
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.287212018145624, -23.59588651909883, 17.300387312530926),
    (4.1070591115422, -2.94784991673791, 0.5448431082926602),
    (3.9486908534822938, -2.9089021159629462, 0.551819139437013),
    (3.3184196573706, -2.4884880243148744, 0.5100489401237202),
    (2.3006520199548177, -1.6689039845747486, 0.41880731195256665),
    (1.891301407787398, -1.2679958271945864, 0.3768040894852481),
    (1.8750014808497517, -1.2500016453925884, 0.3750001645437607),
    (1.875, -1.25, 0.375),
)
"""Before the safety factor: each the best of its degree for the interval that the last one leaves of [1e-3, 1], or for
the upper 97.6% of it (the cushion 0.02407), so that little of it is far below the mean; the last one is Taylor's."""


def triples(coefficients: str | Triple, steps: int) -> tuple[list[Triple], float]:
    """(a, b, c) of each iteration, and the factor by which x is divided before the first.

    "quintic" is :data:`QUINTIC` at every step, any other three numbers likewise. "polar-express" are the polynomials of
    arXiv 2505.16932, Algorithm 2: p_t(x / 1.01) for all but the eighth, which has nothing to be safe from and is taken
    from then on, and x / 1.01 at the start, so that rounding in bfloat16 cannot leave the interval they converge on.
    """
    if coefficients == "polar-express":
        *first, last = _POLAR_EXPRESS
        safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in first]
        return [*safe[:steps], *[last] * (steps - len(safe))], _SAFETY
    fixed: Any = QUINTIC if isinstance(coefficients, str) else coefficients
    return [fixed] * steps, 1.0


def newton_schulz(
    x: Tensor, coefficients: Sequence[Triple], eps: float, dtype: torch.dtype, safety: float = 1.0
) -> Tensor:
    """X <- a X + (b X X^H + c (X X^H)^2) X once for each (a, b, c), a new tensor of x's shape (*batch, m, n).

    It begins with x / max(|x|, eps) / safety, and is iterated in ``dtype``.
    """
    tall = x.shape[-2] > x.shape[-1]
    start = _normalized(x.mT if tall else x, (-2, -1), eps)
    start = (start if safety == 1.0 else start.div_(safety)).to(dtype)
    count = prod(start.shape[:-2])
    # A single matrix is multiplied a fifth faster than a batch of one (bfloat16, 1024 x 1024, on a CPU).
    add = torch.addmm if count == 1 else torch.baddbmm
    matrices = start.reshape(start.shape[-2:] if count == 1 else (count, *start.shape[-2:]))
    for a, b, c in coefficients:
        gram = matrices @ matrices.mH
        polynomial = add(gram, gram, gram, beta=b, alpha=c)
        matrices = add(matrices, polynomial, matrices, beta=a)
    result = matrices.reshape(start.shape).to(x.dtype)
    return result.mT if tall else result


def polar(x: Tensor) -> Tensor:
    """U_r V_r^H over the singular values above rounding, a new tensor of x's shape (*batch, m, n).

    Rows and columns of zeros stay zero, as they do under :func:`newton_schulz`, where rounding would leave something
    that may be brought to unit length.
    """
    u, s, vh = svd(x)
    kept = s > max(x.shape[-2:]) * torch.finfo(s.dtype).eps * s[..., :1]
    seen = x != 0
    left, right = seen.any(-1, keepdim=True), seen.any(-2, keepdim=True)
    return ((u * kept.unsqueeze(-2)) @ vh).mul_(left).mul_(right)


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """x_i / max(|x_i|, eps) for each row of (*batch, m, n), a new tensor; rows of zeros stay zero."""
    return _normalized(x, (-1,), eps)


def unit_columns(x: Tensor, eps: float) -> Tensor:
    """:func:`unit_rows` of the columns."""
    return _normalized(x, (-2,), eps)


def _normalized(x: Tensor, over: tuple[int, ...], eps: float) -> Tensor:
    """x / max(|x|, eps) for each slice, a new tensor; squares of the entries may leave float32's range."""
    tiny = torch.finfo(x.dtype).tiny
    largest = x.abs().amax(over, True) if x.is_complex() else torch.maximum(x.amax(over, True), -x.amin(over, True))
    unit = largest.clamp_min(tiny)
    scaled = x / unit
    size = torch.linalg.vector_norm(scaled, dim=over, keepdim=True)
    # |x| = unit size; x / max(|x|, eps) = scaled / max(size, eps / unit), and eps / unit may be inf for x = 0.
    return scaled.div_(torch.maximum(size, eps / unit).clamp_min(tiny))
