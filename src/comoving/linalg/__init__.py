"""Dense linear algebra: products along tensor modes, orthonormal bases, QR, sampled Tucker factors and trains."""

from .checks import trouble
from .cosine import cosine_columns, cosine_transform
from .decompositions import WIDE, asks_host, eigh, pinv, qr, qr_triangle, svd
from .entries import abs_squared, each_row, inner, largest, lerp, lerp_, norm, over, pairs, quotient, sgn_
from .incremental import incremental_qr
from .kronecker import (
    InverseRoot,
    add_gram,
    bounded,
    in_order,
    inverse_root,
    leading_basis,
    multiply_factors,
    standing_root,
    turned_basis,
)
from .leading import Method, leading_directions, unit_size
from .multilinear import add_multilinear, all_but_one, correlate, gram, multilinear, unfold
from .nystrom import nystrom_tucker
from .orthogonal import (
    leading_eigenvectors,
    leading_singular,
    orthogonality_defect,
    orthonormalize,
    reorthonormalize,
    to_unit,
)
from .singular import leading_left_vectors
from .trains import tt_randomized, tt_svd
from .tsqr import tsqr, tsqr_r

__all__ = [
    "WIDE",
    "InverseRoot",
    "Method",
    "abs_squared",
    "add_gram",
    "add_multilinear",
    "all_but_one",
    "asks_host",
    "bounded",
    "correlate",
    "cosine_columns",
    "cosine_transform",
    "each_row",
    "eigh",
    "gram",
    "in_order",
    "inner",
    "largest",
    "incremental_qr",
    "inverse_root",
    "leading_basis",
    "leading_directions",
    "leading_eigenvectors",
    "leading_left_vectors",
    "leading_singular",
    "lerp",
    "lerp_",
    "multilinear",
    "multiply_factors",
    "norm",
    "nystrom_tucker",
    "orthogonality_defect",
    "orthonormalize",
    "over",
    "pairs",
    "pinv",
    "qr",
    "qr_triangle",
    "quotient",
    "reorthonormalize",
    "sgn_",
    "standing_root",
    "svd",
    "tsqr",
    "tsqr_r",
    "tt_randomized",
    "tt_svd",
    "turned_basis",
    "to_unit",
    "trouble",
    "unfold",
    "unit_size",
]
