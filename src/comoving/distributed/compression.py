"""DistributedDataParallel sends the cores of projected parameters in place of their gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..codecs.base import as_real
from ..drivers.replicas import Replicas as Driver
from ..drivers.replicas import clear
from ..optimizer import LowRankOptimizer
from ..precision import full_precision
from ..validate import check_choice, check_int
from .agreement import agree
from .comms import Replicas
from .copies import Copies
from .cores import Sent, check_cores, drive
from .passes import after_averaging, check_averages, replicated
from .traffic import Traffic
from .wire_frames import WireFrame, WireFrames
from .wires import WIRES, WireName
from .wires import wire as wire_of


def compress(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    wire: WireName = "bfloat16",
    accumulate: int = 1,
    whole: WireFrame | None = None,
) -> Sent:
    """From now on let each process send the cores of its gradients in place of the gradients.

    The training loop stays as it is: ``backward()``, ``step()``, ``zero_grad()``. Each process projects its own
    gradient, with what it kept itself, into the frame that all share; what is stepped by is the mean of the cores, and
    what a process's core does not hold, rounding on the way included, stays in its own feedback. Frames are searched
    in the mean of the gradients, which no process sees: contractions with it are summed, n x r numbers a refresh.
    Dense parameters and whole frames are averaged as ever, the latter in frames of the wire's own where ``whole`` says
    so. Until ``step()`` ``p.grad`` of a projected parameter holds a :class:`comoving.drivers.taken.TakenUp`, a tensor
    without numbers.

    :class:`comoving.residual.Feedback` becomes its own form, ``own=True``. At the first backward pass all processes
    compare their optimizers, and these arguments (:func:`agree`). With ``on_nonfinite="skip"`` a bad gradient on one
    process skips the step on all, with "raise" it raises on all; one number is read from the device a step.

    Args:
        model: a DistributedDataParallel.
        optimizer: of its parameters; one without state, or with a state that was made under ``own=True``.
        wire: of cores: "same", in their own dtype; "bfloat16"; "int8", in bytes with a float32 step every 128, a
            quarter of float32. With the last two frames are searched in sums in bfloat16.
        accumulate: backward passes in a window: all are taken up as cores, and their sum is sent in the last one, as
            is that of the gradients of dense parameters. Then comes ``step()``.
        whole: how gradients are sent of parameters that the rule steps in a whole frame (Muon, Shampoo, SOAP); None for
            as they are.

    Returns:
        A count of what is sent from now on.

    Raises:
        TypeError: another model or optimizer.
        ValueError: a recipe, or a model, that cannot be compressed so, with the reason.
        RuntimeError: a gradient is there already; stepping in the backward pass, or by recordings.
    """
    check_choice("wire", wire, WIRES)
    check_int("accumulate", accumulate, 1)
    model = replicated(model, "compress()")
    if not isinstance(cast("object", optimizer), LowRankOptimizer):
        raise TypeError(f"compress() needs an optimizer of comoving, got a {type(optimizer).__name__}")
    optimizer.check_undriven("compress()")
    _check_model(model, optimizer, whole)
    process_group = cast("dist.ProcessGroup", model.process_group)
    copies = Copies(process_group)
    driver, sent = drive(optimizer, wire, process_group, copies, "compress()", accumulate)
    unused = model.find_unused_parameters and not model.static_graph
    settings = {"wire": wire, "accumulate": accumulate, "whole": repr(whole)}
    hook = _Hook(optimizer, driver, process_group, sent.dense, unused, settings)
    if whole is not None:
        comm = Replicas(process_group, wire_of(wire).products, sent.frames)
        frames = WireFrames(whole, optimizer.sites, optimizer.seed, wire_of(wire), comm, sent.cores, copies)
        hook.frames = driver.beside = frames
    model.register_comm_hook(hook, _hooked)
    if model.gradient_as_bucket_view or unused:
        hook.clearing = model.register_forward_pre_hook(hook.before_a_pass)
    return sent


@dataclass(eq=False)
class _Hook:
    """What DistributedDataParallel calls in the backward pass, with one bucket of gradients after the other.

    It holds on to no model, which holds on to it where no collector of garbage sees it.

    Args:
        optimizer: compared with those of the other processes, once.
        driver: takes gradients up.
        group: the processes.
        traffic: counts what is sent of dense parameters.
        unused: whether some parameters may have no gradient on any process.
        settings: those of compress(), compared likewise.
    """

    optimizer: LowRankOptimizer
    driver: Driver
    group: dist.ProcessGroup
    traffic: Traffic
    unused: bool
    settings: Mapping[str, Any]
    frames: WireFrames | None = None
    clearing: RemovableHandle | None = None
    _agreed: bool = False
    _within: bool = False
    _sends: bool = True
    _passes: int = 0

    def __call__(self, bucket: GradBucket) -> Future[Tensor]:
        """Take up what is projected, and average the rest."""
        sites = self.optimizer.sites
        with torch.no_grad(), full_precision():
            if bucket.index() == 0:
                self._begin()
            both = _cut(bucket)
            for p, _ in both:
                clear(p)
            projected = {p: g for p, g in both if p in sites and sites[p].projected}
            if projected:
                self.driver.take(projected, self.unused, self._sends)
            framed = {p: g for p, g in both if self._sends and self.frames is not None and p in self.frames}
            if framed and self.frames is not None:
                self.frames.take(framed, self.unused)
            taken = projected | framed
            return self._averaged(bucket.buffer(), [g for p, g in both if p not in taken], [*taken.values()])

    def _begin(self) -> None:
        """A backward pass begins to send; one that never came to its end has left nothing of use."""
        if self._within:
            self.driver.leave()
            if self.frames is not None:
                self.frames.leave()
        self._within, self._sends = True, self.driver.begin_pass()
        if not self._agreed:
            agree(self.optimizer, self.group, self.settings)
            self._agreed = True
        if not self.driver.waiting:
            self.optimizer.roster.check()
        after_averaging(self._end)

    def before_a_pass(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        """Take away what stands for gradients where DistributedDataParallel is about to read it.

        That is once, when buckets are cut anew after the first pass, and whenever a parameter may be unused.
        """
        if self._passes and torch.is_grad_enabled():
            self.driver.clear()
            if not self.unused and self.clearing is not None:
                self.clearing.remove()

    def _end(self) -> None:
        self._within = False
        self._passes += 1
        if self.frames is not None:
            with torch.no_grad(), full_precision():
                self.frames.finish()
        self.driver.leave_stand_ins()

    def _averaged(self, buffer: Tensor, dense: Sequence[Tensor], taken: Sequence[Tensor]) -> Future[Tensor]:
        """The buffer with means of the dense gradients, and zeros for the others."""
        for g in taken:
            g.zero_()
        if not dense or not self._sends:
            done: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
            done.set_result(buffer)
            return done
        flat = as_real(torch.cat([g.reshape(-1) for g in dense])).flatten() if taken else as_real(buffer)
        flat.div_(dist.get_world_size(self.group))
        self.traffic.note(flat)
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None

        def finish(_: Future[Any]) -> Tensor:
            if taken:
                means = flat.split([as_real(g).numel() for g in dense])
                for g, mean in zip(dense, means, strict=True):
                    own = as_real(g)
                    own.copy_(mean.view(own.shape))
            return buffer

        return work.get_future().then(finish)


def _hooked(hook: _Hook, bucket: GradBucket) -> Future[Tensor]:
    return hook(bucket)


def _cut(bucket: GradBucket) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of a bucket with its gradient, a view of the buffer.

    The bucket's own ``gradients()`` are right for contiguous real parameters only: it takes pairs of reals for as many
    complex numbers, and gradients that lie as a transposed parameter does for contiguous ones.
    """
    params, buffer = bucket.parameters(), bucket.buffer()
    if params and params[0].is_complex() and not buffer.is_complex():
        buffer = torch.view_as_complex(buffer.view(-1, 2))
    found, start = list[tuple[Tensor, Tensor]](), buffer.storage_offset()
    for p in params:
        filled = 1 + sum((d - 1) * s for d, s in zip(p.shape, p.stride(), strict=True)) == p.numel()
        strides = p.stride() if filled else torch.empty(p.shape, device="meta").stride()
        found.append((p, buffer.as_strided(p.shape, strides, start)))
        start += p.numel()
    return found


# ------------------------------------------------------------------------------------------------------------ refusals


def _check_model(model: DistributedDataParallel, optimizer: LowRankOptimizer, whole: WireFrame | None) -> None:
    """Raise unless the model averages every gradient that the optimizer steps by, and this one can take it up."""
    check_averages(model, optimizer.sites)
    if model.mixed_precision is not None:
        raise ValueError("mixed_precision= of DistributedDataParallel is refused by compress(): use autocast instead")
    check_cores(optimizer, "compress()", whole)
    full = [site.name for p, site in optimizer.sites.items() if site.projected and p.grad is not None]
    if full:
        raise RuntimeError(f"{', '.join(full[:5])} has a gradient already: call step() or zero_grad() first")
