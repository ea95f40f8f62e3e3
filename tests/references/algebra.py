"""The few matrix notions every reference needs, in their textbook form.

unfold: O_(n), the d_n x (product of the others) matrix of mode n, row-major in the remaining modes.
basis:  B = U_1 (x) ... (x) U_N acts on row-major vectors, vec(z x_1 U_1 ... x_N U_N) = B vec(z); None stands for I.
"""

import math

import torch


def unfold(x, mode):
    """O_(n)."""
    return x.movedim(mode, 0).reshape(x.shape[mode], -1)


def mode_product(x, matrix, mode):
    """Return x x_n matrix: the fibres of mode n multiplied by the matrix, Y_(n) = M X_(n)."""
    rest = x.movedim(mode, 0).shape[1:]
    return (matrix @ unfold(x, mode)).reshape(matrix.shape[0], *rest).movedim(0, mode)


def basis(factors, shape, dtype):
    """B = U_1 (x) ... (x) U_N, as one explicit matrix of (full x core) entries."""
    big = torch.ones(1, 1, dtype=dtype)
    for factor, size in zip(factors, shape, strict=True):
        matrix = torch.eye(size, dtype=dtype) if factor is None else factor.to(dtype)
        rows, columns = big.shape[0] * matrix.shape[0], big.shape[1] * matrix.shape[1]
        # not torch.kron: it refuses some of LAPACK's column-major factors
        big = torch.einsum("ij,kl->ikjl", big, matrix).reshape(rows, columns)
    return big


def core_shape(factors, shape):
    """(r_1, ..., r_N), with r_n = d_n where the mode is whole."""
    return tuple(size if f is None else f.shape[1] for f, size in zip(factors, shape, strict=True))


def left_singular(matrix, rank):
    """U[:, :r] of the exact SVD."""
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def hosvd(ranks):
    """Finder: U_n = the leading left singular vectors of each unfolding O_(n); a rank of None leaves the mode whole."""

    def find(operand, old_factors):
        return [None if r is None else left_singular(unfold(operand, n), r) for n, r in enumerate(ranks)]

    return find


def power(ranks):
    """Finder: U_n' = orth(O_(n) O_(n)^H U_n) by QR, the other modes not projected; the first frame is the HOSVD."""

    def find(operand, old_factors):
        if old_factors is None:
            return hosvd(ranks)(operand, None)
        found = []
        for n, old in enumerate(old_factors):
            o = unfold(operand, n)
            found.append(None if old is None else torch.linalg.qr(o @ (o.mH @ old))[0])
        return found

    return find


def every(period, phase=0):
    """Schedule refresh_at(t), t = finished steps: t = 0 always, then whenever t = phase modulo the period."""
    return lambda t: t == 0 or t % period == phase % period


def update_scale(scale, full, core):
    """ "match" = sqrt(full/core), "0.2-match" = 0.2 of it, or the number itself."""
    if scale == "match":
        return math.sqrt(full / core)
    if scale == "0.2-match":
        return 0.2 * math.sqrt(full / core)
    return float(scale)


def real_zeros(shape):
    """A second moment: real, whatever the gradient is."""
    return torch.zeros(shape, dtype=torch.float64)
