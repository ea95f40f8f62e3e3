"""Stepping in the backward pass of DistributedDataParallel, by gradients that are averaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ..codecs.base import as_real
from ..drivers import Backward
from ..sites import Site
from .passes import after_averaging, check_averages, replicated


def averaging(model: nn.Module, sites: Mapping[Tensor, Site]) -> DistributedDataParallel:
    """The model, which has to average the gradients of all these parameters.

    Raises:
        TypeError: another model.
        ValueError: one that does not, or has a hook already.
    """
    ddp = replicated(model, "step_in_backward(model=...)")
    check_averages(ddp, sites)
    return ddp


def take_averaged(model: DistributedDataParallel, backward: Backward) -> None:
    """From now on take up all gradients at the end of each backward pass that averages them.

    Args:
        model: of :func:`averaging`.
        backward: takes them up, until it is told to leave them.
    """
    group = cast("dist.ProcessGroup", model.process_group)
    hook = _Hook(backward, group)
    model.register_comm_hook(hook, _hooked)
    if model.gradient_as_bucket_view or (model.find_unused_parameters and not model.static_graph):
        model.register_forward_pre_hook(hook.before_a_pass)


@dataclass(eq=False)
class _Hook:
    """What DistributedDataParallel calls in the backward pass, with one bucket of gradients after the other.

    Args:
        backward: takes gradients up.
        group: the processes.
    """

    backward: Backward
    group: dist.ProcessGroup

    def __call__(self, bucket: GradBucket) -> Future[Tensor]:
        """Average them."""
        if bucket.index() == 0:
            after_averaging(self._end)
        buffer = bucket.buffer()
        real = as_real(buffer)
        work = dist.all_reduce(real.div_(dist.get_world_size(self.group)), group=self.group, async_op=True)
        assert work is not None

        def done(_: Future[Any]) -> Tensor:
            return buffer

        return work.get_future().then(done)

    def _end(self) -> None:
        self.backward.take_all()

    def before_a_pass(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        """Take away what stands for gradients where DistributedDataParallel is about to read it."""
        if torch.is_grad_enabled():
            self.backward.clear()


def _hooked(hook: _Hook, bucket: GradBucket) -> Future[Tensor]:
    return hook(bucket)
