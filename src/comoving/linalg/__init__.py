"""Dense linear algebra of the engine: products along tensor modes and orthonormal bases."""

from .cosine import cosine_columns, cosine_transform
from .multilinear import abs_squared, add_multilinear, correlate, gram, inner, multilinear, norm, unfold
from .orthogonal import (
    leading_eigenvectors,
    leading_singular,
    orthogonality_defect,
    orthonormalize,
    reorthonormalize,
    to_unit,
)

__all__ = [
    "abs_squared",
    "add_multilinear",
    "correlate",
    "cosine_columns",
    "cosine_transform",
    "gram",
    "inner",
    "leading_eigenvectors",
    "leading_singular",
    "multilinear",
    "norm",
    "orthogonality_defect",
    "orthonormalize",
    "reorthonormalize",
    "to_unit",
    "unfold",
]
