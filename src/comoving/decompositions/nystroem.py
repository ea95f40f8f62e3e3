"""Tucker factors from sampled fibres: each unfolding is seen through a few of its columns only."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..linalg import multilinear
from ..linalg.checks import per_mode, require_dtype, require_order
from .leading import Method, leading_directions
from .singular import fix_gauge


def nystroem_tucker(
    x: Tensor,
    ranks: int | Sequence[int],
    samples: int | Sequence[int],
    *,
    generator: torch.Generator | None = None,
    indices: Sequence[Tensor] | None = None,
    weights: Sequence[Tensor] | None = None,
    order: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    r"""Core and factors of a Tucker approximation x ~ core x_1 U_1 ... x_N U_N from sampled fibres.

    For each mode n, s columns j of the unfolding X_(n) are drawn with replacement with probabilities p_j and scaled:

        C = X_(n)[:, j] / sqrt(s p_j),   E[C C^H] = X_(n) X_(n)^H,   U_n = the r_n leading left vectors of C.

    (Length-squared and uniform column sampling: Drineas, Kannan, Mahoney, SIAM J. Comput. 36, 2006; the Gram matrix
    seen through samples: Nystroem, as in arXiv 1303.1849.) Finding the factors costs d_n s^2 per mode and reads s
    fibres; neither an unfolding nor its Gram matrix is formed. The core, x x_1 U_1^H ... x_N U_N^H, reads x once. A
    tensor of multilinear ranks r is recovered up to roundoff once the sampled fibres span the ranges.

    Differentiable with the indices and weights as constants; gauge, gradient and the rule for degenerate spectra are
    those of :func:`leading_left_vectors`. :class:`comoving.finders.Nystroem` makes its factors of the same parts, but
    draws columns in ways of its own and sees the tensor through its operand.

    Args:
        x: (*batch, d_1, ..., d_N), N >= 2, float32, float64, complex64 or complex128, finite (not checked). A
            batch shares its samples.
        ranks: r_n in [1, min(d_n, product of the other modes)], one integer for all modes or one each.
        samples: s_n in [r_n, product of the other modes], one integer for all or one each.
        generator: draws the columns, on its own device. Exactly one of generator and indices is given.
        indices: for each mode, s_n columns of the unfolding, integers in [0, product of the other modes) (not checked
            for their range, which would wait for the device); order of the other modes as in :func:`unfold`.
        weights: for each mode, non-negative weights of all its columns, proportional to p; default uniform. A zero
            weight is never drawn. Read on the host, to be checked, where a generator draws.
        order: N, where x has batch dimensions; default all of x's.

    Returns:
        The core (*batch, r_1, ..., r_N) and the factors U_n (*batch, d_n, r_n), orthonormal columns.

    Raises:
        TypeError: for half precision and integers.
        ValueError: for ranks, samples, weights or indices that do not fit.
    """
    require_dtype("nystroem_tucker", x)
    order = require_order("nystroem_tucker", x, order, 2)
    sizes = x.shape[x.ndim - order :]
    columns = [prod(sizes) // d for d in sizes]
    limits = [min(d, c) for d, c in zip(sizes, columns, strict=True)]
    kept = per_mode("nystroem_tucker: ranks", ranks if isinstance(ranks, int) else list(ranks), limits)
    drawn = per_mode("nystroem_tucker: samples", samples if isinstance(samples, int) else list(samples), columns)
    for n, (r, s) in enumerate(zip(kept, drawn, strict=True)):
        if s < r:
            raise ValueError(f"nystroem_tucker: samples[{n}] = {s} is outside [{r}, {columns[n]}], from the rank up")
    if (generator is None) == (indices is None):
        raise ValueError("nystroem_tucker: exactly one of generator and indices")
    _check_given("weights", weights, columns)
    _check_given("indices", indices, drawn)
    factors = list[Tensor]()
    for n, (r, s) in enumerate(zip(kept, drawn, strict=True)):
        weight = None if weights is None else weights[n]
        j = (_draw(columns[n], s, weight, generator) if indices is None else indices[n]).to(x.device)
        sample = fibres(x, n, j, x.ndim - order)
        factors.append(fix_gauge(sampled_factor(sample, r, None if weight is None else _worth(weight, j, s), "svd")))
    return multilinear(x, [u.mH for u in factors]), factors


def sampled_factor(sample: Tensor, rank: int, weights: Tensor | None = None, method: Method = "gram") -> Tensor:
    """U_n = the ``rank`` leading left singular vectors of C = sample * sqrt(weights), completed where it has fewer.

    Where the weight of a column is 1/(its expected number of draws), C C^H estimates X_(n) X_(n)^H without bias. A
    common factor of all weights changes nothing. Gauge and gradient are those of :func:`leading_directions`.

    Args:
        sample: columns of an unfolding, (*batch, d_n, s), with entries of about 1.
        rank: at most d_n.
        weights: of the columns, (s,) or (*batch, s), real and not negative; None where all are equal.
        method: of :func:`leading_directions`.

    Returns:
        (*batch, d_n, rank).
    """
    c = sample if weights is None else sample * weights.sqrt().to(sample).unsqueeze(-2)
    return leading_directions(c, 0, rank, method, c.ndim - 2)


def fibres(x: Tensor, mode: int, columns: Tensor, rows: int = 0) -> Tensor:
    """Columns of the unfolding X_(n), (*rows, d_n, s): fibres of the tensor along mode n, without the unfolding.

    Args:
        x: (*rows, d_1, ..., d_N), of any dtype. Differentiable.
        mode: n.
        columns: (s,) int64 for all rows, or (*rows, s), from 0 up to the product of the other modes, whose indices they
            count in their order; on x's device.
        rows: leading dimensions that count rows.
    """
    d, after = x.shape[rows + mode], prod(x.shape[rows + mode + 1 :])
    if not rows:
        return x.reshape(-1, d, after)[columns // after, :, columns % after].mT
    lead = x.shape[:rows]
    blocks = x.reshape(prod(lead), -1, d, after)
    which = torch.arange(len(blocks), device=columns.device).unsqueeze(-1)
    own = columns.reshape(-1, columns.shape[-1]) if columns.ndim > 1 else columns
    found = blocks[which, own // after, :, own % after].mT
    return found if rows == 1 else found.reshape(*lead, d, -1)


def _check_given(name: str, given: Sequence[Tensor] | None, lengths: list[int]) -> None:
    if given is not None and [tuple(g.shape) for g in given] != [(n,) for n in lengths]:
        raise ValueError(f"nystroem_tucker: {name} of lengths {lengths}, not {[tuple(g.shape) for g in given]}")


def _draw(count: int, samples: int, weight: Tensor | None, generator: torch.Generator | None) -> Tensor:
    assert generator is not None
    if weight is None:
        return torch.randint(count, (samples,), generator=generator, device=generator.device)
    if not bool((weight >= 0).all() & (weight.sum() > 0) & weight.isfinite().all()):
        raise ValueError("nystroem_tucker: weights are finite, in [0, inf), and not all zero")
    running = weight.to(generator.device, torch.float64).cumsum(0)
    at = torch.rand(samples, generator=generator, device=generator.device, dtype=torch.float64) * running[-1]
    # right=True steps over zero weights; the last positive weight is the cap, should at round up to the sum.
    last = int((weight > 0).nonzero().max())
    return torch.searchsorted(running, at, right=True).clamp(max=last)


def _worth(weight: Tensor, columns: Tensor, samples: int) -> Tensor:
    """1/(s p_j), in double precision."""
    w = weight.to(columns.device, torch.float64)
    return w.sum() / (samples * w[columns])
