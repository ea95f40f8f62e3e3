"""Floating-point operations of one torch operation, from the shapes of its tensors."""

from math import prod
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def count(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Real multiplications and additions of an operation, to leading order.

    2 m n k for a product of (m, k) and (k, n); Golub and Van Loan's counts for decompositions of (m, n), m >= n: QR
    with Q 4 m n^2 - 4/3 n^3, thin SVD 6 m n^2 + 20 n^3, Hermitian eigenvectors 9 n^3, Cholesky n^3 / 3, triangular
    systems n^2 for each right-hand side; complex ones four times that. Everything else counts one for each entry that
    it reads or writes, whichever are more; views and empty tensors nothing.
    """
    kind: str = func._schema.name.removeprefix("aten::").rstrip("_")
    given = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    if not given:
        return 0
    field = 4 if any(x.is_complex() for x in given) else 1
    if kind in _PRODUCTS:
        a, b = given[-2:]
        return field * 2 * a.numel() * (b.shape[-1] if b.ndim > 1 else 1)
    if kind == "linalg_solve_triangular":
        return field * given[0].shape[-1] * given[1].numel()
    if kind in _DECOMPOSITIONS:
        a = given[0]
        batch, m, n = prod(a.shape[:-2]), max(a.shape[-2:]), min(a.shape[-2:])
        tall, cube = _DECOMPOSITIONS[kind]
        return field * batch * round(tall * m * n * n + cube * n**3)
    if all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        return 0
    made = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
    return max(*(x.numel() for x in given), *made, 0, 0)


_PRODUCTS = {"mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv"}
_DECOMPOSITIONS = {
    "linalg_qr": (4.0, -4 / 3),
    "_linalg_svd": (6.0, 20.0),
    "_linalg_eigh": (0.0, 9.0),
    "linalg_cholesky_ex": (0.0, 1 / 3),
}
"""Factors of m n^2 and of n^3."""
