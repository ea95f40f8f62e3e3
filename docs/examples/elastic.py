"""Training that survives the death of a process: checkpoints that any number of processes can go on from.

torchrun --nproc_per_node 2 --max-restarts 3 docs/examples/elastic.py run

On a CPU set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: else processes that gloo starts again look for those before them.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import comoving

STEPS, EVERY = 40, 10


def batch(step: int) -> torch.Tensor:
    """The same for all processes, whoever they are: what a loader does that knows its place after a restart."""
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(step))


def error(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mean square, what is learned being a sine of some of the inputs."""
    return (model(x) - x[:, :8].sin()).square().mean()


def train(folder: Path, after: Callable[[int], None] = lambda step: None) -> float:
    """Train from the newest checkpoint in the folder, or from the start; the loss in the end, on a batch of its own.

    ``after`` is called with the number of finished steps.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    fully_shard(model)
    optimizer = comoving.AdamW(model.named_parameters(), lr=1e-2, rank=0.25)
    newest, begin = folder / "newest", 0
    if newest.exists():
        begin = int(newest.read_text())
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / str(begin))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for step in range(begin, STEPS):
        optimizer.zero_grad()
        error(model, batch(step)).backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / str(step + 1))
            if dist.get_rank() == 0:  # only now is it the newest: a process that dies above leaves the one before
                (folder / "next").write_text(str(step + 1))
                (folder / "next").rename(newest)
        after(step + 1)
    with torch.no_grad():
        return error(model, batch(STEPS)).item()


if __name__ == "__main__":
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    where = Path(sys.argv[1])
    where.mkdir(exist_ok=True)
    last = train(where)
    if dist.get_rank() == 0:
        sys.stdout.write(f"loss {last:.6f}\n")
    dist.destroy_process_group()
