"""What stands for CUDA graphs where there is no GPU.

A CUDA graph performs the operations on the device that were noted, on the tensors that they were noted with, and
nothing of what the host did meanwhile: what it computed was computed once, and numbers of its own that went to the
device stay those that they were. While a graph is recorded nothing is performed on the device.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

COPY = torch.ops.aten._foreach_copy_.default


class Tape(TorchDispatchMode):
    """Notes operations while it performs them, can undo them, and performs those on the device again.

    Args:
        device: the type of the device.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.calls, self.before, self.frozen = device, [], [], []
        self._made = {}

    def _ours(self, x):
        return x.device.type == self.device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is COPY:
            return self._copy(*args)
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        foreign = [x for x in given if not self._ours(x)]
        if len(foreign) < len(given):
            self.frozen += [str(func) for x in foreign if id(x) not in self._made]
            written = [x for x, a in zip(args, func._schema.arguments, strict=False) if a.is_write]
            self.before += [(x, x.clone()) for x in tree_iter(written) if self._ours(x)]
        out = func(*args, **kwargs)
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        self._made.update((id(x), x) for x in made)
        if len(foreign) < len(given) or any(map(self._ours, made)):
            held = {id(x): x.clone() for x in foreign}
            args, kwargs = tree_map(lambda x: held.get(id(x), x), (args, kwargs))
            self.calls.append((func, args, kwargs, out))
        return out

    def _copy(self, targets, values):
        """What the host copies to itself beside the rest is no part of it."""
        for x, value in zip(targets, values, strict=True):
            if self._ours(x):
                self.frozen += [] if self._ours(value) else [str(COPY)]
                self.before.append((x, x.clone()))
                self.calls.append((torch.ops.aten.copy_.default, (x, value), {}, x))
            x.copy_(value)

    def undo(self):
        """Put back what was written to on the device."""
        for x, value in reversed(self.before):
            x.copy_(value)
        self.before.clear()

    def replay(self):
        """Perform what was noted."""
        known = {}

        def now(x):
            return known.get(id(x), x) if isinstance(x, Tensor) else x

        for func, args, kwargs, out in self.calls:
            new = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, made in zip(tree_iter(out), tree_iter(new), strict=True):
                if isinstance(old, Tensor):
                    known[id(old)] = made


class Recorder:
    """Records tapes; ``made`` and ``played`` are counts, ``frozen`` lists what took in numbers of the host's.

    Args:
        device: the type of the device.
    """

    def __init__(self, device="cpu"):
        self.device, self.made, self.played, self.frozen = device, 0, 0, []

    def __call__(self, work, device):
        assert device.type == self.device
        tape = Tape(self.device)
        try:
            with tape:
                work()
        finally:
            tape.undo()
        self.made += 1
        self.frozen += tape.frozen

        def replay():
            self.played += 1
            tape.replay()

        return replay
