"""A model that is shared by processes which are not there: what one of them has, and what it sends."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

from torch import Tensor, nn

from ..distributed.placement import Spread, chunks, place_all
from ..distributed.traffic import Traffic
from ..frames.base import Side
from ..groups import decide
from ..optimizer import LowRankOptimizer
from ..sites import Site


@dataclass(eq=False)
class Absent:
    """A comm of which the others are absent: it counts what would be sent, and has shapes in place of what came back.

    Args:
        traffic: counts.
        split: the mode that is cut, None of replicas.
        sizes: as for :class:`comoving.distributed.Shards`.
        itemsize: bytes that a real number takes on the wire; None for its own.
    """

    traffic: Traffic
    split: int | None = None
    sizes: tuple[int, ...] = ()
    itemsize: int | None = None

    alone = False

    def joined(self, product: Tensor, over: Collection[int]) -> Tensor:
        """The product."""
        if self.split is None or self.split in over:
            self._note(product)
        return product

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """A tensor of the whole shape."""
        if self.split is None:
            return x
        shape = list(x.shape)
        shape[dim] = sum(self.sizes)
        self.traffic.note(x)
        return x.new_empty(shape)

    def here(self, x: Tensor, dim: int) -> Tensor:
        """The first entries."""
        return x if self.split is None else x.narrow(dim, 0, self.sizes[0])

    def length(self, here: int) -> int:
        """That of all."""
        return here if self.split is None else sum(self.sizes)

    def sent(self, core: Tensor, rows: int) -> Tensor:
        """The core."""
        return core

    def largest(self, figure: Tensor) -> Tensor:
        """The figure."""
        self.traffic.note(figure)
        return figure

    def norm(self, norms: Tensor) -> Tensor:
        """The norms."""
        if self.split is not None:
            self.traffic.note(norms)
            self.traffic.note(norms)
        return norms

    def _note(self, x: Tensor) -> None:
        reals = x.numel() * (2 if x.is_complex() else 1)
        self.traffic.add(x.numel() * x.element_size() if self.itemsize is None else reals * self.itemsize)


@dataclass(frozen=True, eq=False)
class Imagined(Spread):
    """A parameter that is sharded along its first dimension, of which this is the first of the processes."""

    traffic: Traffic = field(default_factory=Traffic)

    @cached_property
    def mode(self) -> int | None:
        """The first."""
        return 0

    @cached_property
    def comm(self) -> Any:
        """Counts."""
        return Absent(self.traffic, self.mode, self.sizes)

    @cached_property
    def comm_of_all(self) -> Any:
        """Likewise."""
        return Absent(self.traffic, 0, (0,))

    def here(self, x: Tensor) -> Tensor:
        """The first rows."""
        return x[self.pieces[0]]


def shard(optimizer: LowRankOptimizer, ranks: int) -> Traffic:
    """Let an optimizer of parameters without data take them for sharded over so many processes, as fully_shard() does.

    Raises:
        ValueError: a budget.

    Returns:
        What counts what the first process sends, once the optimizer steps.
    """
    traffic, roster = Traffic(), optimizer.roster
    if optimizer.budget is not None:
        raise ValueError(f"budget={optimizer.budget!r} is refused for sharded parameters: give rank, codec and moments")
    loads: dict[Any, list[float]] = {}
    for group in optimizer.param_groups:
        params: list[Tensor] = group["params"]
        before = [optimizer.sites[p] for p in params]
        spreads: dict[Tensor, Spread] = {
            p: Imagined(cast("Any", None), (), tuple(p.shape), None, 0, chunks(tuple(p.shape), 0, ranks), traffic)
            for p in params
            if p.ndim
        }
        found = place_all(params, before, group, spreads, partial(_decided_again, params, before, group), loads)
        roster.placements |= spreads
        roster.sites |= zip(params, found, strict=True)
    optimizer.engine.forget()
    return traffic


def _decided_again(
    params: Sequence[Tensor], before: Sequence[Site], group: Mapping[str, Any], sides: Mapping[Tensor, Side]
) -> list[Site]:
    """The sites with other sides for some parameters, and codecs and phases as they were."""
    pairs = [(site.name, p) for site, p in zip(before, params, strict=True)]
    sites = decide(pairs, group, before[0].index, sides)
    return [
        replace(site, phase=old.phase, codec=old.codec, moments=old.moments)
        for site, old in zip(sites, before, strict=True)
    ]


def units(module: nn.Module) -> list[list[Tensor]]:
    """The parameters that FSDP gathers together: each entry of a list of layers is a unit, the rest is one more."""
    seen: set[int] = set()
    found: list[list[Tensor]] = []
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            for layer in part:
                own: list[Tensor] = [p for p in layer.parameters() if id(p) not in seen]
                seen |= {id(p) for p in own}
                found.append(own)
    rest: list[Tensor] = [p for p in module.parameters() if id(p) not in seen]
    return [unit for unit in (*found, rest) if unit]


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of their entries."""
    return sum(p.numel() * p.element_size() for p in tensors)


def shard_bytes(p: Tensor, ranks: int) -> int:
    """Bytes of the first rank's rows of a parameter."""
    rows = p.shape[0] if p.ndim else 1
    return p.numel() // max(1, rows) * -(-rows // ranks) * p.element_size()


def dealt_bytes(optimizer: LowRankOptimizer) -> tuple[int, int]:
    """What one rank sends in a step for parameters that are dealt out, and what is there of others' in a round, about.

    Weights and gradients of its rows go to the owners, and new weights of its own parameters come back to all rows.
    """
    sent = most = 0
    for p, site in optimizer.sites.items():
        if site.owner is not None:
            rank = optimizer.roster.placements[p].rank
            piece, whole = optimizer.roster.here(p).numel() * p.element_size(), p.numel() * p.element_size()
            sent += whole - piece if site.owner == rank else 2 * piece
            most = max(most, 2 * whole)
    return sent, most
