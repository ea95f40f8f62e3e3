"""Eigenvectors of a Hermitian matrix, with a gradient that stays finite where eigenvalues coincide."""

from typing import Any, cast

import torch
from torch import Tensor

from ..linalg import eigh


def eigenvectors(hermitian: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues, ascending, and eigenvectors of A = V diag(w) V^H, of which the lower triangle is read.

    See :func:`comoving.linalg.eigh`, which always returns. Gradient, with P = V^H V̄ and F_ij = 1 / (w_j - w_i) over
    all pairs, and zero where |w_i - w_j| <= 64 machine epsilons times the largest |w|:

        Ā = V (diag(w̄) + (G + G^H)/2) V^H,   G = F ∘ P.

    Rotations inside a cluster of equal eigenvalues get no gradient; functions of the whole cluster's span have none to
    get, and theirs is exact. The phase of a complex vector is LAPACK's, and functions must not depend on it.
    Differentiable twice where the eigenvalues are distinct.

    Args:
        hermitian: (*batch, d, d), float32, float64, complex64 or complex128; finite (not checked).

    Returns:
        (*batch, d) real and (*batch, d, d), in the input's precision.

    Raises:
        TypeError: for half precision and integers.
    """
    if not (torch.is_grad_enabled() and hermitian.requires_grad):
        return eigh(hermitian)
    return cast("tuple[Tensor, Tensor]", _Eigenvectors.apply(hermitian))


def leading_eigenvectors(hermitian: Tensor, count: int) -> Tensor:
    """Eigenvectors of the ``count`` largest eigenvalues, largest first: (*batch, d, count), contiguous.

    Gradient and errors are those of :func:`eigenvectors`. The result is a copy: a slice would keep all d eigenvectors
    alive for as long as the frame lives.
    """
    vectors = eigenvectors(hermitian)[1]
    return vectors[..., -count:].flip(-1).contiguous()


class _Eigenvectors(torch.autograd.Function):
    @staticmethod
    def forward(hermitian: Tensor) -> tuple[Tensor, Tensor]:
        return eigh(hermitian)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        grad_values, grad_vectors = grad_outputs
        limit = 64 * torch.finfo(values.dtype).eps * values.detach().abs().amax(-1)[..., None, None]
        gap = values.unsqueeze(-2) - values.unsqueeze(-1)
        apart = gap.abs() > limit
        inverse = torch.where(apart, 1 / torch.where(apart, gap, 1), 0)
        g = (vectors.mH @ grad_vectors) * inverse
        inside = torch.diag_embed(grad_values.to(g.dtype)) + (g + g.mH) / 2
        return vectors @ inside @ vectors.mH
