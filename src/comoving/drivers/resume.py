"""What a step that failed had stepped, so that the next one goes on instead of stepping it twice."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

WHOLE: frozenset[str] = frozenset()
"""In place of the numbers of blocks: all of a parameter was stepped."""


class Resume:
    """Parameters that have been stepped, and by which gradients, none of which is kept alive.

    Args:
        stepped: parameter -> :data:`WHOLE`, or the blocks of it that were stepped.
        gradient: of a parameter that has one.
    """

    def __init__(self, stepped: Mapping[Tensor, frozenset[str]], gradient: Callable[[Tensor], Tensor]) -> None:
        self._gradient = gradient
        self._stepped = [(p, blocks, self._mark(p)) for p, blocks in stepped.items()]

    def by_the_same_gradients(self) -> dict[Tensor, frozenset[str]]:
        """Those of them whose gradients are the same tensors still, and have not been written to."""
        found: dict[Tensor, frozenset[str]] = {}
        for p, blocks, before in self._stepped:
            now = self._mark(p)
            if before is not None and now is not None and before == now:
                found[p] = blocks
        return found

    def _mark(self, p: Tensor) -> tuple[StorageWeakRef, int] | None:
        """What tells a gradient from others: its storage, whose address none can have while this is kept, and a count.

        None where there is none, or a sparse one, which has no storage and is about to be refused.
        """
        if p.grad is None or p.grad.layout is not torch.strided:
            return None
        g = self._gradient(p)
        return StorageWeakRef(g.untyped_storage()), g._version  # noqa: SLF001
