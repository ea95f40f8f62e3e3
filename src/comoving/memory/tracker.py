"""Measured memory: every storage that torch operations create is followed until it is freed."""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten: Any = torch.ops.aten
_COPIES: dict[Any, int] = {_aten._linalg_svd: 1, _aten._linalg_eigh: 2}


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and the most that were at once.

    Inside ``with tracker:`` every storage is followed that an operation returns, from then until its last tensor is
    gone, views and all; what is there before is followed by :meth:`watch`. Counted are the bytes asked for, without an
    allocator's rounding. What an operation allocates and frees inside itself is counted for the decompositions where it
    is as large as a matrix (measured: on a CPU an SVD holds one copy of its argument beside its results, a Hermitian
    eigenproblem two); elsewhere it is small, and left out.

    Args:
        *devices: device types to count, such as "cpu"; none for all.
    """

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """The most bytes that were alive at once, since the beginning or :meth:`reset_peak`."""
        self._devices = devices
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def watch(self, tensors: Iterable[Tensor]) -> "StorageTracker":
        """Follow the storages of tensors that exist already; each storage counts once."""
        for x in tensors:
            self._note(x)
        return self

    def reset_peak(self) -> None:
        """Let the peak begin anew at what is alive."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and follow what it returns."""
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._note(x)
        copies = _COPIES.get(func.overloadpacket, 0)
        if copies and self._counts(args[0]):
            self.peak = max(self.peak, self.live + copies * args[0].numel() * args[0].element_size())
        return result

    def _counts(self, x: Tensor) -> bool:
        return not self._devices or x.device.type in self._devices

    def _note(self, x: Tensor) -> None:
        if not self._counts(x):
            return
        storage = x.untyped_storage()
        key: int = storage._cdata  # pyright: ignore[reportPrivateUsage]
        size = storage.nbytes()
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            size, before = size - known[1], known[1]
            self._known[key] = (known[0], before + size)
        else:
            self._known[key] = (weakref.ref(storage, lambda ref: self._freed(key, ref)), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, ref: "weakref.ref[Any]") -> None:
        known = self._known.get(key)
        if known is not None and known[0] is ref:
            del self._known[key]
            self.live -= known[1]


class Usage(NamedTuple):
    """Bytes before, at the peak of, and after what was measured."""

    before: int
    peak: int
    after: int


def measure(run: Callable[[], object], there: Iterable[Tensor], device: torch.device | str = "cpu") -> Usage:
    """Measure the memory of a call: by the allocator's own counts on CUDA, by :class:`StorageTracker` elsewhere.

    Args:
        run: what is measured, such as ``optimizer.step``.
        there: tensors that exist before and count (weights, gradients, state); on CUDA all that is allocated counts. An
            iterator, where the run frees some of them: a list would keep them.
        device: whose memory is measured; on a CPU the tensors of all devices count together.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return Usage(before, torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device))
    tracker = StorageTracker().watch(there)
    before = tracker.live
    with tracker:
        run()
    return Usage(before, tracker.peak, tracker.live)
