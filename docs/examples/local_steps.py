"""Training over a slow network: every process trains by itself, and sends a fraction of its weights now and then.

torchrun --nproc_per_node 2 docs/examples/local_steps.py
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

import comoving
import comoving.distributed


def batch(step: int) -> torch.Tensor:
    """Each process has data of its own."""
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(1000 * step + dist.get_rank()))


def train(steps: int = 400, every: int = 20, rank: float = 0.25) -> tuple[float, int]:
    """Train; the loss on data that no process has seen, and the bytes that this process has sent."""
    torch.manual_seed(0)  # the same weights on all processes
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    inner = comoving.AdamW(model.named_parameters(), lr=3e-3, rank=0.25)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, steps)
    local = comoving.distributed.LocalSteps(model, inner, every=every, rank=rank, wire="bfloat16")
    for step in range(steps):
        x = batch(step)
        (model(x) - x[:, :8].sin()).square().mean().backward()
        local.step()  # after every 20th all processes have the same weights
        local.zero_grad()
        schedule.step()
    local.average()  # the steps since then
    x = torch.randn(1024, 32, generator=torch.Generator().manual_seed(-1))
    with torch.no_grad():
        return (model(x) - x[:, :8].sin()).square().mean().item(), local.sent.bytes


if __name__ == "__main__":
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    loss, sent = train()
    if dist.get_rank() == 0:
        sys.stdout.write(f"loss {loss:.6f}, {sent} bytes sent\n")
    dist.destroy_process_group()
