"""What a step that failed had stepped, so that the next one goes on instead of stepping it twice."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

WHOLE: frozenset[str] = frozenset()
"""In place of the numbers of blocks: all of a parameter was stepped."""


class Resume:
    """Parameters that have been stepped, and by which gradients, none of which is kept alive.

    Args:
        stepped: parameter -> :data:`WHOLE`, or the blocks of it that were stepped.
    """

    def __init__(self, stepped: Mapping[Tensor, frozenset[str]] | None = None) -> None:
        self._stepped = [(p, blocks, *_mark(p)) for p, blocks in (stepped or {}).items()]

    def by_the_same_gradients(self) -> dict[Tensor, frozenset[str]]:
        """Those of them whose gradients are the same tensors still, and have not been written to."""
        return {p: blocks for p, blocks, *mark in self._stepped if mark == [*_mark(p)]}


def _mark(p: Tensor) -> tuple[StorageWeakRef | None, int]:
    """What tells a gradient from others: its storage, whose address none can have while this is kept, and a count."""
    g = p.grad
    if g is None or g.layout is not torch.strided:  # a sparse one, which is about to be refused, has no storage
        return None, 0
    return StorageWeakRef(g.untyped_storage()), g._version  # noqa: SLF001
