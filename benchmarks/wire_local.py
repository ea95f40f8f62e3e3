"""Local steps: what momentum and feedback of the outer steps do to a small regression.

Two processes make rounds of ``every`` steps of torch's AdamW on data of their own; then cores at rank 1/4 are averaged,
sent in their own dtype. The loss is on data that none has seen, after ``rounds`` rounds; one seed. Beside it plain
DiLoCo, which sends everything.
"""

import argparse
from typing import Any

import torch
from torch import nn

import gloo
from comoving.distributed import LocalSteps
from comoving.residual import Discard, Feedback

RESIDUALS = {
    "Discard()": Discard(),
    "decay 0.5": Feedback(decay=0.5),
    "decay 0.7": Feedback(decay=0.7),
    "decay 0.9": Feedback(decay=0.9),
    "Feedback()": Feedback(),
}
MOMENTA = (0.5, 0.7, 0.9)
EVERY = (10, 50)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of this study."""
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rate", type=float, default=3e-3, help="of AdamW")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The table, and plain DiLoCo."""
    table = [
        {"momentum": momentum, "residual": name, **_both(given, 0.25, {"momentum": momentum, "residual": residual})}
        for momentum in MOMENTA
        for name, residual in RESIDUALS.items()
    ]
    plain = _both(given, 1.0, {"momentum": 0.9})
    for line in (*table, plain):
        print(line, flush=True)
    return {"table": table, "plain": plain}


def _both(given: argparse.Namespace, rank: float, options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for every in EVERY:
        loss, sent = gloo.run(2, _trained, every, rank, options, given.rounds, given.rate)[0]
        found |= {f"loss, every {every}": loss, "bytes a round": sent / given.rounds}
    return found


def _trained(
    process: int, every: int, rank: float, options: dict[str, Any], rounds: int, rate: float
) -> tuple[float, int]:
    """The last loss, and the bytes that this process has sent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    local = LocalSteps(model, torch.optim.AdamW(model.parameters(), rate), every, rank=rank, wire="same", **options)

    def loss(count: int, seed: int) -> torch.Tensor:
        x = torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))
        return (model(x) - x[:, :8].sin()).square().mean()

    for step in range(rounds * every):
        loss(64, 2 * step + process).backward()
        local.step()
        local.zero_grad()
    with torch.no_grad():
        return loss(1024, -1).item(), local.sent.bytes
