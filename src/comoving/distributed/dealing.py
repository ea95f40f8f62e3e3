"""Parameters that processes share and that one of them steps for all: what is sent there, and back."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..sites import Site
from .placement import Piece, Spread

_AT_ONCE = 2**24
"""Entries that a process steps in a round, about: weights and gradients of as many are there whole, twice."""


@dataclass(frozen=True, eq=False)
class Share:
    """A parameter that is dealt out.

    Args:
        p: the parameter.
        site: what was decided about it, its owner among it.
        spread: of its entries.
    """

    p: Tensor
    site: Site
    spread: Spread

    @property
    def mine(self) -> bool:
        """Whether this process steps it."""
        return self.site.owner == self.spread.rank


class Dealer:
    """Takes what the processes of a group have of parameters to those that step them, and takes the weights back.

    A round has some parameters of every process. While one round is stepped the next one is on its way.

    Args:
        shares: all of one group of processes, in the same order on each of them.
        here: what is here of a parameter.
        gradient: what is here of its gradient.
        lent: takes the whole weights of parameters that are being stepped here.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        here: Callable[[Tensor], Tensor],
        gradient: Callable[[Tensor], Tensor],
        lent: dict[Tensor, Tensor],
    ) -> None:
        self._here, self._gradient, self._lent = here, gradient, lent
        self._rounds = _rounds(shares)

    def rounds(self) -> Generator[dict[Tensor, Tensor]]:
        """Parameter -> gradient, whole, of what this process steps in each round; weights are lent until the next."""
        coming = (_Gathering(round_, self._here, self._gradient) for round_ in self._rounds)
        ahead, returning = list(islice(coming, 1)), list[_Scattering]()
        while ahead:
            now = ahead.pop()
            whole = now.wait()
            ahead += islice(coming, 1)
            self._lent |= {p: weights for p, (weights, _) in whole.items()}
            try:
                yield {p: gradient for p, (_, gradient) in whole.items()}
                returning.append(_Scattering(now.shares, self._lent, self._here))
                if len(returning) > 1:  # so that the weights of two rounds at most are on their way
                    returning.pop(0).wait()
            finally:
                for p in whole:
                    del self._lent[p]
        for scattering in returning:
            scattering.wait()


class Shared(Protocol):
    """What was decided about parameters that processes share."""

    sites: dict[Tensor, Site]
    placements: dict[Tensor, Spread]

    def here(self, p: Tensor) -> Tensor:
        """What is here of one."""
        ...


def deal(
    params: Sequence[Tensor], shared: Shared, gradient: Callable[[Tensor], Tensor], lent: dict[Tensor, Tensor]
) -> Generator[dict[Tensor, Tensor]]:
    """The rounds of parameters that one process each steps for all, one group of processes after the other.

    Args:
        params: the parameters, in the same order in every process.
        shared: what was decided about them.
        gradient: what is here of a gradient.
        lent: takes the whole weights of those that are being stepped here.
    """
    by_group: dict[dist.ProcessGroup | None, list[Share]] = {}
    for p in params:
        spread = shared.placements[p]
        by_group.setdefault(spread.group, []).append(Share(p, shared.sites[p], spread))
    for shares in by_group.values():
        yield from Dealer(shares, shared.here, gradient, lent).rounds()


def _rounds(shares: Sequence[Share]) -> Iterator[list[Share]]:
    round_, load = list[Share](), dict[int, int]()
    for share in shares:
        owner, size = share.site.owner or 0, share.p.numel()
        if load.get(owner, 0) + size > _AT_ONCE and round_:
            yield round_
            round_, load = [], {}
        round_.append(share)
        load[owner] = load.get(owner, 0) + size
    if round_:
        yield round_


def _size(piece: Piece) -> int:
    return prod(s.stop - s.start for s in piece)


class _Exchange:
    """Bytes from every process to every other one, on their way."""

    def __init__(self, parts: Sequence[Sequence[Tensor]], expected: Sequence[int], spread: Spread) -> None:
        """Begin.

        Args:
            parts: what goes to each process.
            expected: how many bytes come from each.
            spread: of one of the parameters: its group of processes.
        """
        given = [[_bytes_of(x) for x in own] for own in parts]
        counts = [sum(x.numel() for x in own) for own in given]
        flat = [x for own in given for x in own]
        device = spread.comm_of_all.device
        spread.comm_of_all.traffic.add(sum(counts) - counts[spread.rank])
        self._sent = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)
        self._expected = list(expected)
        self._got = torch.empty(sum(expected), dtype=torch.uint8, device=device)
        self._work = dist.all_to_all_single(
            self._got, self._sent, self._expected, counts, group=spread.group, async_op=True
        )

    def wait(self) -> list[Tensor]:
        """What came from each process."""
        if self._work is not None:
            self._work.wait()
        return [*self._got.split(self._expected)]


def _bytes_of(x: Tensor) -> Tensor:
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return real.contiguous().view(-1).view(torch.uint8)


def _from_bytes(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    real = dtype.to_real() if dtype.is_complex else dtype
    values = (x.clone() if x.storage_offset() % dtype.itemsize else x).view(real)  # where its entries may lie
    return torch.view_as_complex(values.view(*shape, 2)) if dtype.is_complex else values.view(shape)


class _Reader:
    """Reads tensors from bytes, one after the other."""

    def __init__(self, given: Tensor) -> None:
        self._given, self._place = given, 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next one."""
        size = prod(shape) * dtype.itemsize
        own = self._given[self._place : self._place + size]
        self._place += size
        return _from_bytes(own, shape, dtype)


class _Gathering:
    """Weights and gradients on their way to those who step them."""

    def __init__(
        self, shares: Sequence[Share], here: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor]
    ) -> None:
        self.shares, first = shares, shares[0].spread
        parts: list[list[Tensor]] = [[] for _ in first.pieces]
        for share in shares:
            parts[share.site.owner or 0] += [here(share.p), gradient(share.p)]
        self._mine = [share for share in shares if share.mine]
        expected = [
            sum(2 * _size(share.spread.pieces[rank]) * share.p.element_size() for share in self._mine)
            for rank in range(len(first.pieces))
        ]
        self._exchange = _Exchange(parts, expected, first)

    def wait(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Parameter -> weights and gradient, whole, of those that are stepped here."""
        came = [_Reader(x) for x in self._exchange.wait()]
        found: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for share in self._mine:
            shape, dtype = share.spread.shape, share.p.dtype
            whole = tuple(torch.empty(shape, dtype=dtype, device=share.p.device) for _ in range(2))
            for rank, piece in enumerate(share.spread.pieces):
                for target in whole:
                    target[piece] = came[rank].take(tuple(s.stop - s.start for s in piece), dtype)
            found[share.p] = (whole[0], whole[1])
        return found


class _Scattering:
    """New weights on their way back."""

    def __init__(
        self, shares: Sequence[Share], lent: Mapping[Tensor, Tensor], here: Callable[[Tensor], Tensor]
    ) -> None:
        self._shares, self._here, first = shares, here, shares[0].spread
        mine = [share for share in shares if share.mine]
        parts = [[lent[share.p][share.spread.pieces[rank]] for share in mine] for rank in range(len(first.pieces))]
        expected = [
            sum(here(share.p).numel() * share.p.element_size() for share in shares if share.site.owner == rank)
            for rank in range(len(first.pieces))
        ]
        self._exchange = _Exchange(parts, expected, first)

    def wait(self) -> None:
        """Write what came into the parameters."""
        came = [_Reader(x) for x in self._exchange.wait()]
        for share in self._shares:
            own = self._here(share.p)
            own.copy_(came[share.site.owner or 0].take(tuple(own.shape), own.dtype))
