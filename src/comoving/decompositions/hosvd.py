"""Tucker factors of a tensor from its unfoldings: HOSVD, the sequentially truncated one, and sweeps of HOOI."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from ..linalg import multilinear
from ..linalg.checks import per_mode, require_dtype, require_order
from .leading import Method, leading_directions

Factors = Sequence[Tensor | None]


def hosvd(
    x: Tensor,
    ranks: int | Sequence[int],
    *,
    sequential: bool = False,
    sweeps: int = 0,
    method: Method = "svd",
    order: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    r"""Core and factors of a Tucker approximation x ~ core x_1 U_1 ... x_N U_N.

    U_n holds the r_n leading left singular vectors of the unfolding X_(n): the truncated higher-order SVD (De
    Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000). With ``sequential``, those of x x_m U_m^H over
    the modes m that are done, the one that shrinks most first (ST-HOSVD; Vannieuwenhoven, Vandebril, Meerbergen, SIAM
    J. Sci. Comput. 34, 2012). The error of either is at most sqrt(N) times that of the best factors. Each of the
    ``sweeps`` makes every U_n anew from x x_m U_m^H over all m != n (HOOI; De Lathauwer et al., the same volume), and
    none raises the error.

    Gauge and gradient are those of :func:`leading_directions`: differentiable where the loss depends on the spans or,
    as the product of core and factors does, on core and factors together.

    Args:
        x: (*batch, d_1, ..., d_N), N >= 2, float32, float64, complex64 or complex128, finite (not checked); for "gram"
            with entries of about 1.
        ranks: r_n in [1, d_n], one integer for all modes or one each.
        sequential: whether each mode sees x projected on the factors before.
        sweeps: >= 0.
        method: of :func:`leading_directions`.
        order: N, where x has batch dimensions; default all of x's.

    Returns:
        The core (*batch, r_1, ..., r_N) and the factors U_n (*batch, d_n, r_n), orthonormal columns.

    Raises:
        TypeError: for half precision and integers.
        ValueError: for ranks or sweeps outside their intervals, or N < 2.
    """
    require_dtype("hosvd", x)
    order = require_order("hosvd", x, order, 2)
    if sweeps < 0:
        raise ValueError(f"hosvd: sweeps = {sweeps} is outside [0, inf)")
    sizes, rows = list(x.shape[x.ndim - order :]), x.ndim - order
    kept = per_mode("hosvd: ranks", ranks if isinstance(ranks, int) else list(ranks), sizes)

    def find(seen: Tensor, mode: int) -> Tensor:
        return leading_directions(seen, mode, kept[mode], method, rows)

    modes = by_shrinkage(sizes, kept) if sequential else list(range(order))
    factors = sweep(x, [None] * order, modes, find) if sequential else {n: find(x, n) for n in modes}
    for _ in range(sweeps):
        factors = sweep(x, [factors[n] for n in range(order)], modes, find)
    found = [factors[n] for n in range(order)]
    return multilinear(x, [u.mH for u in found]), found


def sweep(x: Tensor, known: Factors, modes: Iterable[int], find: Callable[[Tensor, int], Tensor]) -> dict[int, Tensor]:
    """One factor after the other, from x projected on the new factors so far and on the known ones of modes to come.

    Args:
        x: (*batch, d_1, ..., d_N), N the number of ``known``.
        known: U_n to project on until a new one is there, or None: all None for the ST-HOSVD, the last factors for a
            sweep of HOOI.
        modes: those that get a factor, in this order.
        find: the factor of a mode, orthonormal, from what is seen of x.
    """
    waiting, factors = list(modes), dict[int, Tensor]()
    while waiting:
        n = waiting.pop(0)
        seen = multilinear(x, [u.mH if m in waiting and u is not None else None for m, u in enumerate(known)])
        factors[n] = found = find(seen, n)
        if waiting:
            x = multilinear(x, [found.mH if m == n else None for m in range(len(known))])
    return factors


def by_shrinkage(sizes: Sequence[int], ranks: Sequence[int | None]) -> list[int]:
    """The modes that have a rank, that of the smallest r_n/d_n first."""
    shares = {n: r / d for n, (d, r) in enumerate(zip(sizes, ranks, strict=True)) if r is not None}
    return sorted(shares, key=lambda n: shares[n])
