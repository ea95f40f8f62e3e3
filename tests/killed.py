"""A training with every memory feature at once, for test_killed.py: saves now and then, can be killed, goes on.

python tests/killed.py FOLDER writes FOLDER/checkpoint.pt in the middle of windows too, and FOLDER/final.pt at the end.
"""

import sys
import time
from pathlib import Path

import torch
from torch import nn

import comoving

STEPS, ACCUMULATE = 10, 4


class Net(nn.Module):
    """A small language model in bfloat16."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 24)
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 24)
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, 32, bias=False)

    def forward(self, x):
        h = self.embed(x)
        return self.lm_head(self.norm(h + self.down(torch.relu(self.up(h)))))


def main(folder, pause):
    """Train from the checkpoint if there is one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16)
    optimizer = comoving.AdamW(
        model.named_parameters(), 2e-2, rank=6, rounding="stochastic", moments=comoving.codecs.Int8(), refresh_every=3
    )
    optimizer.step_in_backward(accumulate=ACCUMULATE, clip=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    done = 0
    if (folder / "checkpoint.pt").exists():
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        done = saved["done"]
    for k in range(done, STEPS * ACCUMULATE):
        generator = torch.Generator().manual_seed(k)
        x = torch.randint(0, 32, (2, 8), generator=generator)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1).float(), x.roll(-1, 1).flatten())
        (loss / ACCUMULATE).backward()
        if (k + 1) % ACCUMULATE == 0:
            optimizer.step()
            scheduler.step()
        if (k + 1) % 3 == 0:
            state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            comoving.save(folder / "checkpoint.pt", **state, done=k + 1)
        time.sleep(pause)
    comoving.save(folder / "final.pt", model=model, optimizer=optimizer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
