"""Matrices and tensors taken apart: batched over what stands in front, differentiable, and what the finders use.

Each is one algorithm in one place. What :mod:`comoving.linalg` has are the elementary things that they are made of:
products, norms, orthonormal bases, and LAPACK's factors, checked. Gradients are finite wherever the input is, at
coinciding and vanishing singular values too, unless a docstring says otherwise.
"""

from .eigenvectors import eigenvectors, leading_eigenvectors
from .hosvd import by_shrinkage, hosvd, sweep
from .incremental_qr import completed, incremental_qr
from .incremental_svd import incremental_svd, turning
from .leading import Method, leading_directions, spanning
from .nystroem import fibres, nystroem_tucker, sampled_factor
from .singular import leading_left_vectors
from .trains import tt_randomized, tt_svd
from .tsqr import tsqr, tsqr_r

__all__ = [
    "Method",
    "by_shrinkage",
    "completed",
    "eigenvectors",
    "fibres",
    "hosvd",
    "incremental_qr",
    "incremental_svd",
    "leading_directions",
    "leading_eigenvectors",
    "leading_left_vectors",
    "nystroem_tucker",
    "sampled_factor",
    "spanning",
    "sweep",
    "tsqr",
    "tsqr_r",
    "tt_randomized",
    "tt_svd",
    "turning",
]
