"""The race of the small language model with several processes at equal bytes.

Contenders are comoving under plain DistributedDataParallel, comoving with compress(), and AdamW with torch's PowerSGD
hook, of the rank at which it sends no more bytes a step than compress() does. Each trains at three rates around its own
best one of a single process, over all seeds; what counts is the mean at its best rate.
"""

import argparse
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import comoving
import gloo
import powersgd
from comoving.distributed import compress
from comoving.race.contenders import parse
from comoving.race.runner import rate_factor, set_rate
from comoving.race.tasks import TASKS, Task

TASK = TASKS["lm"]
PLAIN, CORES, RIVAL = "comoving", "comoving, compress", "adamw, PowerSGD"
RATES = {PLAIN: TASK.rates["comoving"], CORES: TASK.rates["comoving"], RIVAL: TASK.rates["adamw"]}
STEPS_OF_RATES = (0.5, 1.0, 2.0)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of this study."""
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=TASK.steps)
    parser.add_argument("--batch", type=int, default=TASK.batch, help="windows a process")
    parser.add_argument("--rank", type=float, default=TASK.rank)
    parser.add_argument("--refresh-every", type=int, default=10)
    parser.add_argument("--wire", default="bfloat16", choices=("same", "bfloat16", "int8"))
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--powersgd-start", type=int, default=2, help="the first step at which the hook compresses")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """All runs, and the ratios."""
    task = TASK.load()
    module = task.model()
    plan = comoving.plan(
        module, "comoving", given.rank, ddp=given.processes, compress=given.wire, device="cpu",
        refresh_every=given.refresh_every,
    )  # fmt: skip
    rank = powersgd.equal_rank(module.parameters(), plan.wire_bytes)
    sizes = {
        PLAIN: sum(p.numel() * p.element_size() for p in module.parameters()),
        CORES: plan.wire_bytes,
        RIVAL: powersgd.sent_bytes(module.parameters(), rank),
    }
    print(f"bytes a step: {sizes}; PowerSGD's rank is {rank}", flush=True)
    found: dict[str, Any] = {}
    for name, rate in RATES.items():
        by_rate: dict[str, list[float]] = {}
        counted = 0.0
        for factor in STEPS_OF_RATES:
            results = gloo.run(given.processes, _trained, name, rate * factor, rank, vars(given))[0]
            by_rate[f"{rate * factor:g}"], counted = results["losses"], results["bytes a step"]
            print(f"{name} at {rate * factor:g}: {results}", flush=True)
        best = min(by_rate, key=lambda r: mean(by_rate[r]))
        found[name] = {
            "planned bytes a step": sizes[name],
            "counted bytes a step": counted,
            "losses by rate": by_rate,
            "rate": best,
            "loss": mean(by_rate[best]),
        }
    losses = {name: line["loss"] for name, line in found.items()}
    return {
        "PowerSGD's rank": rank,
        "contenders": found,
        "compressed / plain": losses[CORES] / losses[PLAIN],
        "compressed / PowerSGD": losses[CORES] / losses[RIVAL],
    }


def _trained(rank: int, name: str, rate: float, hook_rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Final validation losses of all seeds, and what compress() has counted."""
    given, task = argparse.Namespace(**settings), TASK.load()
    losses, sent = list[float](), 0.0
    for seed in range(given.seeds):
        loss, sent = _one(rank, name, rate, hook_rank, given, task, seed)
        losses.append(loss)
    return {"losses": losses, "bytes a step": sent}


def _one(
    rank: int, name: str, rate: float, hook_rank: int, given: argparse.Namespace, task: Task, seed: int
) -> tuple[float, float]:
    torch.manual_seed(seed)
    ddp = DistributedDataParallel(task.model())
    spec = "adamw" if name == RIVAL else f"comoving:refresh_every={given.refresh_every}"
    optimizer = parse(spec).build(ddp.module, rate, given.rank, given.weight_decay)
    sent = compress(ddp, optimizer, given.wire) if name == CORES else None
    if name == RIVAL:
        start = given.powersgd_start
        state = PowerSGDState(None, matrix_approximation_rank=hook_rank, start_powerSGD_iter=start)  # pyright: ignore
        ddp.register_comm_hook(state, powerSGD_hook)
    batches = torch.Generator().manual_seed(1000 * seed + rank)
    for step in range(given.steps):
        for group in optimizer.param_groups:
            set_rate(group, rate * rate_factor(step, given.steps, given.warmup))
        optimizer.zero_grad()
        task.loss(ddp, task.batch(given.batch, batches)).backward()
        optimizer.step()
    ddp.module.eval()
    with torch.no_grad():
        value = task.validate(ddp.module)["value"] if rank == 0 else 0.0
    dist.barrier()
    return value, sent.bytes / given.steps if sent is not None else 0.0
