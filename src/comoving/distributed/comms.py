"""What processes tell one another through ``torch.distributed``; see :class:`comoving.comm.Comm`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import Local
from .traffic import Traffic
from .wires import Wire


@dataclass(eq=False)
class Replicas(Local):
    """Each of N processes has a gradient of its own, of the same weights; the gradient is their mean.

    Args:
        group: of the processes; None for all of them.
        wire: what products are summed in; None for their own dtype. Complex ones are sent as real pairs.
        traffic: counts what is sent.
        cores: how a driver sends cores, by which they are rounded before they are used; None where they stay as they
            are.
        keeps: whether the next cores are not sent yet.
        earlier: what the next core is sent together with.
    """

    group: dist.ProcessGroup | None = None
    wire: torch.dtype | None = None
    traffic: Traffic = field(default_factory=Traffic)
    cores: Wire | None = None
    keeps: bool = False
    earlier: Tensor | None = None

    alone = False

    @property
    def size(self) -> int:
        """N."""
        return dist.get_world_size(self.group)

    def joined(self, product: Tensor, over: Collection[int]) -> Tensor:
        """The mean."""
        real = torch.view_as_real(product) if product.is_complex() else product
        sent = (real if self.wire is None else real.to(self.wire)).contiguous()
        self.traffic.note(sent)
        dist.all_reduce(sent, group=self.group)
        mean = sent.to(real.dtype).div_(self.size)
        return torch.view_as_complex(mean) if product.is_complex() else mean

    def sent(self, core: Tensor, rows: int) -> Tensor:
        """The core, or what arrives of it, beyond what was earlier."""
        if self.cores is None or self.keeps:
            return core
        given = core if self.earlier is None else core + self.earlier
        arriving = self.cores.sent(given, rows)
        if self.earlier is None or arriving is given:
            return core if arriving is given else arriving
        return arriving - self.earlier

    def largest(self, figure: Tensor) -> Tensor:
        """The largest of all."""
        return _largest(figure, self.group, self.traffic)


@dataclass(eq=False)
class Shards:
    """Each process has some entries of one mode of weights and gradient.

    Args:
        group: of the processes; None for all of them.
        split: that mode.
        sizes: how many entries each has, by its rank in the group; some may have none.
        rank: of this process in the group.
        device: where its tensors are.
        starts: the first entry that each has; None where they come one after the other.
        traffic: counts what is sent.
    """

    group: dist.ProcessGroup | None
    split: int
    sizes: Sequence[int]
    rank: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    starts: Sequence[int] | None = None
    traffic: Traffic = field(default_factory=Traffic)

    alone = False

    def joined(self, product: Tensor, over: Collection[int]) -> Tensor:
        """The sum where entries of all processes were contracted."""
        if self.split not in over:
            return product
        sent = (torch.view_as_real(product) if product.is_complex() else product).contiguous()
        self.traffic.note(sent)
        dist.all_reduce(sent, group=self.group)
        return torch.view_as_complex(sent) if product.is_complex() else sent

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """x with the entries of all."""
        front = x.movedim(dim, 0)
        most = max(self.sizes)
        sent = front.new_zeros((most, *front.shape[1:]))
        sent[: front.shape[0]] = front
        self.traffic.note(sent)
        given = [torch.empty_like(sent) for _ in self.sizes]
        dist.all_gather(given, sent, group=self.group)
        own = [part[:size] for part, size in zip(given, self.sizes, strict=True)]
        if self.starts is not None:
            own = [own[i] for i in sorted(range(len(own)), key=self.starts.__getitem__)]
        return torch.cat(own).movedim(0, dim).contiguous()

    def here(self, x: Tensor, dim: int) -> Tensor:
        """The entries of this process."""
        start = sum(self.sizes[: self.rank]) if self.starts is None else self.starts[self.rank]
        return x.narrow(dim, start, self.sizes[self.rank])

    def length(self, here: int) -> int:
        """That of all."""
        return sum(self.sizes)

    def sent(self, core: Tensor, rows: int) -> Tensor:
        """The core."""
        return core

    def largest(self, figure: Tensor) -> Tensor:
        """The largest of all."""
        return _largest(figure, self.group, self.traffic)

    def norm(self, norms: Tensor) -> Tensor:
        """The root of the sum of squares, of norms that do not overflow."""
        top = _largest(norms, self.group, self.traffic).clamp_min(torch.finfo(norms.dtype).tiny)
        squares = (norms / top).square()
        self.traffic.note(squares)
        dist.all_reduce(squares, group=self.group)
        return squares.sqrt() * top


def _largest(figure: Tensor, group: dist.ProcessGroup | None, traffic: Traffic) -> Tensor:
    sent = figure.clone()
    traffic.note(sent)
    dist.all_reduce(sent, dist.ReduceOp.MAX, group=group)
    return sent
