"""Products of a tensor with one matrix per mode, as few plain matrix products as possible.

Notation: x has shape (*batch, d_1, ..., d_N), a matrix A_n has shape (*batch, k_n, d_n), and ``x x_n A_n`` contracts
mode n of x with the columns of A_n. ``None`` stands for the identity. Leading batch dimensions are kept throughout.
"""

from collections.abc import Iterable, Sequence
from math import prod

from torch import Tensor


def unfold(x: Tensor, mode: int, order: int) -> Tensor:
    """The unfolding X_(n): (*batch, d_n, product of the other modes, in their order)."""
    if order == 2:
        return x.mT if mode else x
    batch = x.shape[: x.ndim - order]
    own, d = x.shape[len(batch) :], x.shape[len(batch) + mode]  # no -1 in shapes: where d is 0 it would say nothing
    return x.movedim(len(batch) + mode, len(batch)).reshape(*batch, d, prod(own[:mode]) * prod(own[mode + 1 :]))


def multilinear(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """x x_1 A_1 ... x_N A_N, where N = len(matrices).

    Args:
        x: (*batch, d_1, ..., d_N), real or complex.
        matrices: A_n of shape (*batch, k_n, d_n) in x's dtype, or None to leave mode n as it is.

    Returns:
        (*batch, k_1, ..., k_N), with k_n = d_n where A_n is None.
    """
    given = [n for n, a in enumerate(matrices) if a is not None]
    if not given:
        return x
    if len(given) == 1:
        return _one_mode(x, matrices, given[0])
    return _rotate_through(x, matrices, len(matrices)).reshape(_shape_after(x, matrices))


def add_multilinear(
    out: Tensor, x: Tensor, matrices: Sequence[Tensor | None], alpha: float, beta: float = 1.0
) -> Tensor:
    """out <- beta out + alpha (x x_1 A_1 ... x_N A_N), in place; the last product writes to out where layouts allow.

    Args:
        out: one parameter, gradient or error buffer of shape (*batch, k_1, ..., k_N).
        x: (*batch, d_1, ..., d_N).
        matrices: A_n of shape (*batch, k_n, d_n), or None for the identity.
        alpha: a factor.
        beta: a factor.
    """
    given = [n for n, a in enumerate(matrices) if a is not None]
    order = len(matrices)
    if out.ndim > order:
        return _add_to_batch(out, x, matrices, alpha, beta)
    if given and out.dtype == x.dtype and out.is_contiguous():
        n, last = given[-1], matrices[given[-1]]
        assert last is not None
        if len(given) == 1 and n == 0:
            return (
                out.view(out.shape[0], prod(out.shape[1:]))
                .addmm_(last, x.reshape(x.shape[0], prod(x.shape[1:])), alpha=alpha, beta=beta)
                .view(out.shape)
            )
        if n == order - 1:
            # All modes but the last, which is then the leading one of the rotated tensor: (d_N, k_1 ... k_{N-1}).
            lifted = _rotate_through(x, matrices, order - 1) if len(given) > 1 else None
            before = prod(out.shape[:-1])
            left = x.reshape(before, x.shape[-1]) if lifted is None else lifted.reshape(x.shape[-1], before).mT
            return out.view(before, out.shape[-1]).addmm_(left, last.mT, alpha=alpha, beta=beta).view(out.shape)
    if beta != 1.0:
        out.mul_(beta)
    return out.add_(multilinear(x, matrices), alpha=alpha)


def _add_to_batch(out: Tensor, x: Tensor, matrices: Sequence[Tensor | None], alpha: float, beta: float) -> Tensor:
    """:func:`add_multilinear` with one batch dimension or more, of which one is served without a temporary."""
    given = [n for n, a in enumerate(matrices) if a is not None]
    order = len(matrices)
    last = matrices[given[-1]] if given else None
    if last is not None and last.ndim == 3 and out.ndim == order + 1 and out.dtype == x.dtype and out.is_contiguous():
        count, n = out.shape[0], given[-1]
        if len(given) == 1 and n == 0:
            wide = x.reshape(count, x.shape[1], prod(x.shape[2:]))
            flat = out.view(count, out.shape[1], wide.shape[-1])
            return flat.baddbmm_(last, wide, alpha=alpha, beta=beta).view(out.shape)
        if n == order - 1:
            lifted = _rotate_through(x, matrices, order - 1) if len(given) > 1 else None
            before = prod(out.shape[1:-1])
            left = x if lifted is None else lifted.reshape(count, x.shape[-1], before).mT
            left, flat = left.reshape(count, before, x.shape[-1]), out.view(count, before, out.shape[-1])
            return flat.baddbmm_(left, last.mT, alpha=alpha, beta=beta).view(out.shape)
    if beta != 1.0:
        out.mul_(beta)
    return out.add_(multilinear(x, matrices), alpha=alpha)


def all_but_one(x: Tensor, matrices: Sequence[Tensor | None], modes: Iterable[int]) -> dict[int, Tensor]:
    """x x_m A_m over all modes m but n, for each n in ``modes``: (*batch, k_1, ..., d_n, ..., k_N).

    The modes are halved again and again, and products shared: where the A_m are short, two products with all of x make
    all of the results.

    Args:
        x: (*batch, d_1, ..., d_N).
        matrices: A_m of shape (*batch, k_m, d_m), or (k_m, d_m) for all of a batch, in x's dtype, or None for the
            identity.
        modes: the modes that stay, one at a time.
    """
    everything = list(range(len(matrices)))
    return _leave_one(x.resolve_conj().contiguous(), matrices, [], everything, set(modes))


def _leave_one(
    x: Tensor, matrices: Sequence[Tensor | None], done: list[int], left: list[int], modes: set[int]
) -> dict[int, Tensor]:
    """The results for the modes that are left, from x whose axes are those of the modes in ``done``, then ``left``.

    The axes of a batch come before them.
    """
    if not modes & set(left):
        return {}
    lead = x.ndim - len(matrices)
    batch = x.shape[:lead]
    if len(left) == 1:
        axes = [*done, *left]
        return {left[0]: x.permute([*range(lead), *(lead + axes.index(m) for m in range(len(axes)))])}
    first, second = left[: len(left) // 2], left[len(left) // 2 :]
    results: dict[int, Tensor] = {}
    if modes & set(first):
        y = x
        for m in reversed(second):  # the last axis, which comes out first: no transposed copy, and a wide product
            a, rest = matrices[m], y.shape[lead:-1]
            flat = y.reshape(*batch, prod(rest), y.shape[-1]).mT
            y = (flat if a is None else a @ flat).reshape(*batch, flat.shape[-2] if a is None else a.shape[-2], *rest)
        results |= _leave_one(y, matrices, [*second, *done], first, modes)
    if modes & set(second):
        y = x
        for axis, m in enumerate(first, lead + len(done)):
            a, before, d, after = matrices[m], y.shape[:axis], y.shape[axis], y.shape[axis + 1 :]
            if a is not None:
                blocks = y.reshape(*batch, prod(before[lead:]), d, prod(after))
                if blocks.shape[lead] == 1:
                    product = a @ blocks.squeeze(lead)
                else:
                    product = (a.unsqueeze(-3) if a.ndim > 2 else a) @ blocks
                y = product.reshape(*before, a.shape[-2], *after)
        results |= _leave_one(y, matrices, [*done, *first], second, modes)
    return results


def gram(x: Tensor, mode: int, order: int) -> Tensor:
    """X_(n) X_(n)^H, of shape (*batch, d_n, d_n): Hermitian, positive semi-definite."""
    return correlate(x, x, mode, order)


def correlate(x: Tensor, z: Tensor, mode: int, order: int) -> Tensor:
    """X_(n) Z_(n)^H, of shape (*batch, d_n, r_n); x and z agree in every mode but n, one z may serve a batch of x."""
    if mode == order - 1:  # the last mode needs no transposed copy
        batch = x.shape[: x.ndim - order]
        count = prod(x.shape[len(batch) : -1])
        rows = x.reshape(*batch, count, x.shape[-1])
        return rows.mT @ z.reshape(*z.shape[: z.ndim - order], count, z.shape[-1]).conj()
    return unfold(x, mode, order) @ unfold(z, mode, order).mH


def _one_mode(x: Tensor, matrices: Sequence[Tensor | None], mode: int) -> Tensor:
    order, a = len(matrices), matrices[mode]
    assert a is not None
    batch = x.shape[: x.ndim - order]
    shape = _shape_after(x, matrices)
    own = x.shape[len(batch) :]
    before, d, after = prod(own[:mode]), own[mode], prod(own[mode + 1 :])
    if after == 1:
        return (x.reshape(*batch, before, d) @ a.mT).reshape(shape)
    if mode == 0:
        return (a @ x.reshape(*batch, d, after)).reshape(shape)
    return (a.unsqueeze(-3) @ x.reshape(*batch, before, d, after)).reshape(shape)


def _rotate_through(x: Tensor, matrices: Sequence[Tensor | None], count: int) -> Tensor:
    """Multiply the first ``count`` modes in turn, each as one matrix product.

    The leading mode is contracted and comes out last, so that the next one leads: (d, rest) -> (rest, k). After N turns
    the modes stand in their first order again, and nothing was ever permuted.
    """
    order = len(matrices)
    batch = x.shape[: x.ndim - order]
    sizes = list(x.shape[x.ndim - order :])
    for a in matrices[:count]:
        flat = x.reshape(*batch, sizes[0], prod(sizes[1:])).mT
        x = flat if a is None else flat @ a.mT
        sizes = [*sizes[1:], x.shape[-1]]
    return x.reshape(*batch, *sizes)


def _shape_after(x: Tensor, matrices: Sequence[Tensor | None]) -> tuple[int, ...]:
    lead = x.ndim - len(matrices)
    modes = [d if a is None else a.shape[-2] for d, a in zip(x.shape[lead:], matrices, strict=True)]
    return (*x.shape[:lead], *modes)
