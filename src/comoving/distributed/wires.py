"""Wires: how the cores of several processes are rounded, sent and averaged, many of them as one buffer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from typing import Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ..codecs import Int8
from ..codecs.base import as_real
from .traffic import Traffic

WireName = Literal["same", "bfloat16", "int8"]
WIRES: tuple[str, ...] = get_args(WireName)
_STEP = 4
"""Bytes of the step of a block."""


@dataclass(frozen=True)
class Piece:
    """A core on its way.

    Args:
        core: (*rows, ...).
        rows: how many dimensions in front count rows, 0 or 1.
    """

    core: Tensor
    rows: int = 0


@dataclass
class Sending:
    """Tensors that are being averaged.

    Args:
        work: what is going on.
        finish: turns what it leaves into the means.
    """

    work: dist.Work | None
    finish: Callable[[], list[Tensor]]
    _means: list[Tensor] | None = field(default=None, init=False)

    def wait(self) -> list[Tensor]:
        """The means over all processes, in the order, shapes and dtypes of what was sent."""
        if self._means is None:
            self.leave()
            self._means = self.finish()
        return self._means

    def leave(self) -> None:
        """Let what is going on come to its end, and nothing more."""
        if self.work is not None:
            self.work.wait()
            self.work = None


class Wire(Protocol):
    """How cores are sent."""

    @property
    def products(self) -> torch.dtype | None:
        """What other products, of which frames are made, are summed in; None for their own dtype."""
        ...

    def sent(self, core: Tensor, rows: int) -> Tensor:
        """What arrives of a core, to rounding; each row is rounded as if it were alone."""
        ...

    def start(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None, traffic: Traffic) -> Sending:
        """Average these over all processes, which bring as many of the same shapes; nobody waits here."""
        ...

    def size(self, pieces: Sequence[Piece], count: int) -> int:
        """Bytes of what :meth:`start` sends of them in each of ``count`` processes; tensors need no data for it."""
        ...


@dataclass(frozen=True)
class Floats:
    """In floating point, summed on the way.

    Args:
        products: the dtype on the way; None for that of the cores.
    """

    products: torch.dtype | None = None

    def sent(self, core: Tensor, rows: int) -> Tensor:
        """The core in that dtype."""
        if self.products is None:
            return core
        real = as_real(core)
        return _as(real.to(self.products).to(real.dtype), core)

    def start(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None, traffic: Traffic) -> Sending:
        """One all-reduce."""
        given, dtype = [as_real(piece.core) for piece in pieces], self._dtype(pieces)
        flat = torch.cat([x.reshape(-1).to(dtype) for x in given])
        traffic.note(flat)
        work, count = dist.all_reduce(flat, group=group, async_op=True), dist.get_world_size(group)

        def finish() -> list[Tensor]:
            parts = flat.split([x.numel() for x in given])
            means = [own.to(x.dtype).div_(count).view(x.shape) for own, x in zip(parts, given, strict=True)]
            return [_as(mean, piece.core) for mean, piece in zip(means, pieces, strict=True)]

        return Sending(work, finish)

    def size(self, pieces: Sequence[Piece], count: int) -> int:
        """All numbers in one dtype."""
        return sum(as_real(piece.core).numel() for piece in pieces) * self._dtype(pieces).itemsize

    def _dtype(self, pieces: Sequence[Piece]) -> torch.dtype:
        return self.products or reduce(torch.promote_types, [as_real(piece.core).dtype for piece in pieces])


@dataclass(frozen=True)
class Bytes:
    """In 8 bits a real number and one float32 step a block: each process averages its share, and sends that to all.

    A block holds numbers of one row of one core. What is averaged is rounded once more.

    Args:
        block: real numbers in a block.
    """

    block: int = 128
    products = torch.bfloat16

    @property
    def _codec(self) -> Int8:
        return Int8(self.block)

    def sent(self, core: Tensor, rows: int) -> Tensor:
        """What is decoded."""
        return _as(self._joined(self._decoded(self._encoded(self._cut(core, rows))), core, rows), core)

    def start(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None, traffic: Traffic) -> Sending:
        """An all-to-all now, and an all-gather in the end."""
        count, cut = dist.get_world_size(group), [self._cut(piece.core, piece.rows) for piece in pieces]
        sizes = [len(x) for x in cut]
        share = _divided(sum(sizes), count)
        padding = cut[0].new_zeros(share * count - sum(sizes), self.block)
        given = self._encoded(torch.cat([*cut, padding]))
        traffic.note(given)
        taken = torch.empty_like(given)
        work = dist.all_to_all_single(taken, given, group=group, async_op=True)

        def finish() -> list[Tensor]:
            mean = self._decoded(taken).view(count, share, self.block).mean(0)
            whole = torch.empty_like(taken)
            dist.all_gather([*whole.chunk(count)], self._encoded(mean), group=group)
            means = self._decoded(whole)[: sum(sizes)].split(sizes)
            return [
                _as(self._joined(mean, piece.core, piece.rows), piece.core)
                for mean, piece in zip(means, pieces, strict=True)
            ]

        return Sending(work, finish)

    def size(self, pieces: Sequence[Piece], count: int) -> int:
        """Whole blocks, as many for each process to average."""
        blocks = 0
        for piece in pieces:
            rows = prod(piece.core.shape[: piece.rows])
            blocks += rows * _divided(as_real(piece.core).numel() // rows, self.block)
        return _divided(blocks, count) * count * (self.block + _STEP)

    def _cut(self, core: Tensor, rows: int) -> Tensor:
        """(blocks, block) in float32, each row of the core filled up with zeros."""
        real = as_real(core)
        flat = real.reshape(prod(core.shape[:rows]), -1).float()
        missing = -flat.shape[1] % self.block
        return torch.nn.functional.pad(flat, (0, missing)).view(-1, self.block)

    def _joined(self, blocks: Tensor, like: Tensor, rows: int) -> Tensor:
        real = as_real(like)
        count = prod(like.shape[:rows])
        return blocks.reshape(count, -1)[:, : real.numel() // count].reshape(real.shape).to(real.dtype)

    def _encoded(self, blocks: Tensor) -> Tensor:
        """(blocks, block + 4) bytes: codes, and the step behind them."""
        shape = tuple(blocks.shape)
        stored = {
            name: blocks.new_empty(spec.shape, dtype=spec.dtype)
            for name, spec in self._codec.schema(shape, torch.float32).items()
        }
        self._codec.encode(blocks.clone(), stored)
        codes, step = stored["codes"].view(shape), stored["step"].view(-1, 1)
        return torch.cat([codes.view(torch.uint8), step.view(torch.uint8)], 1)

    def _decoded(self, given: Tensor) -> Tensor:
        """(blocks, block) in float32."""
        codes = given[:, :-_STEP].contiguous().view(torch.int8)
        return codes.float().mul_(given[:, -_STEP:].contiguous().view(torch.float32))


def wire(name: WireName) -> Wire:
    """The wire of this name."""
    return Bytes() if name == "int8" else Floats(torch.bfloat16 if name == "bfloat16" else None)


def _divided(total: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-total // by)


def _as(real: Tensor, like: Tensor) -> Tensor:
    """Pairs of reals as complex numbers where ``like`` has such."""
    if not like.is_complex():
        return real
    # A part of a buffer may begin where no complex number can.
    return torch.view_as_complex(real.clone() if real.storage_offset() % 2 else real.contiguous())
