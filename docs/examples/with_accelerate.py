"""Accelerate: ``torchrun --nproc_per_node 2 docs/examples/with_accelerate.py [ddp | fsdp]``."""

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn

import comoving


class Block(nn.Module):
    """A residual block; put the class of your model's blocks in its place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        """The sum."""
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    """Two blocks between an embedding and a head, and the loss."""

    def __init__(self, words: int = 32, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, words)

    def forward(self, inputs, labels):
        """The loss."""
        return nn.functional.cross_entropy(self.head(self.blocks(self.embedding(inputs))), labels)


def optimizer_of(model):
    """With names, so that embeddings, head, norms and biases stay dense."""
    return comoving.AdamW(model.named_parameters(), lr=1e-2, rank=0.25)


def train(model, data, how="ddp", build=optimizer_of):
    """One pass over data: batches of four a process."""
    plugin = None
    if how == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
    optimizer, loader = build(model), torch.utils.data.DataLoader(data, batch_size=4)
    # Not handed to prepare(), which would step it once for every process.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, len(data) // 8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # both at once: fsdp puts in its shards
    for inputs, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(model(inputs, labels))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    numbers = torch.arange(64)
    train(Model(), list(zip(numbers % 32, numbers * 3 % 32, strict=True)), *sys.argv[1:])
