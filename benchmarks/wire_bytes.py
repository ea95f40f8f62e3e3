"""Bytes sent a step of the projected matrices of LLaMA-1B, as shares of plain DDP's in the dtype of the weights.

They are planned without data. The plan is then held against what two processes count that train one matrix of the
attention and one of the MLP.
"""

import argparse
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import comoving
import gloo
from comoving.distributed import compress
from comoving.memory.llama import LLAMAS

WIRES = ("same", "bfloat16", "int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDE = "bfloat16 weights, wire same"
"""Its cores are float32, twice as wide as the gradients that plain DDP sends: no comparison in one dtype."""


class Two(nn.Module):
    """A matrix of the attention and one of the MLP."""

    def __init__(self, hidden: int, wide: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = nn.Linear(hidden, hidden, bias=False, dtype=dtype)
        self.mlp = nn.Linear(hidden, wide, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        return self.mlp(torch.tanh(self.attention(x)))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of this study."""
    parser.add_argument("--model", default="llama-1b", choices=[*LLAMAS])
    parser.add_argument("--rank", type=float, default=0.125)
    parser.add_argument("--refresh-every", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="that are counted, after as many as frames stand for")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--bound", type=float, default=1 / 6, help="that no share may exceed")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Plan, count and compare."""
    planned, counted = dict[str, Any](), dict[str, Any]()
    for dtype, own_dtype in DTYPES.items():
        for wire in WIRES:
            name = f"{dtype} weights, wire {wire}"
            whole = _plan(given, given.model, dtype, wire)
            planned[name] = _shares(whole.projected * own_dtype.itemsize, whole.wire["cores"], whole.wire["frames"])
            share, within = planned[name]["share"], planned[name]["share"] <= given.bound or name == WIDE
            print(f"{name}: {share:.4f} of plain DDP's bytes{'' if within else ', TOO MUCH'}", flush=True)
            sent = gloo.run(given.processes, _sent, vars(given), dtype, wire)
            two = _plan(given, _two(given, dtype), dtype, wire)
            own = {kind: two.wire[kind] * given.steps for kind in ("cores", "frames")}
            counted[name] = {
                "sent": sent[0],
                "planned": own,
                "equal": all(s == sent[0] for s in sent) and _equal(sent[0], own, given.steps),
                **_shares(two.projected * own_dtype.itemsize * given.steps, **sent[0]),
            }
            print(f"  counted in {given.steps} steps of two matrices: {sent[0]}, planned {own}", flush=True)
    shares = [line["share"] for found in (planned, counted) for name, line in found.items() if name != WIDE]
    return {
        "planned": planned,
        "counted": counted,
        "every plan equal to what was counted": all(line["equal"] for line in counted.values()),
        "largest share in one dtype": max(shares),
        "within the bound": max(shares) <= given.bound,
    }


def _equal(sent: dict[str, int], planned: dict[str, int], steps: int) -> bool:
    """To the byte; frames, of which a plan has whole bytes a step, to one a step."""
    return sent["cores"] == planned["cores"] and 0 <= sent["frames"] - planned["frames"] < steps


def _shares(plain: int, cores: int, frames: int) -> dict[str, Any]:
    return {"plain": plain, "cores": cores, "frames": frames, "share": (cores + frames) / plain}


def _plan(given: argparse.Namespace, model: Any, dtype: str, wire: Any) -> comoving.Plan:
    return comoving.plan(
        model, "comoving-adamw", given.rank, dtype=dtype, ddp=given.processes, compress=wire, device="cpu",
        refresh_every=given.refresh_every,
    )  # fmt: skip


def _two(given: argparse.Namespace, dtype: str) -> Two:
    sizes = LLAMAS[given.model]
    return Two(sizes.hidden, sizes.intermediate, DTYPES[dtype])


def _sent(rank: int, settings: dict[str, Any], dtype: str, wire: Any) -> dict[str, int]:
    """What a process has sent in so many steps, after those in which the first frames were found."""
    given = argparse.Namespace(**settings)
    torch.manual_seed(0)
    ddp = DistributedDataParallel(_two(given, dtype))
    optimizer = comoving.build("comoving-adamw", ddp.module, 1e-3, given.rank, refresh_every=given.refresh_every)
    sent, before = compress(ddp, optimizer, wire), (0, 0)
    generator = torch.Generator().manual_seed(rank)
    for step in range(given.refresh_every + given.steps):
        if step == given.refresh_every:
            before = sent.cores.bytes, sent.frames.bytes
        x = torch.randn(4, LLAMAS[given.model].hidden, generator=generator).to(DTYPES[dtype])
        ddp(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"cores": sent.cores.bytes - before[0], "frames": sent.frames.bytes - before[1]}
