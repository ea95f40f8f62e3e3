"""A model whose processes send cores, and are not there: how one of them steps, and what it sends."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.copies import Apart
from ..distributed.cores import check_cores, own_residuals
from ..distributed.traffic import Traffic
from ..distributed.wire_frames import ERROR, WireFrame
from ..distributed.wires import Piece, WireName
from ..distributed.wires import wire as wire_of
from ..drivers.replicas import Replicas
from ..optimizer import LowRankOptimizer
from ..sites import Site
from ..state import spec_bytes
from .rehearsal import Watcher
from .sharding import Absent, bytes_of

_BUCKETS = (2**20, 25 * 2**20)
"""Bytes at which DistributedDataParallel closes its first bucket, and each later one."""


@dataclass(eq=False)
class _Sending:
    """What takes the place of cores on their way: the buffers, and their means."""

    buffers: Sequence[Tensor]
    means: list[Tensor]

    def wait(self) -> list[Tensor]:
        """Tensors of their shapes."""
        return self.means

    def leave(self) -> None:
        """Nothing is going on."""


@dataclass(eq=False)
class Compressing:
    """An optimizer of parameters without data that takes up gradients as :func:`compress` lets it, of ``ranks``.

    Args:
        optimizer: becomes so.
        wire: of cores.
        ranks: how many processes there are.
        whole: how gradients of whole frames are sent.
        traffic: counts what frames are searched in, once the optimizer steps.

    Raises:
        ValueError: what compress() refuses, by the same words.
    """

    optimizer: LowRankOptimizer
    wire: WireName
    ranks: int
    whole: WireFrame | None = None
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        check_cores(self.optimizer, "compress()", self.whole)
        self.optimizer.roster.exchange("residual", own_residuals(self.optimizer, "compress()"))
        self._cores = wire_of(self.wire)
        comm = self._absent(self.traffic)
        self._driver = self.optimizer.driven_by(
            lambda guard: Replicas(self.optimizer, guard, comm, self._send, Apart(), 1, "compress()")
        )

    def _absent(self, traffic: Traffic) -> Any:
        products = self._cores.products
        return Absent(traffic, itemsize=None if products is None else products.itemsize)

    def take(self, given: Mapping[Tensor, Tensor]) -> None:
        """Take up gradients of projected parameters."""
        self._driver.take(given, False)

    def sent(self, module: nn.Module) -> dict[str, int]:
        """Bytes that a process sends in a step between refreshes: of dense gradients, and of cores."""
        sites = self.optimizer.sites
        trained = [p for p in module.parameters() if p.requires_grad]
        projected = {p for p in trained if p in sites and sites[p].projected}
        framed = {p for p in trained if p in self._framed}
        cores = 0
        for bucket in buckets(trained):
            for those, one_flag in ((projected, True), (framed, False)):
                pieces = [self._core(sites[p]) for p in bucket if p in those]
                flags = Piece(torch.empty(1 if one_flag else len(pieces), device="meta"))
                cores += self._cores.size([*pieces, flags], self.ranks) if pieces else 0
        return {"dense": bytes_of([p for p in trained if p not in projected | framed]), "cores": cores}

    @property
    def _framed(self) -> dict[Tensor, Site]:
        """The parameters that have a frame for the wire alone."""
        whole, sites = self.whole, self.optimizer.sites
        return {} if whole is None else {p: site for p, site in sites.items() if p.requires_grad and whole.serves(site)}

    def _core(self, site: Site) -> Piece:
        shape = site.core_shape if self.whole is None or site.projected else self.whole.core_shape(site)
        return Piece(torch.empty(shape, dtype=site.view.dtype, device="meta"), 1 if site.blocks else 0)

    def wire_state(self) -> dict[str, int]:
        """Bytes of what is kept for the wire alone."""
        found = {"frames": 0, "feedback": 0}
        for site in self._framed.values():
            assert self.whole is not None
            for name, spec in self.whole.schema(site).items():
                found["feedback" if ERROR in name else "frames"] += spec_bytes(spec)
        return found

    def wire_frames(self) -> int:
        """Bytes that a process sends in a step, on the average, where frames for the wire alone are searched in."""
        total = 0.0
        for site in self._framed.values():
            assert self.whole is not None
            traffic = Traffic()
            operand, frame = self.whole.imagined(site, self._absent(traffic))
            with Watcher():
                self.whole.finder.find(operand, frame, True, {})
            total += traffic.bytes / self.whole.refresh_every
        return round(total)

    def wire_waiting(self) -> int:
        """Bytes besides at the end of the backward pass: errors and frames anew, cores as they are, sent, and back."""
        pieces = [self._core(site) for site in self._framed.values()]
        cores = sum(bytes_of([piece.core]) for piece in pieces)
        sent = self._cores.size(pieces, self.ranks) if pieces else 0
        return sum(self.wire_state().values()) + 2 * cores + sent

    def _send(self, given: Sequence[tuple[Tensor, int]]) -> _Sending:
        """Buffers as large as those of the wire, and means that are there at once."""
        size = self._cores.size([Piece(core, rows) for core, rows in given], self.ranks)
        device = given[0][0].device
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2 if self.wire == "int8" else 1)]
        return _Sending(buffers, [torch.empty_like(core) for core, _ in given])


def buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters that DistributedDataParallel sends together, from the last to the first.

    That is after the first backward pass, in which all are together, and where gradients come in the opposite order of
    the parameters. Each dtype has buckets of its own.
    """
    waiting: dict[Any, list[Tensor]] = {}
    closed: dict[Any, int] = {}
    for p in reversed(params):
        own = waiting.setdefault(p.dtype, [])
        own.append(p)
        count = closed.get(p.dtype, 0)
        if bytes_of(own) >= _BUCKETS[min(count, 1)]:
            closed[p.dtype] = count + 1
            yield waiting.pop(p.dtype)
    yield from waiting.values()
