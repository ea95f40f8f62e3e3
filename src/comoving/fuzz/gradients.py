"""Gradients as they really are: dead units, single rows, bags of words, and numbers at the edges of their range."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

__all__ = ["STRUCTURES", "sequence"]

_HALF = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_MOST = 1e18
"""Of a sequence's Frobenius norm: beyond it squares leave the range of float32."""


class Source:
    """Seeded numbers of one shape and working dtype, float32 for half precision.

    Args:
        shape: of every gradient.
        dtype: of every gradient.
        generator: on the CPU.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> None:
        self.shape, self.dtype, self.generator = shape, dtype, generator
        self.working = _HALF.get(dtype, dtype)
        self.real = self.working.to_real() if self.working.is_complex else self.working
        self.rows = shape[0] if shape else 1
        self.columns = prod(shape[1:])

    def normal(self, *shape: int) -> Tensor:
        """Standard normal in the working dtype, of the given shape; of the gradient's where none is given."""
        return torch.randn(shape or self.shape, dtype=self.working, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), real."""
        return torch.rand(shape, dtype=self.real, generator=self.generator)

    def index(self, size: int) -> int:
        """One of 0, ..., size - 1."""
        return int(torch.randint(size, (), generator=self.generator))

    def tall(self, x: Tensor) -> Tensor:
        """A (rows, columns) matrix in the gradient's shape."""
        return x.reshape(self.shape)

    def largest(self) -> float:
        """The largest entry that is drawn: 1e17, and well within float16's range."""
        return 1e4 if self.dtype == torch.float16 else 1e17

    def decades(self) -> tuple[float, float]:
        """Exponents of ten between which magnitudes are mixed."""
        return (-6.0, 3.0) if self.dtype == torch.float16 else (-12.0, 12.0)


Structure = Callable[[Source, int], list[Tensor]]


def _gaussian(s: Source, steps: int) -> list[Tensor]:
    """Independent normal entries: what no fault was ever found with."""
    return [s.normal() for _ in range(steps)]


def _zero_lines(s: Source, steps: int) -> list[Tensor]:
    """A third of the rows and a third of the columns are always zero: dead units on both sides."""
    live = (s.uniform(s.rows, 1) < 0.67) & (s.uniform(1, s.columns) < 0.67)
    return [s.tall(s.normal(s.rows, s.columns) * live) for _ in range(steps)]


def _live_rows(s: Source, steps: int) -> list[Tensor]:
    """A fifth of the rows is live, a batch of 4 to 16 behind them: Gram matrices with many eigenvalues of rounding."""
    live, batch = s.uniform(s.rows, 1) < 0.2, 4 + s.index(13)
    live[s.index(s.rows)] = True
    return [s.tall((s.normal(s.rows, batch) * live) @ s.normal(batch, s.columns)) for _ in range(steps)]


def _rank_one(s: Source, steps: int) -> list[Tensor]:
    """One left direction for ever, a right one that is drawn anew."""
    left = s.normal(s.rows, 1)
    return [s.tall(left @ s.normal(1, s.columns)) for _ in range(steps)]


def _one_entry(s: Source, steps: int) -> list[Tensor]:
    """One entry, always the same."""
    at = s.index(prod(s.shape))
    return [s.normal(prod(s.shape)).mul_(_unit(at, prod(s.shape))).reshape(s.shape) for _ in range(steps)]


def _new_row(s: Source, steps: int) -> list[Tensor]:
    """Row t at step t, and no other."""
    return [s.tall(s.normal(s.rows, s.columns) * _unit(t, s.rows)[:, None]) for t in range(steps)]


def _random_row(s: Source, steps: int) -> list[Tensor]:
    """One row a step, drawn."""
    return [s.tall(s.normal(s.rows, s.columns) * _unit(s.index(s.rows), s.rows)[:, None]) for _ in range(steps)]


def _constant(s: Source, steps: int) -> list[Tensor]:
    """All entries equal, at every step: what ``model(ones).sum()`` gives."""
    value = s.normal(1)
    return [value.expand(s.shape).clone() for _ in range(steps)]


def _denormal(s: Source, steps: int) -> list[Tensor]:
    """Entries below the least normal number, whose squares are zero."""
    tiny = torch.finfo(s.dtype).tiny
    return [s.normal() * (tiny * 0.01) for _ in range(steps)]


def _huge(s: Source, steps: int) -> list[Tensor]:
    """One magnitude of up to 1e17 for every step."""
    size = s.largest() ** float(s.uniform(1))
    return [s.normal() * (size / 4) for _ in range(steps)]


def _graded(s: Source, steps: int) -> list[Tensor]:
    """Rows from 1e-20 to 1."""
    low = -7.0 if s.dtype == torch.float16 else -20.0
    sizes = torch.logspace(low, 0, s.rows, dtype=s.real)[:, None]
    return [s.tall(s.normal(s.rows, s.columns) * sizes) for _ in range(steps)]


def _dead_then_alive(s: Source, steps: int) -> list[Tensor]:
    """Zero, until gradients come."""
    first = 1 + s.index(max(1, steps - 1))
    return [s.normal() * (t >= first) for t in range(steps)]


def _alive_then_dead(s: Source, steps: int) -> list[Tensor]:
    """Gradients, and then none."""
    last = 1 + s.index(max(1, steps - 1))
    return [s.normal() * (t < last) for t in range(steps)]


def _alternating(s: Source, steps: int) -> list[Tensor]:
    """One tensor with the sign of (-1)^t: momentum cancels, second moments do not."""
    x = s.normal()
    return [x * (-1) ** t for t in range(steps)]


def _duplicates(s: Source, steps: int) -> list[Tensor]:
    """Rows that are copies of three."""
    which = torch.randint(min(3, s.rows), (s.rows,), generator=s.generator)
    return [s.tall(s.normal(s.rows, s.columns)[which]) for _ in range(steps)]


def _q_learning(s: Source, steps: int) -> list[Tensor]:
    """A batch of 8 states, each with an error of the value of one action: sum_b e_a(b) x_b^T, x_b >= 0."""
    found: list[Tensor] = []
    for _ in range(steps):
        taken = torch.randint(s.rows, (8,), generator=s.generator)
        errors = s.normal(8, 1) * torch.nn.functional.one_hot(taken, s.rows)
        states = s.normal(8, s.columns)
        found.append(s.tall(errors.mT @ torch.where(states.real > 0, states, 0)))
    return found


def _bag_of_words(s: Source, steps: int) -> list[Tensor]:
    """A batch of 4 documents of 6 words each: few columns of the last mode, with small counts."""
    last = s.shape[-1] if s.shape else 1
    others, found = prod(s.shape) // last, list[Tensor]()
    for _ in range(steps):
        words = torch.randint(last, (4, 6), generator=s.generator)
        counts = torch.zeros(4, last).scatter_add_(1, words, torch.ones(4, 6)).to(s.working)
        found.append((s.normal(others, 4) @ counts).reshape(s.shape))
    return found


def _gated(s: Source, steps: int) -> list[Tensor]:
    """One or two of the blocks along mode 0 saw tokens: single slices of tensors, quarters of a matrix's rows."""
    size = 1 if len(s.shape) > 2 else max(1, s.rows // 4)
    block = torch.arange(s.rows) // size
    count, found = int(block[-1]) + 1, list[Tensor]()
    for _ in range(steps):
        live = (block == s.index(count)) | (block == s.index(count))
        found.append(s.tall(s.normal(s.rows, s.columns) * live[:, None]))
    return found


def _integers(s: Source, steps: int) -> list[Tensor]:
    """-3, ..., 3: many ties, many exact zeros."""
    return [torch.randint(-3, 4, s.shape, generator=s.generator).to(s.working) for _ in range(steps)]


def _magnitudes(s: Source, steps: int) -> list[Tensor]:
    """A magnitude for each step, from 1e-12 to 1e12."""
    low, high = s.decades()
    return [s.normal() * 10 ** (low + (high - low) * float(s.uniform(1))) for _ in range(steps)]


STRUCTURES: dict[str, Structure] = {
    "gaussian": _gaussian,
    "zero-lines": _zero_lines,
    "live-rows": _live_rows,
    "rank-one": _rank_one,
    "one-entry": _one_entry,
    "new-row": _new_row,
    "random-row": _random_row,
    "constant": _constant,
    "denormal": _denormal,
    "huge": _huge,
    "graded": _graded,
    "dead-then-alive": _dead_then_alive,
    "alive-then-dead": _alive_then_dead,
    "alternating": _alternating,
    "duplicates": _duplicates,
    "q-learning": _q_learning,
    "bag-of-words": _bag_of_words,
    "gated": _gated,
    "integers": _integers,
    "magnitudes": _magnitudes,
}
"""Name -> what makes the gradients of some steps."""


def sequence(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, steps: int
) -> list[Tensor]:
    """The gradients of one parameter, step after step, all finite and contiguous.

    Their Frobenius norms are at most 1e18 (5e4 for float16): a larger one is scaled down to it.

    Args:
        name: one of :data:`STRUCTURES`.
        shape: of the parameter, of any order, without a mode of size 0.
        dtype: of the parameter, real or complex.
        generator: on the CPU; the only source of randomness.
        steps: how many, >= 1.

    Raises:
        ValueError: an unknown name.
    """
    if name not in STRUCTURES:
        raise ValueError(f"unknown structure {name!r}; known are {', '.join(STRUCTURES)}")
    most = 5e4 if dtype == torch.float16 else _MOST
    made = STRUCTURES[name](Source(shape, dtype, generator), steps)
    return [_within(x, most).to(dtype) for x in made]


def _within(x: Tensor, most: float) -> Tensor:
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    size = float(torch.linalg.vector_norm(wide))
    return x if size <= most else x * (most / size)


def _unit(at: int, size: int) -> Tensor:
    return torch.arange(size) == at % size
