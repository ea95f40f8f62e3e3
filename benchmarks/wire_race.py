"""The race of the small language model with several processes at equal bytes.

By default contenders are comoving under plain DistributedDataParallel, comoving with compress(), and comoving and AdamW
with torch's PowerSGD hook, of the rank at which it sends no more bytes a step than compress() does; "muon" and "muon,
frames" are Muon as it is, and with frames for the wire alone. Each trains over all seeds at three rates around its own
best one of a single process, and at others, twice or half as large, as long as the best one is the last on its side;
what counts is the mean at the best rate. What is found is written after every rate, and the same command goes on from
there.
"""

import argparse
import json
from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import comoving
import gloo
import powersgd
from comoving.distributed import WireFrame, compress
from comoving.files import write_json
from comoving.memory.plan import Plan
from comoving.race.contenders import parse
from comoving.race.runner import rate_factor, set_rate
from comoving.race.tasks import TASKS, Task

TASK = TASKS["lm"]
PLAIN, CORES, MUON, FRAMES = "comoving", "comoving, compress", "muon", "muon, frames"
HOOKED, RIVAL = "comoving, PowerSGD", "adamw, PowerSGD"
RATES = {
    PLAIN: TASK.rates["comoving-adamw"],
    CORES: TASK.rates["comoving-adamw"],
    HOOKED: TASK.rates["comoving-adamw"],
    RIVAL: TASK.rates["adamw"],
    MUON: TASK.rates["muon"],
    FRAMES: TASK.rates["muon"],
}
STEPS_OF_RATES = (0.5, 1.0, 2.0)
_BUCKET = 2**10
"""Megabytes: torch's hook starts sums in callbacks, whose order gloo does not keep where there are several buckets."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of this study."""
    parser.add_argument("--contenders", nargs="+", default=[PLAIN, CORES, HOOKED, RIVAL], choices=[*RATES])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=TASK.steps)
    parser.add_argument("--batch", type=int, default=TASK.batch, help="windows a process")
    parser.add_argument("--rank", type=float, default=TASK.rank)
    parser.add_argument("--refresh-every", type=int, default=10)
    parser.add_argument("--wire-rank", type=float, default=0.25, help="of frames for the wire alone")
    parser.add_argument("--wire", default="bfloat16", choices=("same", "bfloat16", "int8"))
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--powersgd-start", type=int, default=2, help="the first step at which the hook compresses")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """All runs, and the ratios."""
    module = TASK.load().model()
    sizes, rank = _planned(module, given)
    print(f"bytes a step: {sizes}; PowerSGD's rank is {rank}", flush=True)
    partial = given.out.with_suffix(".partial.json")
    settings = {name: value for name, value in vars(given).items() if name not in {"out", "contenders"}}
    known: dict[str, Any] = json.loads(partial.read_text()) if partial.exists() else {}
    if known.get("settings") != settings:
        known = {"settings": settings, "runs": {}}
    found: dict[str, Any] = {}
    for name in given.contenders:
        runs: dict[str, Any] = known["runs"].setdefault(name, {})
        due = [f"{RATES[name] * factor:g}" for factor in STEPS_OF_RATES]
        while due:
            for rate in due:
                if rate not in runs:
                    runs[rate] = gloo.run(given.processes, _trained, name, float(rate), rank, vars(given))[0]
                    write_json(partial, known)
                print(f"{name} at {rate}: {runs[rate]}", flush=True)
            best = _best(runs)
            outer = {min(runs, key=float): 0.5, max(runs, key=float): 2.0}
            due = [f"{float(best) * outer[best]:g}"] if best in outer else []
        best = _best(runs)
        found[name] = {
            "planned bytes a step": sizes[name],
            "counted bytes a step": runs[best]["bytes a step"],
            "losses by rate": {rate: own["losses"] for rate, own in runs.items()},
            "rate": float(best),
            "loss": mean(runs[best]["losses"]),
        }
    partial.unlink()
    return {"PowerSGD's rank": rank, "contenders": found, "ratios": _ratios(found)}


def _best(runs: Mapping[str, Any]) -> str:
    """The rate of the least mean loss."""
    return min(runs, key=lambda rate: mean(runs[rate]["losses"]))


def _planned(module: torch.nn.Module, given: argparse.Namespace) -> tuple[dict[str, int], int]:
    """Bytes a step of each contender, and PowerSGD's rank."""

    def planned(recipe: str, whole: WireFrame | None, **options: Any) -> Plan:
        return comoving.plan(
            module, recipe, ddp=given.processes, compress=given.wire, whole=whole, device="cpu", **options
        )

    cores = planned("comoving-adamw", None, rank=given.rank, refresh_every=given.refresh_every).wire_bytes
    rank = powersgd.equal_rank(module.parameters(), cores)
    whole = sum(p.numel() * p.element_size() for p in module.parameters())
    rival = powersgd.sent_bytes(module.parameters(), rank)
    framed = planned("muon", WireFrame(given.wire_rank, given.refresh_every)).wire_bytes
    return {PLAIN: whole, CORES: cores, HOOKED: rival, RIVAL: rival, MUON: whole, FRAMES: framed}, rank


def _ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """Of final losses."""
    pairs = ((CORES, PLAIN), (CORES, HOOKED), (CORES, RIVAL), (FRAMES, MUON))
    return {f"{a} / {b}": found[a]["loss"] / found[b]["loss"] for a, b in pairs if a in found and b in found}


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
    ddp = DistributedDataParallel(task.model(), bucket_cap_mb=_BUCKET)
    of_ours = f"comoving-adamw:refresh_every={given.refresh_every}"
    spec = {RIVAL: "adamw", MUON: "muon", FRAMES: "muon"}.get(name, of_ours)
    optimizer = parse(spec).build(ddp.module, rate, given.rank, given.weight_decay)
    whole = WireFrame(given.wire_rank, given.refresh_every) if name == FRAMES else None
    sent = compress(ddp, optimizer, given.wire, whole=whole) if name in {CORES, FRAMES} else None
    if name in {HOOKED, RIVAL}:
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
