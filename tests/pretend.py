"""A device that is none: its numbers lie on the CPU, and whatever makes the host wait for them is noted.

What is noted are reads (a number, a truth value, a shape that follows from numbers, a copy to the host), and what waits
for CUDA without reading: copies from the host that are not ``non_blocking``, and the decompositions that ask inside of
torch whether they converged. Tensors of two devices meet as they may with CUDA: numbers on the host go everywhere,
other tensors nowhere. Tensors are :class:`OnDevice`, and nothing can be done to them outside of a :class:`Pretend`.
"""

import sys
import types
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import comoving

DEVICE = torch.device("privateuseone:0")
SOURCE = Path(comoving.__file__).parent
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default,
    aten.masked_select.default, aten.isin.Tensor_Tensor, aten.bincount.default, aten.repeat_interleave.Tensor,
    aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default,
}  # fmt: skip
READS |= {aten._linalg_eigh.default, aten._linalg_svd.default}  # they call _linalg_check_errors, which fetches a number
INDEXES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
MASKS = (torch.bool, torch.uint8)


class OnDevice(torch.Tensor):
    """A tensor on the pretend device; ``own`` is what it stands for."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, own):
        own = own.resolve_conj().resolve_neg()
        self = torch.Tensor._make_wrapper_subclass(
            cls, own.shape, strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, device=DEVICE
        )
        self.own = own
        return self

    def data_ptr(self):
        return self.own.data_ptr()

    def tolist(self):
        return self.to("cpu").tolist()

    def __repr__(self, *, tensor_contents=None):
        return f"OnDevice({self.own!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the pretend device's mode")


def here(depth=2):
    """File and function of the library that asked; the helper that reads for others is passed over."""
    frame = sys._getframe(depth)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(SOURCE) and path.name != "checks.py":
            return f"{path.relative_to(SOURCE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


class Pretend(TorchDispatchMode):
    """Computes for tensors of the device; ``waits`` lists where the host waited for it, as "refresh: file:function"."""

    def __init__(self):
        super().__init__()
        self.waits = []
        self.what = "step"

    @contextmanager
    def refresh(self):
        """For an optimizer's ``refresh_scope``."""
        self.what = "refresh"
        yield
        self.what = "step"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, wrappers, plain = kwargs or {}, {}, []

        def inside(x):
            if isinstance(x, OnDevice):
                wrappers[id(x.own)] = x
                return x.own
            if isinstance(x, torch.Tensor):
                plain.append(x)
            return [inside(y) for y in x] if isinstance(x, list | tuple) else x

        def outside(x):
            if isinstance(x, torch.Tensor):
                return wrappers[id(x)] if id(x) in wrappers else OnDevice(x)
            return type(x)(map(outside, x)) if isinstance(x, list | tuple) else x

        given, named = [inside(x) for x in args], {name: inside(x) for name, x in kwargs.items()}
        to = kwargs.get("device")
        if to is not None:
            named["device"] = torch.device("cpu")
        on_device = bool(wrappers) if to is None else torch.device(to).type == DEVICE.type
        self._look(func, args, kwargs, wrappers, plain)
        result = func(*given, **named)
        if not on_device:
            return result
        if func is aten.copy_.default and not isinstance(args[0], OnDevice):
            return result
        return outside(result)

    def _look(self, func, args, kwargs, wrappers, plain):
        to = kwargs.get("device")
        if wrappers and func in READS:
            self._note()
        elif func in INDEXES and wrappers and any(x is not None and x.dtype in MASKS for x in args[1]):
            self._note()
        elif func is aten._to_copy.default:
            leaves = bool(wrappers) and to is not None and torch.device(to).type != DEVICE.type
            comes = not wrappers and to is not None and torch.device(to).type == DEVICE.type
            if leaves or (comes and not kwargs.get("non_blocking")):
                self._note()
        elif func is aten.copy_.default and bool(wrappers) and plain:
            leaves = isinstance(args[1], OnDevice)
            waits = len(args) < 3 or not args[2]
            if leaves or waits and args[1].ndim:
                self._note()
        elif func is aten._foreach_copy_.default:
            if any(isinstance(a, OnDevice) is not isinstance(b, OnDevice) for a, b in zip(*args[:2], strict=True)):
                self._note()
        elif wrappers and func not in INDEXES:
            strict = func in (aten.stack.default, aten.cat.default)
            strangers = [x for x in plain if x.ndim or strict]
            written = func._schema.is_mutable and plain and args and any(x is args[0] for x in plain)
            assert not strangers and not written, f"{func} on tensors of two devices, in {here(3)}"

    def _note(self):
        self.waits.append(f"{self.what}: {here(4)}")


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


torch._C._acc.register_python_privateuseone_device_guard(_Guard())  # torch keeps it; without one it makes no copies


class _Module(types.ModuleType):
    """What torch asks of a device's module."""

    def __init__(self):
        super().__init__("torch.privateuseone")

    @staticmethod
    def _lazy_init():
        pass

    @staticmethod
    def _is_in_bad_fork():
        return False


def install(monkeypatch):
    """Let torch make tensors on the device for the time of a test, random ones too."""
    module, true = _Module(), torch.Generator
    monkeypatch.setattr(torch, "privateuseone", module, raising=False)
    monkeypatch.setitem(sys.modules, "torch.privateuseone", module)
    monkeypatch.setattr(
        torch, "Generator", lambda device="cpu": true("cpu" if torch.device(device) == DEVICE else device)
    )
