"""What the engine asks of a finder."""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..codecs import Spec
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..linalg import each_row, over
from .operand import Operand

Memory = dict[str, Tensor]
"""A finder's own tensors of one parameter, by the names of its ``schema``; updated in place or replaced.

They are copies, which count once the step has not failed; but single numbers, which ``observe`` has to replace."""


class Finder(Protocol):
    """Finds a frame for an operand; a frozen dataclass of hyper-parameters, without tensors.

    ``inertia`` is rho in the operand rho F m/c1 + (1 - rho) g~ that the engine builds: the share of what is looked at
    that comes from the first moment instead of the newest gradient.

    """

    @property
    def batched(self) -> bool:
        """Whether it serves operands with rows: each row's frame is the one that is found for it alone."""
        ...

    @property
    def alone(self) -> bool:
        """Whether each frame is refreshed alone, at steps of its own.

        Batches are stepped in between, and :meth:`find` sees none.
        """
        ...

    @property
    def joint(self) -> bool:
        """Whether it sees nothing but what an operand's methods return, so that processes may have it together.

        They come to the same frame, and none sends its gradient whole.
        """
        ...

    @property
    def ahead(self) -> int:
        """How many steps before a refresh its frame is searched.

        0 for all but :class:`comoving.finders.Delayed`, which has the slots where one waits.
        """
        ...

    @property
    def fills(self) -> tuple[type, ...]:
        """The types of frames that it can find; others are refused at construction."""
        ...

    @property
    def inertia(self) -> float:
        """rho, in [0, 1)."""
        ...

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """What it remembers of a tensor with a frame of these ranks; all of it starts at zero."""
        ...

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Take note of a gradient, at every step, before :meth:`find` where a refresh is due.

        Args:
            gradient: (*rows, d_1, ..., d_N).
            memory: its own tensors, with the rows in front of all that are not single numbers.
            rows: leading dimensions that count rows, 0 where it is not ``batched``.
        """
        ...

    def find(self, operand: Operand, start: Any, warm: bool, memory: Memory) -> Any:
        """A frame of start's kind and ranks.

        Args:
            operand: what the frame should capture.
            start: an orthonormal frame of the wanted ranks: the last one (padded or cut where ranks have changed), or a
                seeded random one.
            warm: whether start carries information, that is, stems from an earlier refresh.
            memory: its own tensors.

        Returns:
            An orthonormal frame with start's ranks. Where the operand is zero or rank-deficient, the directions that it
            leaves open are taken from start or completed to an orthonormal set; never NaN for finite input.

        Raises:
            TypeError: a frame of a kind that the finder does not fill.
        """
        ...


class Memoryless:
    """What finders share that remember nothing but the last frame."""

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """None."""
        return {}

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Nothing to note."""


def peak(x: Tensor, rows: int) -> Tensor:
    """The largest |entry| of each row, real, (*rows); 0 where there is none."""
    sizes = x.abs()
    if not sizes.numel():
        return sizes.new_zeros(x.shape[:rows])
    return each_row(sizes, rows).amax(-1) if rows else sizes.amax()


def unless_zero(x: Tensor, found: Tensor, start: Tensor, rows: int) -> Tensor:
    """What was found for the rows in which x has entries that are not zero, where it started for the others."""
    seen = over(each_row(x, rows).any(-1), start) if rows else x.any()
    return torch.where(seen, found, start)


class _Filling(Protocol):
    @property
    def fills(self) -> tuple[type, ...]: ...  # noqa: D102


def check_start(finder: _Filling, start: object) -> None:
    """Raise unless the finder fills frames of start's type.

    Raises:
        TypeError: naming both.
    """
    if type(start) not in finder.fills:
        filled = " or ".join(kind.__name__ for kind in finder.fills)
        raise TypeError(f"{finder} fills a {filled}, got a {type(start).__name__}")


def check_inner(inner: Any) -> None:
    """Raise unless a finder may stand inside another one, of mode-wise frames.

    Raises:
        ValueError: no finder, one of other frames, or one whose frames were searched some steps ago.
    """
    finds = not isinstance(inner, type) and all(hasattr(inner, name) for name in ("schema", "observe", "find", "ahead"))
    if not finds or ModeFrame not in inner.fills:
        raise ValueError(f"inner must be a finder that fills a ModeFrame, got {inner!r}")
    if inner.ahead:
        raise ValueError(f"inner must be a finder that finds its frames at once, got {inner!r}")


DRAWS = "draws"
"""The memory's slot for the number of draws so far."""
drawing = Spec((), torch.int64, scalar=True)
"""That slot: one integer, on the host."""


def counted(memory: Memory) -> int:
    """The number of draws so far, which goes up by one."""
    count = int(memory[DRAWS])
    memory[DRAWS] = torch.tensor(count + 1, device="cpu")
    return count
