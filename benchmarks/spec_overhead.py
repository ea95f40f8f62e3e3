"""What watching costs: SpectralMonitor at k = 8 with all kinds, as a share of training time at a reading every 100.

CPU:   python benchmarks/spec_overhead.py --out benchmarks/results/spec_overhead_cpu.json
CUDA:  python benchmarks/spec_overhead.py --device cuda --out benchmarks/results/spec_overhead_cuda.json

Models: those of the race's lm and vit at the race's batches (and vit at 16), and a ViT-S for 224 x 224 pictures (12
layers of width 384, batch 16); AdamW. Training is stepped with real gradients. Per model:

    step_ms      median time of an update without the monitor's hooks (forward, backward, optimizer)
    first_ms     time in the hooks at the first reading of a run, from random starts
    reading_ms   the same, median over the later readings
    share        reading_ms / (100 step_ms), what a long run pays
    share_1000   (first_ms + 9 reading_ms) / (1000 step_ms), what a run of 1000 updates pays

and the error of what is read, against complete decompositions of the same matrices at the last reading: the largest of
|s - s_exact| / s_1,exact, and the smallest mean of principal cosines with the exact U and V, per kind.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from comoving.directions import SpectralMonitor
from comoving.directions.figures import Key
from comoving.directions.monitor import KINDS
from comoving.directions.spectra import Spectrum, exact, principal_cosines
from comoving.race.tasks import TASKS, lm, vit

EVERY, K = 100, 8
Make = Callable[[], tuple[nn.Module, Callable[[int], Tensor]]]


class Timed(SpectralMonitor):
    """A monitor that says how long its hooks took since they were asked last."""

    spent = 0.0
    wait = staticmethod(time.perf_counter)

    def _before_step(self, *args: Any) -> None:
        start = self.wait()
        super()._before_step(*args)
        self.spent += self.wait() - start

    def _after_step(self, *args: Any) -> None:
        start = self.wait()
        super()._after_step(*args)
        self.spent += self.wait() - start


def race(task: Any, batch: int) -> Make:
    """A task of the race: its model, and the loss of a batch."""

    def make() -> tuple[nn.Module, Callable[[int], Tensor]]:
        model = task.model()
        return model, lambda step: task.loss(model, task.batch(batch, torch.Generator().manual_seed(step)))

    return make


def vit_s(device: str) -> Make:
    """ViT-S/16 on random pictures with labels that depend on them."""

    def make() -> tuple[nn.Module, Callable[[int], Tensor]]:
        from transformers import ViTConfig, ViTForImageClassification  # noqa: PLC0415

        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=100
            )
        )

        def loss(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 3, 224, 224, generator=generator).to(device)
            y = (x.mean((1, 2, 3)) * 1e4).long().remainder(100)
            return nn.functional.cross_entropy(model(pixel_values=x).logits, y)

        return model, loss

    return make


class Errors:
    """A monitor whose readings are also made by complete decompositions when asked."""

    def __init__(self, monitor: SpectralMonitor) -> None:
        self.monitor, self.matrices = monitor, {}

    def gather(self, model: nn.Module, optimizer: torch.optim.Optimizer, old: dict[str, Tensor]) -> None:
        """The matrices of the reading that has just been made."""
        for name, module in self.monitor.modules.items():
            weight = module.weight
            found = (weight, weight.grad, optimizer.state[weight]["exp_avg"], weight - old[name])
            self.matrices |= {Key(name, kind): x.detach().clone() for kind, x in zip(KINDS, found, strict=True)}

    def table(self) -> dict[str, dict[str, float]]:
        """Kind -> the worst errors over all layers."""
        worst: dict[str, dict[str, float]] = {}
        for key, x in self.matrices.items():
            now, want = self.monitor.last[key], Spectrum(*exact(x, K))
            values = float((now.s - want.s).abs().max() / want.s[0])
            cosine = min(float(principal_cosines(a, b).mean()) for a, b in ((now.u, want.u), (now.v, want.v)))
            row = worst.setdefault(key.kind, {"singular_values": 0.0, "mean_cosine": 1.0})
            row["singular_values"] = max(row["singular_values"], values)
            row["mean_cosine"] = min(row["mean_cosine"], cosine)
        return worst


def measure(make: Make, device: str, readings: int, between: int) -> dict[str, Any]:
    """Time updates with and without a reading; a reading every ``between`` updates, to be done sooner."""
    torch.manual_seed(0)
    model, loss_of = make()
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    monitor = Timed(model, every=between, k=K).attach(optimizer)
    errors = Errors(monitor)

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def update(step: int) -> None:
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()

    monitor.wait = wait
    monitor.detach()
    for step in range(3):  # warm up
        update(step)
    monitor.attach(optimizer)
    with_reading, without = [], []
    for step in range((readings - 1) * between + 1):
        last = step == (readings - 1) * between
        old = {name: m.weight.detach().clone() for name, m in monitor.modules.items()} if last else {}
        start, monitor.spent = wait(), 0.0
        update(step)
        without.append(1e3 * (wait() - start - monitor.spent))
        if step % between == 0:
            with_reading.append(1e3 * monitor.spent)
        if last:
            errors.gather(model, optimizer, old)
    step_ms = median(without)
    reading, first = median(with_reading[1:]), with_reading[0]
    return {
        "matrices": len(monitor.modules),
        "entries": sum(m.weight.numel() for m in monitor.modules.values()),
        "step_ms": step_ms,
        "first_ms": first,
        "reading_ms": reading,
        "share": reading / (EVERY * step_ms),
        "share_1000": (first + 9 * reading) / (1000 * step_ms),
        "updates_between": between,
        "readings": readings,
        "worst_error": errors.table(),
    }


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="lm,vit,vit-16,vit-s", help="of lm, vit, vit-16, vit-s")
    parser.add_argument("--readings", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {
        "lm": (lambda: race(lm.load(), TASKS["lm"].batch), 25),
        "vit": (lambda: race(vit.digits(), TASKS["vit"].batch), 25),
        "vit-16": (lambda: race(vit.digits(), 16), 25),
        "vit-s": (lambda: vit_s(args.device), 100 if args.device == "cuda" else 3),
    }
    results: dict[str, Any] = {}
    for name in args.only.split(","):
        make, between = models[name]
        if args.device == "cuda" and name != "vit-s":
            raise SystemExit("the race's batches are made on the CPU: pass --only vit-s")
        results[name] = measure(make(), args.device, args.readings, between)
        print(name, json.dumps(results[name], indent=1))
        if args.out:
            where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU, one thread"
            about = {"machine": where, "torch": torch.__version__, "k": K, "every": EVERY}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(about | {"models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
