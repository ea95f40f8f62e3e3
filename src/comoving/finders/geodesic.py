"""Ways on the Grassmann manifold, the manifold of subspaces (Edelman, Arias and Smith, 1998)."""

import torch
from torch import Tensor

from ..decompositions.eigenvectors import leading_eigenvectors
from ..linalg import reorthonormalize


def tangent(frame: Tensor, x: Tensor) -> Tensor:
    """(I - U U^H) x, (*rows, d, r): what of x turns the span of the frame U.

    Twice, for what is left may be small beside x.
    """
    for _ in range(2):
        x = x - frame @ (frame.mH @ x)
    return x


def leading_plane(t: Tensor, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` leading singular triples of T, (*rows, d, r), with entries of about 1 at most.

    Returns:
        U (*rows, d, count), zero where sigma is; sigma (*rows, 1, count), real; V (*rows, r, count).
    """
    v = leading_eigenvectors(t.mH @ t, count)
    images = t @ v
    sigma = torch.linalg.vector_norm(images, dim=-2, keepdim=True)
    return images / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), sigma, v


def turned(frame: Tensor, u: Tensor, v: Tensor, theta: Tensor) -> Tensor:
    """The frame U after the way exp(theta u v^H): U + (U V (cos theta - 1) + u sin theta) V^H, orthonormal.

    Args:
        frame: (*rows, d, r).
        u: (*rows, d, k), orthonormal and orthogonal to the frame; what is zero turns nothing, where theta is 0.
        v: (*rows, r, k), orthonormal.
        theta: (*rows, 1, k), real.
    """
    step = (frame @ v) * (theta.cos() - 1) + u * theta.sin()
    return reorthonormalize(frame + step @ v.mH)
