"""Lightning: ``torchrun --nproc_per_node 2 docs/examples/with_lightning.py [ddp | fsdp]``."""

import os
import sys

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

import comoving


def optimizer_of(model):
    """With names, so that embeddings, head, norms and biases stay dense."""
    return comoving.AdamW(model.named_parameters(), lr=1e-2, rank=0.25)


class Module(lightning.LightningModule):
    """Trains a model whose list of blocks is ``model.blocks`` and that returns its loss."""

    def __init__(self, model, how="ddp", build=optimizer_of) -> None:
        super().__init__()
        self.model, self.how, self.build = model, how, build

    def configure_model(self):
        """Shard, before there is an optimizer; blocks first. Called again before validation alone."""
        if self.how != "fsdp" or hasattr(self.model, "unshard"):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch, index):
        """The loss."""
        return self.model(*batch)

    def configure_optimizers(self):
        """The optimizer and its schedule."""
        optimizer = self.build(self.model)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(model, data, how="ddp", build=optimizer_of, **options):
    """One pass over data: batches of four a process."""
    here = int(os.environ["LOCAL_WORLD_SIZE"])  # torchrun's --nproc_per_node
    strategy = "ddp" if how == "ddp" else ModelParallelStrategy(data_parallel_size=here, tensor_parallel_size=1)
    trainer = lightning.Trainer(
        max_epochs=1,
        strategy=strategy,
        devices=here,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        **options,
    )
    module = Module(model, how, build)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return module.model


class Block(nn.Module):
    """A residual block."""

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


if __name__ == "__main__":
    torch.manual_seed(0)
    numbers = torch.arange(64)
    train(Model(), list(zip(numbers % 32, numbers * 3 % 32, strict=True)), *sys.argv[1:])
