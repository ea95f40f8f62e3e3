"""Tensor trains: TT-SVD with a QR before each SVD, and two randomized variants that read the tensor twice or once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import pinv
from ..linalg.checks import per_mode, require_dtype, require_order, require_within, train_rank_limits
from .singular import fix_gauge, leading_left_vectors, left_vectors
from .tsqr import tsqr


def tt_svd(
    x: Tensor,
    ranks: int | Sequence[int] | None = None,
    tolerance: float | None = None,
    *,
    order: int | None = None,
) -> list[Tensor]:
    r"""Tensor-train cores of x by TT-SVD (Oseledets, SIAM J. Sci. Comput. 33, 2011), left-orthogonal but the last.

    Bond by bond, the unfolding (r_{k-1} d_k) x (d_{k+1} ... d_N) of what is left keeps its r_k leading left singular
    vectors U_k; the next thing left is U_k^H times it. The error is at most sqrt(sum over bonds of what each cut off).
    Vectors, gauge, gradient and the rule for degenerate spectra are those of :func:`leading_left_vectors`: only a
    small factor of each large unfolding is decomposed. Differentiable twice where kept and dropped singular values are
    distinct; the ranks that a tolerance picks are constants.

    Args:
        x: (*batch, d_1, ..., d_N), N >= 2, float32, float64, complex64 or complex128, finite (not checked).
        ranks: r_1 ... r_{N-1}, or one integer as the most for all bonds. A tuple must fit: r_k at most
            min(d_1 ... d_k, d_{k+1} ... d_N); one integer is cut to what fits. Either is cut to r_{k-1} d_k.
        tolerance: the largest ||x - x'|| / ||x||, split evenly over the bonds; reads one number per bond on the host.
            In single precision, below about 1e-6 it is roundoff that decides. With ranks, both bounds apply. Batched:
            the rank that every entry needs.
        order: N, where x has batch dimensions; default all of x's.

    Returns:
        N cores (*batch, r_{k-1}, d_k, r_k), r_0 = r_N = 1.

    Raises:
        TypeError: for half precision and integers.
        ValueError: for neither ranks nor tolerance, ranks or tolerance outside their intervals, N < 2.
    """
    require_dtype("tt_svd", x)
    order = require_order("tt_svd", x, order, 2)
    batch, sizes = x.shape[: x.ndim - order], x.shape[x.ndim - order :]
    if ranks is None and tolerance is None:
        raise ValueError("tt_svd: ranks, tolerance or both")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tt_svd: tolerance = {tolerance} is outside [0, 1)")
    most = _train_ranks("tt_svd", ranks, sizes)
    budget = None
    if tolerance is not None:
        total = torch.linalg.vector_norm(x.detach().reshape(*batch, -1), dim=-1)
        budget = total * (tolerance / (order - 1) ** 0.5)
    return _sweep(x.reshape(*batch, 1, -1), sizes, most, budget)


def tt_randomized(
    x: Tensor,
    ranks: int | Sequence[int],
    oversampling: int = 8,
    *,
    reads: int = 2,
    generator: torch.Generator,
    order: int | None = None,
) -> list[Tensor]:
    r"""Tensor-train cores of x from random sketches, left-orthogonal but the last, with two reads of x or one.

    A Gaussian tensor train with bonds of r_k + oversampling is contracted with x from the right, which sketches every
    unfolding's columns in one read. ``reads=2`` orthogonalizes the first sketch, projects x on it, and goes on with
    what is left (randomized TT-SVD; Halko, Martinsson, Tropp, arXiv 0909.4061, for each bond). ``reads=1`` sketches
    from the left as well, with bonds twice as oversampled, and never needs x again (streaming TT approximation, a
    two-sided Nystroem scheme: Kressner, Vandereycken, Voorhaar, arXiv 2208.02600): C_1 Omega_1^+ C_2 ... Omega^+ C_N,
    where Omega_k is the unfolding sketched on both sides. All sketches are linear in x and drawn without seeing it, so
    that a stream would do; on a tensor in memory, where each side's product passes over it, one read is not faster
    than two. Either is then rounded to the ranks, as in :func:`tt_svd`.
    A tensor of these ranks is recovered up to roundoff; otherwise the error is a small multiple of TT-SVD's for two
    reads, a larger one for one read. The gradient is autograd's through these steps, the sketches being constants;
    where the sketches are rank-deficient (a tensor of lower rank) it is finite but omits directions outside the span.

    Args:
        x: (*batch, d_1, ..., d_N), N >= 2, float32, float64, complex64 or complex128, finite (not checked). A batch
            shares its sketches.
        ranks: as in :func:`tt_svd`.
        oversampling: columns of the sketches beyond the ranks, at least 0.
        reads: 1 or 2.
        generator: on x's device; the only source of randomness.
        order: N, where x has batch dimensions; default all of x's.

    Returns:
        N cores (*batch, r_{k-1}, d_k, r_k), r_0 = r_N = 1.

    Raises:
        TypeError: for half precision and integers.
        ValueError: for values outside their intervals or N < 2.
    """
    require_dtype("tt_randomized", x)
    order = require_order("tt_randomized", x, order, 2)
    batch, sizes = x.shape[: x.ndim - order], x.shape[x.ndim - order :]
    require_within("tt_randomized: reads", reads, 1, 2)
    if oversampling < 0:
        raise ValueError(f"tt_randomized: oversampling = {oversampling} is outside [0, inf)")
    kept = _train_ranks("tt_randomized", ranks, sizes)
    limits = train_rank_limits(sizes)
    right = [min(r + oversampling, limit) for r, limit in zip(kept, limits, strict=True)]
    rows = x.reshape(*batch, 1, -1)
    sketches = _sketch_from_the_right(rows, sizes, right, generator)
    if reads == 2:
        cores = _project(rows, sizes, sketches)
    else:
        left = [min(r + 2 * oversampling, limit) for r, limit in zip(kept, limits, strict=True)]
        cores = _reconstruct(*_sketch_both_sides(rows, sizes, sketches, left, generator))
    return _round(cores, kept)


def _train_ranks(name: str, ranks: int | Sequence[int] | None, sizes: torch.Size) -> list[int]:
    limits = train_rank_limits(sizes)
    if ranks is None:
        return limits
    if isinstance(ranks, int):
        require_within(f"{name}: ranks", ranks, 1, max(limits))
        return [min(ranks, limit) for limit in limits]
    return per_mode(f"{name}: ranks", list(ranks), limits)


def _sweep(rest: Tensor, sizes: torch.Size, most: list[int], budget: Tensor | None) -> list[Tensor]:
    """TT-SVD of ``rest`` (*batch, 1, d_1 ... d_N)."""
    batch, cores = rest.shape[:-2], list[Tensor]()
    for d, limit in zip(sizes, most, strict=False):
        before = rest.shape[-2]
        a = rest.reshape(*batch, before * d, -1)
        count = min(limit, *a.shape[-2:])
        u, s = left_vectors(a, count)
        u = fix_gauge(u[..., : count if budget is None else min(count, _rank_within(s, budget))])
        cores.append(u.reshape(*batch, before, d, u.shape[-1]))
        rest = u.mH @ a
    return [*cores, rest.reshape(*batch, rest.shape[-2], sizes[-1], 1)]


def _rank_within(s: Tensor, budget: Tensor) -> int:
    """The least rank whose cut-off singular values have a norm within the budget, for every batch entry."""
    tails = s.detach().double().square().flip(-1).cumsum(-1)
    needed = (tails > budget.double().square().unsqueeze(-1)).sum(-1)
    return max(1, int(needed.max()))


def _round(cores: list[Tensor], kept: list[int]) -> list[Tensor]:
    """TT rounding: QR from right to left, then truncated left vectors from left to right."""
    cores = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        q, r = _thin(cores[k].flatten(-2).mH)
        cores[k] = q.mH.unflatten(-1, cores[k].shape[-2:])
        cores[k - 1] = cores[k - 1] @ r.mH.unsqueeze(-3)
    for k, limit in enumerate(kept):
        a = cores[k].flatten(-3, -2)
        u, _ = leading_left_vectors(a, min(limit, *a.shape[-2:]))
        cores[k] = u.unflatten(-2, cores[k].shape[-3:-1])
        cores[k + 1] = _through(u.mH @ a, cores[k + 1])
    return cores


def _through(a: Tensor, core: Tensor) -> Tensor:
    """A times a core (*batch, r_{k-1}, d_k, r_k) along its first bond."""
    return (a @ core.flatten(-2)).unflatten(-1, core.shape[-2:])


def _thin(a: Tensor) -> tuple[Tensor, Tensor]:
    """A = Q R where A may be wide: then Q is the identity."""
    if a.shape[-2] < a.shape[-1]:
        return torch.eye(a.shape[-2], dtype=a.dtype, device=a.device).expand(*a.shape[:-1], -1), a
    return tsqr(a)


def _random(x: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(rows, columns, dtype=x.dtype, device=x.device, generator=generator)
    return drawn / rows**0.5


def _sketch_from_the_right(x: Tensor, sizes: torch.Size, widths: list[int], generator: torch.Generator) -> list[Tensor]:
    """For k = 1 ... N-1, the unfolding (d_1 ... d_k) x (rest) times a Gaussian train: (*batch, d_1 ... d_k, l_k)."""
    batch, sketches = x.shape[:-2], list[Tensor]()
    state = x.reshape(*batch, -1, sizes[-1])
    for k in range(len(sizes) - 1, 0, -1):
        state = state @ _random(x, state.shape[-1], widths[k - 1], generator)
        sketches.insert(0, state)
        state = state.reshape(*batch, -1, sizes[k - 1] * widths[k - 1])
    return sketches


def _project(rest: Tensor, sizes: torch.Size, sketches: list[Tensor]) -> list[Tensor]:
    """Left-orthogonal cores: each sketch, projected on the bases before it, gives the next basis."""
    batch, cores = rest.shape[:-2], list[Tensor]()
    for d, sketch in zip(sizes, sketches, strict=False):
        before = rest.shape[-2]
        for core in cores:  # bring (d_1 ... d_{k+1}, l) to (r_k d_{k+1}, l)
            basis = core.flatten(-3, -2)
            sketch = basis.mH @ sketch.reshape(*batch, basis.shape[-2], -1)  # noqa: PLW2901
        q, _ = _thin(sketch.reshape(*batch, before * d, -1))
        cores.append(q.unflatten(-2, (before, d)))
        rest = q.mH @ rest.reshape(*batch, before * d, -1)
    return [*cores, rest.reshape(*batch, -1, sizes[-1], 1)]


def _sketch_both_sides(
    x: Tensor, sizes: torch.Size, sketches: list[Tensor], widths: list[int], generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Psi_k (l'_{k-1}, d_k, l_k) for each mode and Omega_k (l'_k, l_k) for each bond; x itself enters the last Psi."""
    batch, psi, omega = x.shape[:-2], list[Tensor](), list[Tensor]()
    rests = [*sketches, x.reshape(*batch, -1, sizes[-1])]
    for k, d in enumerate(sizes):
        before = 1 if k == 0 else widths[k - 1]
        psi.append(rests[k].reshape(*batch, before, d, -1))
        if k == len(sizes) - 1:
            break
        left = _random(x, before * d, widths[k], generator).mT
        omega.append(left @ rests[k].reshape(*batch, before * d, -1))
        for later in range(k + 1, len(sizes)):
            rests[later] = left @ rests[later].reshape(*batch, before * d, -1)
    return psi, omega


def _reconstruct(psi: list[Tensor], omega: list[Tensor]) -> list[Tensor]:
    eps = torch.finfo(psi[0].dtype).eps
    cores = list(psi)
    for k, both in enumerate(omega):
        cores[k + 1] = _through(pinv(both, 8 * eps * max(both.shape[-2:])), psi[k + 1])
    return cores
