"""Bytes shared out where they save most: one option for each of several things, within a limit together.

The options of a thing have bytes and a loss. Their lower convex hull in (bytes, loss) is walked, over all things by
loss per byte, from the least loss down until the limit is met; bytes that the last step leaves over are then spent
where they save most.

Guarantee: the sum of losses exceeds the least possible one, over all options that fit, by at most the loss of the last
step. For the relaxed problem, in which a step may be taken in part, this walk is the optimum: the loss as a function of
the limit is convex, and no more than one thing is off its hull.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol, TypeVar


class Priced(Protocol):
    """What it takes, and what it costs in quality."""

    @property
    def bytes(self) -> int:
        """Of state."""
        ...

    @property
    def loss(self) -> float:
        """Lower is better; losses of several things add up."""
        ...


_P = TypeVar("_P", bound=Priced)


class Short(Exception):
    """Even the cheapest options take more than the limit; ``least`` bytes are what they take."""

    def __init__(self, least: int) -> None:
        super().__init__(f"the cheapest options take {least} bytes")
        self.least = least


def frontier(options: Iterable[_P]) -> list[_P]:
    """The options that no other one betters in both bytes and loss, by rising bytes; of equals the first."""
    best, least = list[_P](), float("inf")
    for option in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if option.loss < least:
            best.append(option)
            least = option.loss
    return best


def allocate(frontiers: Sequence[Sequence[_P]], limit: int) -> list[_P]:
    """One option of each frontier, within the limit together.

    Raises:
        Short: even the cheapest take more.
    """
    hulls = [_hull(frontier) for frontier in frontiers]
    at, total = [0] * len(hulls), sum(hull[0].bytes for hull in hulls)
    steps = [(_slope(hull, 0), i) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapify(steps)
    while total > limit:
        if not steps:
            raise Short(total)
        _, i = heappop(steps)
        at[i] += 1
        total += hulls[i][at[i]].bytes - hulls[i][at[i] - 1].bytes
        if at[i] + 1 < len(hulls[i]):
            heappush(steps, (_slope(hulls[i], at[i]), i))
    return _spent([hull[k] for hull, k in zip(hulls, at, strict=True)], frontiers, limit - total)


def _hull(frontier: Sequence[_P]) -> list[_P]:
    """The lower convex hull, from the least loss to the fewest bytes: every step costs more per byte than the last."""
    hull = list[_P]()
    for option in reversed(frontier):
        while len(hull) > 1 and _slope([*hull[-2:], option], 0) >= _slope([*hull[-2:], option], 1):
            hull.pop()
        hull.append(option)
    return hull


def _slope(hull: Sequence[Priced], k: int) -> float:
    """Loss per byte of the step from the k-th option of a hull to the next."""
    return (hull[k + 1].loss - hull[k].loss) / (hull[k].bytes - hull[k + 1].bytes)


def _spent(chosen: list[_P], frontiers: Sequence[Sequence[_P]], room: int) -> list[_P]:
    """The options after bytes that are left over went, again and again, to whom they save the most loss."""
    sizes = [[option.bytes for option in frontier] for frontier in frontiers]
    while True:
        offers = [
            (option.loss - frontier[bisect_right(size, option.bytes + room) - 1].loss, -i)
            for i, (option, frontier, size) in enumerate(zip(chosen, frontiers, sizes, strict=True))
        ]
        gain, place = max(offers, default=(0.0, 0))
        if gain <= 0:
            return chosen
        i = -place
        better = frontiers[i][bisect_right(sizes[i], chosen[i].bytes + room) - 1]
        room -= better.bytes - chosen[i].bytes
        chosen[i] = better
