"""How one run is trained by several processes: each has its part of every batch, and the whole model or a shard of it.

Every process draws the same global batch and keeps its part, so that N processes train on what one would.
"""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from comoving.optimizer import LowRankOptimizer
from comoving.race.contenders import Refused
from comoving.race.settings import RunSettings
from comoving.race.tasks import Batch


class Wrapping(Protocol):
    """What a run does otherwise when it is not alone; the methods are called in this order."""

    def sharded(self, model: nn.Module) -> nn.Module:
        """The same model, as the optimizer is built for it.

        Raises:
            Refused: it cannot be sharded.
        """
        ...

    def trained(self, model: nn.Module, optimizer: Any) -> nn.Module:
        """The model that is called in training, once there is an optimizer.

        Raises:
            Refused: the optimizer cannot train it.
        """
        ...

    def part(self, batch: Batch) -> Batch:
        """What this process computes of a batch."""
        ...

    def mean(self, loss: Tensor) -> float:
        """The loss of the whole batch."""
        ...

    def facts(self, steps: int) -> dict[str, Any]:
        """For the record of a run of ``steps`` steps."""
        ...


class Alone:
    """One process."""

    def sharded(self, model: nn.Module) -> nn.Module:
        """The model."""
        return model

    def trained(self, model: nn.Module, optimizer: Any) -> nn.Module:
        """The model."""
        return model

    def part(self, batch: Batch) -> Batch:
        """All of it."""
        return batch

    def mean(self, loss: Tensor) -> float:
        """The loss."""
        return loss.item()

    def facts(self, steps: int) -> dict[str, Any]:
        """Nothing."""
        return {}


class Several(Alone):
    """Equal parts of a batch for all processes of the default group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def part(self, batch: Batch) -> Batch:
        """The rows that are this process's own."""
        own = len(batch[0]) // self.size
        rows = slice(self.rank * own, (self.rank + 1) * own)
        return batch[0][rows], batch[1][rows]

    def mean(self, loss: Tensor) -> float:
        """The mean of the parts' losses, which are means over equally many samples."""
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / self.size


class Replicated(Several):
    """DistributedDataParallel.

    Args:
        compress: send the cores of projected gradients only, where the optimizer is one of ours that projects.
    """

    def __init__(self, compress: bool) -> None:
        super().__init__()
        self.compress = compress
        self.compressed = False
        self.bytes: Callable[[int], int] = lambda steps: 0

    def trained(self, model: nn.Module, optimizer: Any) -> nn.Module:
        """The model in DistributedDataParallel, with our hook where gradients are compressed."""
        wrapped = nn.parallel.DistributedDataParallel(model)
        ours = isinstance(optimizer, LowRankOptimizer)
        self.compressed = self.compress and ours and any(site.projected for site in optimizer.sites.values())
        if self.compressed:
            sent = hooked(wrapped, optimizer)
            self.bytes = lambda steps: round(sent.bytes / max(1, steps))
        else:
            whole = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            self.bytes = lambda steps: whole
        return wrapped

    def facts(self, steps: int) -> dict[str, Any]:
        """Whether gradients were compressed, and the bytes that this process put into sums, a step."""
        # Refreshed then is in the backward pass: a share of the optimizer's time it is no more.
        unknown = {"refresh_share": None} if self.compressed else {}
        own = {"wrapping": "ddp", "ranks": self.size, "compressed": self.compressed, "sent": self.bytes(steps)}
        return own | unknown


class Sharded(Several):
    """fully_shard of each block of the model's lists of modules, and of the rest.

    Args:
        device: its type.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def sharded(self, model: nn.Module) -> nn.Module:
        """The model, whose parameters are DTensors now.

        Raises:
            Refused: it has complex parameters.
        """
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415  (takes its time)
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

        complex_ones = [name for name, p in model.named_parameters() if p.is_complex()]
        if complex_ones:
            raise Refused(
                f"fully_shard takes no modules with real and complex weights, such as that of {complex_ones[0]}: "
                f"race with --ddp"
            )
        mesh = init_device_mesh(self.device, (self.size,))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for blocks in reversed(lists):  # those inside others first
            for block in blocks:
                fully_shard(block, mesh=mesh)
        # After a validation too the parameters are to be those that the optimizer has.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model

    def facts(self, steps: int) -> dict[str, Any]:
        """How many processes had shards; what fully_shard sent is not counted."""
        return {"wrapping": "fsdp", "ranks": self.size, "compressed": False, "sent": None}


def hooked(model: nn.parallel.DistributedDataParallel, optimizer: LowRankOptimizer) -> Any:
    """What :func:`comoving.distributed.compress` returns.

    Raises:
        Refused: this optimizer's gradients cannot be compressed.
    """
    distributed: Any = importlib.import_module("comoving.distributed")
    try:
        return distributed.compress(model, optimizer)
    except ValueError as error:
        raise Refused(str(error)) from error


def wrapping_of(run: RunSettings) -> Wrapping:
    """As the settings of a run have it; the processes have joined a group by then."""
    if run.wrapping == "ddp":
        return Replicated(run.compress)
    if run.wrapping == "fsdp":
        return Sharded(torch.device(run.device).type)
    return Alone()
