"""Several processes, as threads of one: what they tell one another goes through a list."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

WAIT = 30


class Table:
    """Where each of ``count`` threads puts something down, and sees what all have put there."""

    def __init__(self, count):
        self.count, self._barrier, self._given = count, Barrier(count), [None] * count
        self.sent = 0

    def all(self, rank, x):
        self._given[rank] = x
        self._barrier.wait(WAIT)
        given = list(self._given)
        self._barrier.wait(WAIT)
        self.sent += x.numel() if rank == 0 else 0
        return given

    def run(self, work):
        """What each thread makes of its number; the error of the first that fails."""

        def guarded(rank):
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return [future.result() for future in [pool.submit(guarded, rank) for rank in range(self.count)]]


class Mean:
    """Each has an operand of its own."""

    alone, split = False, None

    def __init__(self, table, rank):
        self.table, self.rank = table, rank

    def joined(self, product, over):
        return torch.stack(self.table.all(self.rank, product)).mean(0)

    def whole(self, x, dim):
        return x

    def here(self, x, dim):
        return x

    def length(self, here):
        return here

    def sent(self, core, rows):
        return core

    def largest(self, figure):
        return torch.stack(self.table.all(self.rank, figure)).amax(0)

    def norm(self, norms):
        return norms


class Split(Mean):
    """Each has some entries of one mode, as many as ``sizes`` says."""

    def __init__(self, table, rank, split, sizes):
        super().__init__(table, rank)
        self.split, self.sizes = split, sizes

    def joined(self, product, over):
        return torch.stack(self.table.all(self.rank, product)).sum(0) if self.split in over else product

    def whole(self, x, dim):
        return torch.cat(self.table.all(self.rank, x), dim)

    def here(self, x, dim):
        return x.split(self.sizes, dim)[self.rank]

    def length(self, here):
        assert here == self.sizes[self.rank]
        return sum(self.sizes)

    def norm(self, norms):
        return torch.stack(self.table.all(self.rank, norms)).norm(dim=0)
