"""Dense linear algebra of the engine: products along tensor modes and orthonormal bases."""

from .multilinear import abs_squared, add_multilinear, correlate, gram, inner, multilinear, norm, unfold
from .orthogonal import leading_eigenvectors, orthogonality_defect, orthonormalize, reorthonormalize

__all__ = [
    "abs_squared",
    "add_multilinear",
    "correlate",
    "gram",
    "inner",
    "leading_eigenvectors",
    "multilinear",
    "norm",
    "orthogonality_defect",
    "orthonormalize",
    "reorthonormalize",
    "unfold",
]
