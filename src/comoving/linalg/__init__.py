"""Dense linear algebra of the engine: products along tensor modes and orthonormal bases."""

from .leading import Method, leading_directions, unit_size
from .multilinear import abs_squared, add_multilinear, all_but_one, correlate, gram, inner, multilinear, norm, unfold
from .orthogonal import leading_eigenvectors, orthogonality_defect, orthonormalize, reorthonormalize

__all__ = [
    "Method",
    "abs_squared",
    "add_multilinear",
    "all_but_one",
    "correlate",
    "gram",
    "inner",
    "leading_directions",
    "leading_eigenvectors",
    "multilinear",
    "norm",
    "orthogonality_defect",
    "orthonormalize",
    "reorthonormalize",
    "unfold",
    "unit_size",
]
