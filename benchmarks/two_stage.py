"""What preconditioning costs and gains where updates are projected: before the projection, or in the core.

python benchmarks/two_stage.py --task lm --lr 0.002,0.004,0.008 --out benchmarks/results/two_stage_lm.json
python benchmarks/two_stage.py --task fno --lr 0.01,0.02,0.04 --out benchmarks/results/two_stage_fno.json

Against tucker-adam, which preconditions neither way: "first" preconditions the whole gradient by Shampoo's factors and
projects it then (shampoo-tucker); "second" projects, and preconditions in the core (low-rank-soap, and Shampoo there),
with and without error feedback. Full-rank AdamW, Shampoo and SOAP say what either could gain at most.

Cost: state, and step times as ratios to tucker-adam's. All contenders step in turn on the gradients of one short
training by AdamW, one after the other at each step, so that a drift of the machine's speed meets all alike; the first
two steps, which make frames and first roots, are left out. The mean is what training pays.
Gain: validation at the best of the rates, by the machinery of ``comoving race``: finished runs are kept under
``--runs`` and used again.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

import comoving
from comoving.bench.gradients import saved
from comoving.files import write_json
from comoving.race import contenders, sweep
from comoving.race.command import settings_from
from comoving.race.tasks import TASKS

BASE = "tucker-adam"
CONTENDERS = {
    BASE: "neither",
    "shampoo-tucker": "first",
    "shampoo-tucker:precondition=kronecker(every=1)": "first, roots at every step",
    "low-rank-soap": "second",
    "low-rank-soap:residual=discard": "second, without feedback",
    "low-rank-soap:rule=soap": "second, both sides of matrices",
    "low-rank-soap:rule=shampoo(every=4)": "second, Shampoo in the core",
    "adamw": "full rank",
    "shampoo": "full rank",
    "soap": "full rank",
}
SETTLED = 2


def named_exactly(wanted: str, name: str, p: Tensor) -> bool:
    """A choice of :func:`saved`: one parameter."""
    return name == wanted


def gradients_of(task: Any, model: nn.Module, warmup: int, steps: int, batch: int, rate: float) -> list[dict[str, Any]]:
    """Gradients of every parameter, step by step, of the end of a short training."""
    wanted = {name: partial(named_exactly, name) for name, _ in model.named_parameters()}
    found = saved(task, model, wanted, warmup=warmup, steps=steps, batch=batch, rate=rate)
    return [{name: series[t] for name, series in found.items()} for t in range(steps)]


def cost(name: str, warmup: int, steps: int) -> dict[str, dict[str, float]]:
    """State and times of each contender along one stream of gradients."""
    info = TASKS[name]
    with torch.random.fork_rng(devices=[]):
        task = info.load()
        torch.manual_seed(0)
        stream = gradients_of(task, task.model(), warmup, steps, info.batch, info.rate)
        models: dict[str, nn.Module] = {}
        for label in CONTENDERS:
            torch.manual_seed(0)
            models[label] = task.model()
    optimizers = {label: contenders.parse(label).build(model, 1e-4, info.rank, 0.01) for label, model in models.items()}
    times: dict[str, list[float]] = {label: [] for label in CONTENDERS}
    for gradients in stream:
        for label, optimizer in optimizers.items():
            for parameter, p in models[label].named_parameters():
                p.grad = gradients[parameter].clone()
            begun = time.perf_counter()
            optimizer.step()
            times[label].append(time.perf_counter() - begun)
    settled = {label: series[SETTLED:] for label, series in times.items()}
    base_time, base_state = mean(settled[BASE]), comoving.state_bytes(optimizers[BASE])
    return {
        label: {
            "state_bytes": comoving.state_bytes(optimizers[label]),
            "state / tucker-adam": comoving.state_bytes(optimizers[label]) / base_state,
            "mean_ms": 1e3 * mean(series),
            "median_ms": 1e3 * median(series),
            "worst_ms": 1e3 * max(series),
            "mean / tucker-adam": mean(series) / base_time,
        }
        for label, series in settled.items()
    }


def gain(name: str, options: argparse.Namespace, command: str) -> dict[str, Any]:
    """A race of all contenders at the given rates."""
    settings = settings_from(
        name, ",".join(CONTENDERS), options.steps, options.lr, None, options.runs / name, seeds=options.seeds,
        jobs=options.jobs,
    )  # fmt: skip
    race = sweep.Race(settings)
    race.run()
    return sweep.results(race, command)


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("lm", "fno"), required=True)
    parser.add_argument("--lr", default="", help="rates of every contender, by commas; without, each one's own")
    parser.add_argument("--steps", type=int, help="of each training; the task's own by default")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=40, help="steps before the gradients that costs are measured on")
    parser.add_argument("--gradients", type=int, default=42, help=f"of them; the first {SETTLED} do not count")
    parser.add_argument("--cost-only", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("out") / "two_stage")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = " ".join(["python", *sys.argv])
    report: dict[str, Any] = {"command": command, "order": CONTENDERS}
    report["cost"] = cost(options.task, options.warmup, options.gradients)
    for label, figures in report["cost"].items():
        print(
            f"{label:50s} {CONTENDERS[label]:28s} state {figures['state / tucker-adam']:5.2f}x  "
            f"step {figures['mean / tucker-adam']:5.2f}x ({figures['mean_ms']:.1f} ms, worst {figures['worst_ms']:.1f})"
        )
    if not options.cost_only:
        report["gain"] = found = gain(options.task, options, command)
        for line in found["summary"]:
            result = f"{line['mean']:.4f} at {line['rate']:g}" if line["status"] == "finished" else line["problems"]
            edge = ", best rate at the edge" if line["still_at_edge"] else ""
            print(f"{line['contender']:50s} {CONTENDERS[line['contender']]:28s} {result}{edge}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, json.loads(json.dumps(report, default=str)))


if __name__ == "__main__":
    main()
