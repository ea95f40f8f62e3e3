"""Matrices of a tensor."""

from collections.abc import Callable
from math import prod
from typing import Literal

from torch import Tensor

Over = Literal["auto", "flat", "each"]


def cut(x: Tensor, rows: int, over: Over) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The matrices of each row of a batch, and what makes them a tensor of x's shape again.

    Args:
        x: (*rows, d_1, ..., d_N).
        rows: how many leading dimensions count rows.
        over: "flat" the first mode longer than 1 against all others; "each" the first two modes longer than 1, for
            every index of the others; "auto" is "each" for complex, "flat" for real tensors.

    Returns:
        (*batch, m, n), with m = 1 where no two modes are longer than 1; and the way back, which may be a view.
    """
    core = x.shape[rows:]
    long = [n for n, d in enumerate(core) if d > 1]
    if (over == "each" or (over == "auto" and x.is_complex())) and len(long) > 2:
        modes = (long[0] - len(core), long[1] - len(core))
        return x.movedim(modes, (-2, -1)), lambda y: y.movedim((-2, -1), modes)
    first = core[long[0]] if len(long) > 1 else 1
    return x.reshape(*x.shape[:rows], first, prod(core) // max(1, first)), lambda y: y.reshape(x.shape)
