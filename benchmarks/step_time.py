"""Optimizer step times as ratios, all contenders in one run, interleaved step by step.

CPU:   python benchmarks/step_time.py --out benchmarks/results/step_time_cpu.json
CUDA:  python benchmarks/step_time.py --device cuda --out benchmarks/results/step_time_cuda.json
Older: python benchmarks/step_time.py --before REVISION --out benchmarks/results/step_time_before_cpu.json

CPU, one thread: 8 matrices 1024x1024 and 4 of 2816x1024 at rank 128 against LDAdam written plainly (plain_ldadam.py);
a complex64 tensor (64, 64, 16, 9) at 25% against neuraloperator's Tensor-GaLore, whose refresh is forced every 10
steps; and every recipe on 4 matrices 512x512 and 2 of 1408x512 at rank 64, beside each other's implementation that is
installed and right, both refreshing equally often; the cheaper ones also on matrices twice as large. Codecs: the
default with its moments, and with its frame, in each of them, and what encoding costs by itself. Many small ones: every
recipe on the 168 matrices of a 24-layer model of width 64 and on the 56 of LLaMA-60M, and the default on 64 experts of
64x64, all against torch's foreach AdamW; and how many operations of torch a parameter and step is.

CUDA: the matrices of LLaMA-1B at rank 256 against torch's fused AdamW, galore-torch and apollo-torch.

--before compares every recipe with itself at another git revision, on the matrices of the table of all recipes and on
small complex tensors: the same gradients, step by step in turn, in REPEATS runs, and of each step the fastest, since
what else a shared machine does only ever adds time.

Every contender steps once, then the next one, and so on, so that a drift of the machine's speed meets all alike. The
first step, which makes the first frame, is left out of every figure. "mean" is what training pays, refreshes included.
"""

import argparse
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import comoving
from comoving.codecs import Codec
from comoving.frames import Blocks, Seeded
from comoving.parts import part
from older import older
from plain_ldadam import PlainLDAdam

Stepper = Callable[[int], None]
DECAY = 0.01
"""Of everybody: our default, while some others have none, which would save them a pass over the weights."""


class Weights(nn.Module):
    """Parameters with gradients that share a fixed low-rank part, so that frames have something to follow."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype).to(device)

        self.weights = nn.ParameterList([nn.Parameter(draw(*shape)) for shape in shapes])
        self.signals = [draw(s[0], 16) @ draw(16, p.numel() // s[0]) for s, p in zip(shapes, self.weights, strict=True)]

    def new_gradients(self, step: int) -> None:
        """Set every gradient to the shared part plus fresh noise."""
        for i, (p, signal) in enumerate(zip(self.weights, self.signals, strict=True)):
            generator = torch.Generator(p.device).manual_seed(1000 * step + i)
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
            p.grad = noise.add_(signal.view_as(p), alpha=0.2)


def ours(recipe: str, model: Weights, rank: object, **options: object) -> Stepper:
    """A step of one of our recipes."""
    optimizer = comoving.build(recipe, model, 1e-3, rank=rank, **options)
    return lambda step: optimizer.step()


def neuralop_tensor_galore(model: Weights, rank: float, every: int) -> Stepper:
    """A step of neuraloperator's Tensor-GaLore; it never refreshes by itself, so its factors are dropped when due."""
    from neuralop.training import AdamW  # noqa: PLC0415

    optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3, galore_params=list(model.weights), galore_rank=rank,
                      galore_update_proj_gap=every, warm_restart=False)  # fmt: skip

    def step(index: int) -> None:
        if index % every == 0:
            for p in model.weights:
                if "projector" in optimizer.state[p]:
                    optimizer.state[p]["projector"].proj_tensor = None
        optimizer.step()

    return step


def peer(module: str, model: Weights, rank: int, **options: object) -> Stepper:
    """A step of galore-torch's or apollo-torch's AdamW."""
    kind = {"galore_torch": "GaLoreAdamW", "apollo_torch": "APOLLOAdamW"}[module]
    group = {"params": list(model.weights), "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizer = getattr(importlib.import_module(module), kind)([group | options], lr=1e-3, weight_decay=DECAY)
    return lambda step: optimizer.step()


def race(contenders: dict[str, tuple[Weights, Stepper]], steps: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds per step of each contender, the first step aside."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(steps + 1):
        for name, (model, step) in contenders.items():
            model.new_gradients(index)
            _wait(device)
            start = time.perf_counter()
            step(index)
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return {
        name: {
            "mean": mean(t[1:]),
            "median": median(t[1:]),
            "worst": max(t[1:]),
            "worst/median": max(t[1:]) / median(t[1:]),
        }
        for name, t in times.items()
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def cpu_matrices(steps: int) -> dict[str, object]:
    """Matrices at rank 128."""
    shapes: list[tuple[int, ...]] = [(1024, 1024)] * 8 + [(2816, 1024)] * 4

    def new() -> Weights:
        return Weights(shapes, torch.float32, "cpu")

    contenders: dict[str, tuple[Weights, Stepper]] = {}
    plain = new()
    baseline = PlainLDAdam(plain.parameters(), lr=1e-3, rank=128)
    contenders["plain ldadam"] = (plain, lambda step: baseline.step())
    for recipe, options in {
        "ldadam": {},
        "comoving-adamw": {},
        "tucker-adam": {},
        "galore": {"refresh_every": 10},
    }.items():
        model = new()
        contenders[recipe] = (model, ours(recipe, model, 128, **options))
    dense = new()
    torch_adamw = torch.optim.AdamW(dense.parameters(), lr=1e-3)
    contenders["torch adamw"] = (dense, lambda step: torch_adamw.step())
    figures = race(contenders, steps, "cpu")
    base = figures["plain ldadam"]["mean"]
    return {"shapes": shapes, "rank": 128, "figures": figures, "mean / plain ldadam": _ratios(figures, base)}


def cpu_tensor(steps: int) -> dict[str, object]:
    """One spectral weight at 25%, both refreshing every 10 steps."""
    shape = (64, 64, 16, 9)

    def new() -> Weights:
        return Weights([shape], torch.complex64, "cpu")

    ours_model, theirs = new(), new()
    contenders = {
        "neuralop tensor-galore": (theirs, neuralop_tensor_galore(theirs, 0.25, 10)),
        "tensor-galore": (ours_model, ours("tensor-galore", ours_model, 0.25, refresh_every=10)),
    }
    model = new()
    contenders["comoving-adamw"] = (model, ours("comoving-adamw", model, 0.25))
    figures = race(contenders, steps, "cpu")
    base = figures["neuralop tensor-galore"]["mean"]
    return {"shapes": [shape], "rank": 0.25, "figures": figures, "mean / neuralop": _ratios(figures, base)}


CODECS = {"float32": "full", "8 bits": "int8", "8 bits, dynamic table": "int8(table='dynamic')", "4 bits": "int4"}
"""What stores the moments in the table of codecs."""


def cpu_codecs(steps: int) -> dict[str, object]:
    """The default with its moments in each codec, on matrices and on a complex tensor."""
    figures: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    kinds: list[tuple[str, list[tuple[int, ...]], torch.dtype, float | int]] = [
        ("matrices", [(512, 512)] * 4 + [(1408, 512)] * 2, torch.float32, 128),
        ("tensor", [(24, 24, 16, 9)], torch.complex64, 0.1),
    ]
    for kind, shapes, dtype, rank in kinds:
        models = {name: Weights(shapes, dtype, "cpu") for name in CODECS}
        contenders = {
            f"{kind}, {name}": (model, ours("comoving-adamw", model, rank, moments=part("moments", CODECS[name])))
            for name, model in models.items()
        }
        own = race(contenders, steps, "cpu")
        figures |= own
        ratios |= _ratios(own, own[f"{kind}, float32"]["mean"])
    return {"figures": figures, "mean / float32": ratios}


BASES = {"float32": "full", "8 bits": "int8", "4 bits": "int4"}
"""What stores the frame in the table of bases."""
ENCODED = CODECS | {"8 bits, stochastic": "int8(rounding='stochastic')"}
"""What encodes a million numbers in the table of encodings."""


def cpu_bases(steps: int) -> dict[str, object]:
    """The default with feedback in 8 bits and its frame in each codec, between two refreshes."""
    models = {name: Weights([(1024, 1024)], torch.float32, "cpu") for name in BASES}
    options = {"refresh_every": 10**6, "residual": part("residual", "feedback"), "codec": part("codec", "int8")}
    contenders = {
        name: (model, ours("comoving-adamw", model, 256, bases=part("bases", BASES[name]), **options))
        for name, model in models.items()
    }
    figures = race(contenders, steps, "cpu")
    return {"shapes": [(1024, 1024)], "rank": 256, "figures": figures,
            "mean / float32": _ratios(figures, figures["float32"]["mean"])}  # fmt: skip


def cpu_encodings(steps: int) -> dict[str, object]:
    """A million numbers encoded by each codec."""
    contenders = {
        name: (model, _encoding(part("codec", codec), model))
        for name, codec in ENCODED.items()
        for model in [Weights([(1024, 1024)], torch.float32, "cpu")]
    }
    figures = race(contenders, steps, "cpu")
    return {"shapes": [(1024, 1024)], "figures": figures, "mean / 8 bits": _ratios(figures, figures["8 bits"]["mean"])}


def _encoding(codec: Codec, model: Weights) -> Stepper:
    p = model.weights[0]
    stored = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in codec.schema(tuple(p.shape), p.dtype).items()}

    def step(index: int) -> None:
        codec.encode(p.grad, stored)

    return step


EVERY = 10
"""Steps between refreshes, and between roots or eigenbases, of whoever has them, in the table of all recipes."""
PERIODIC = {"galore", "tensor-galore", "fira", "apollo", "apollo-mini", "tensorgrad", "frugal", "flora", "coap"}
"""Recipes whose refresh period is set to that; the others keep their own."""
DRAWN = {"apollo": {"frame": Seeded()}}
"""Recipes that run a second time with their projections drawn from the seed at every step instead of stored."""


def _constructed(module: str, name: str, **options: Any) -> Callable[[Weights], Stepper]:
    """Makes a step of an optimizer that takes parameters."""

    def make(model: Weights) -> Stepper:
        constructor = getattr(importlib.import_module(module), name)
        optimizer = constructor(list(model.weights), lr=1e-3, weight_decay=DECAY, **options)
        return lambda step: optimizer.step()

    return make


def _plain_ldadam(model: Weights) -> Stepper:
    optimizer = PlainLDAdam(model.parameters(), lr=1e-3, rank=64)
    return lambda step: optimizer.step()


RIVALS: dict[str, dict[str, Callable[[Weights], Stepper]]] = {
    "adamw": {"torch": _constructed("torch.optim", "AdamW")},
    "galore": {"galore-torch": lambda m: peer("galore_torch", m, 64, update_proj_gap=EVERY)},
    "ldadam": {"written plainly": _plain_ldadam},
    "apollo": {
        "apollo-torch": lambda m: peer(
            "apollo_torch", m, 64, proj="random", scale_type="channel", scale=1.0, update_proj_gap=EVERY
        )
    },
    "apollo-mini": {
        "apollo-torch": lambda m: peer(
            "apollo_torch", m, 1, proj="random", scale_type="tensor", scale=128**0.5, update_proj_gap=EVERY
        )
    },
    "muon": {"torch": _constructed("torch.optim", "Muon", adjust_lr_fn="match_rms_adamw")},
    "soap": {"pytorch_optimizer": _constructed("pytorch_optimizer", "SOAP", precondition_frequency=EVERY)},
    "shampoo": {
        "pytorch_optimizer": _constructed("pytorch_optimizer", "Shampoo", preconditioning_compute_steps=EVERY),
        "pytorch_optimizer scalable": _constructed(
            "pytorch_optimizer", "ScalableShampoo", preconditioning_compute_steps=EVERY, start_preconditioning_step=1
        ),
    },
    "lion": {"pytorch_optimizer": _constructed("pytorch_optimizer", "Lion")},
    "adafactor": {"torch": _constructed("torch.optim", "Adafactor")},
}
"""Recipe -> others' implementations of the same method."""


LARGE = ("adamw", "galore", "apollo", "apollo-mini", "lion", "adafactor")
"""Recipes with a rival whose step on larger matrices is a matter of milliseconds."""


def cpu_recipes(steps: int) -> dict[str, object]:
    """Every recipe, and whoever else does the same."""
    return _recipes(steps, [(512, 512)] * 4 + [(1408, 512)] * 2, tuple(comoving.recipes()))


def cpu_large(steps: int) -> dict[str, object]:
    """Those of LARGE on larger matrices, where the host's time per parameter counts for less."""
    return _recipes(steps, [(1024, 1024)] * 4 + [(2816, 1024)] * 2, LARGE)


def _recipes(steps: int, shapes: list[tuple[int, ...]], names: tuple[str, ...]) -> dict[str, object]:
    contenders: dict[str, tuple[Weights, Stepper]] = {}
    for name in names:
        recipe = comoving.recipes()[name]
        model = Weights(shapes, torch.float32, "cpu")
        options = {"refresh_every": EVERY} if name in PERIODIC else {}
        rank = getattr(recipe, "rank", None) or 64
        contenders[name] = (model, ours(name, model, rank, **options))
        if name in DRAWN:
            model = Weights(shapes, torch.float32, "cpu")
            contenders[f"{name}, drawn"] = (model, ours(name, model, rank, **options, **DRAWN[name]))
        for rival, make in RIVALS.get(name, {}).items():
            model = Weights(shapes, torch.float32, "cpu")
            contenders[f"{name} ({rival})"] = (model, make(model))
    figures = race(contenders, steps, "cpu")
    fastest = {
        name: min(figures[f"{name} ({rival})"]["mean"] for rival in rivals)
        for name, rivals in RIVALS.items()
        if name in figures
    }
    return {
        "shapes": shapes,
        "rank": 64,
        "every": EVERY,
        "figures": figures,
        "mean / torch adamw": _ratios(figures, figures["adamw (torch)"]["mean"]),
        "ours / fastest rival": {
            label: figures[label]["mean"] / seconds
            for name, seconds in fastest.items()
            for label in (name, f"{name}, drawn")
            if label in figures
        },
    }


REPEATS = 3
"""Runs of a comparison with an older revision."""


def before(steps: int, revision: str) -> dict[str, object]:
    """Every recipe now and at an older revision: the sum over steps of the fastest of each, and its ratio."""
    packages = {"now": comoving, revision: older(revision)}
    kinds: list[tuple[str, list[tuple[int, ...]], torch.dtype]] = [
        ("matrices", [(512, 512)] * 2 + [(1408, 512)], torch.float32),
        ("tensors", [(24, 24, 16, 9)], torch.complex64),
    ]
    figures: dict[str, dict[str, float]] = {}
    for kind, shapes, dtype in kinds:
        for name in comoving.recipes():
            fastest: dict[str, list[float]] = {}
            for _ in range(REPEATS):
                times = _in_turn(packages, name, shapes, dtype, steps)
                fastest = {which: [*map(min, t, fastest.get(which, t))] for which, t in times.items()}
            now, then = (sum(t[1:]) / steps for t in fastest.values())
            figures[f"{kind}, {name}"] = {"mean": now, "worst/median": max(fastest["now"][1:]) / now, "before": then}
            print(f"{kind}, {name}: {now / then:.3f}", file=sys.stderr)
    return {
        "before": revision,
        "figures": figures,
        "mean / before": {n: f["mean"] / f["before"] for n, f in figures.items()},
    }


def _in_turn(
    packages: dict[str, Any], name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, steps: int
) -> dict[str, list[float]]:
    """Seconds of each step of each package's recipe, one after the other on the same gradients."""
    options = {"refresh_every": EVERY} if name in PERIODIC else {}
    models = {which: Weights(shapes, dtype, "cpu") for which in packages}
    rank = None if dtype.is_complex else comoving.recipes()[name].rank or 64
    optimizers = {which: p.build(name, models[which], 1e-3, rank=rank, **options) for which, p in packages.items()}
    times: dict[str, list[float]] = {which: [] for which in packages}
    for index in range(steps + 1):
        for which in sorted(packages, reverse=index % 2 == 1):  # neither is always the first
            models[which].new_gradients(index)
            start = time.perf_counter()
            optimizers[which].step()
            times[which].append(time.perf_counter() - start)
    return times


def layers(count: int, width: int, inner: int) -> list[tuple[int, ...]]:
    """The matrices of so many layers: four of the attention, three of the gated MLP."""
    return [*[(width, width)] * 4 * count, *[(inner, width)] * 2 * count, *[(width, inner)] * count]


EIGHT_BITS = "muon, 8 bits"


def cpu_many(steps: int) -> dict[str, object]:
    """Every recipe on 168 small matrices, and the operations of torch that it calls."""
    return _against_foreach(layers(24, 64, 172), (*comoving.recipes(), EIGHT_BITS), steps)


def cpu_llama(steps: int) -> dict[str, object]:
    """The matrices of LLaMA-60M, none of which is small enough to be stacked."""
    return _against_foreach(
        layers(8, 512, 1376), ("comoving-adamw", "tucker-adam", "galore", "muon", EIGHT_BITS), steps
    )


def cpu_experts(steps: int) -> dict[str, object]:
    """64 experts in one tensor, with a frame each, all of them live."""
    shapes: list[tuple[int, ...]] = [(64, 64, 64)]
    return _against_foreach(shapes, ("comoving-adamw", "tucker-adam"), steps, frame=Blocks())


def _against_foreach(
    shapes: list[tuple[int, ...]], names: tuple[str, ...], steps: int, **options: object
) -> dict[str, object]:
    """Recipes at a rank of a quarter beside torch's AdamW and Muon, and the operations of a parameter and step."""
    contenders: dict[str, tuple[Weights, Stepper]] = {}
    for name in names:
        model, recipe = Weights(shapes, torch.float32, "cpu"), name.removesuffix(", 8 bits")
        own = {"moments": part("moments", "int8")} if name == EIGHT_BITS else {}
        contenders[name] = (model, ours(recipe, model, comoving.recipes()[recipe].rank or 0.25, **options, **own))
    for name, kind, own in (
        ("adamw", "AdamW", {"foreach": True}),
        ("muon", "Muon", {"adjust_lr_fn": "match_rms_adamw"}),
    ):
        if name in names:
            model = Weights(shapes, torch.float32, "cpu")
            contenders[f"torch {name}"] = (model, _constructed("torch.optim", kind, **own)(model))
    model = Weights(shapes, torch.float32, "cpu")
    contenders["torch foreach adamw"] = (model, _constructed("torch.optim", "AdamW", foreach=True)(model))
    figures = race(contenders, steps, "cpu")
    operations: dict[str, float] = {}
    for name, (model, step) in contenders.items():
        counts: list[int] = []
        for index in range(steps, steps + 4):
            model.new_gradients(index)
            with Counting() as counter:
                step(index)
            counts.append(counter.count)
        operations[name] = mean(counts) / len(shapes)
    return {
        "shapes": sorted(set(shapes)),
        "matrices": len(shapes),
        "figures": figures,
        "mean / torch foreach adamw": _ratios(figures, figures["torch foreach adamw"]["mean"]),
        "operations a parameter and step": operations,
    }


class Counting(TorchDispatchMode):
    """Counts the operations of torch that are called inside, views too."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def cuda_llama(steps: int, device: str) -> dict[str, object]:
    """The matrices of LLaMA-1B (hidden 2048, MLP 5461, 24 layers) at rank 256."""
    shapes: list[tuple[int, ...]] = ([(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]) * 24
    figures: dict[str, dict[str, float]] = {}

    def fused(model: Weights) -> Stepper:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        return lambda step: optimizer.step()

    makers: dict[str, Callable[[Weights], Stepper]] = {
        "torch fused adamw": fused,
        "comoving-adamw": lambda m: ours("comoving-adamw", m, 256, on_nonfinite="skip"),
        "ldadam": lambda m: ours("ldadam", m, 256),
        "galore": lambda m: ours("galore", m, 256),
        "galore-torch": lambda m: peer("galore_torch", m, 256),
        "apollo-torch": lambda m: peer(
            "apollo_torch", m, 256, proj="random", scale_type="channel", scale=1.0, update_proj_gap=200
        ),
    }
    for name, make in makers.items():  # one model at a time: memory
        try:
            model = Weights(shapes, torch.float32, device)
            figures |= race({name: (model, make(model))}, steps, device)
        except ImportError as error:
            figures[name] = {"missing": 1.0}
            print(f"{name}: {error}", file=sys.stderr)
        torch.cuda.empty_cache()
    base = figures["torch fused adamw"]["mean"]
    return {"shapes": shapes[:7], "layers": 24, "rank": 256, "figures": figures,
            "mean / fused adamw": _ratios(figures, base)}  # fmt: skip


def _ratios(figures: dict[str, dict[str, float]], base: float) -> dict[str, float]:
    return {name: f["mean"] / base for name, f in figures.items() if "mean" in f}


def machine(device: str) -> dict[str, object]:
    """What this ran on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, "python": platform.python_version(),
            "torch": torch.__version__, "comoving": comoving.__version__}  # fmt: skip


TABLES = "matrices,tensor,codecs,bases,encodings,recipes,large,many,llama,experts"


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tables", default=TABLES, help="of the CPU")
    parser.add_argument("--before", metavar="REVISION", help="compare with this one instead")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.before:
        results = {"before": before(options.steps, options.before)}
    elif options.device == "cpu":
        tables = {
            "matrices": cpu_matrices,
            "tensor": cpu_tensor,
            "codecs": cpu_codecs,
            "bases": cpu_bases,
            "encodings": cpu_encodings,
            "recipes": cpu_recipes,
            "large": cpu_large,
            "many": cpu_many,
            "llama": cpu_llama,
            "experts": cpu_experts,
        }
        results = {name: table(options.steps) for name, table in tables.items() if name in options.tables.split(",")}
    else:
        results = {"llama-1b": cuda_llama(options.steps, options.device)}
    report = {"command": " ".join(["python", *sys.argv]), "machine": machine(options.device), **results}
    for name, result in results.items():
        print(name)
        for contender, f in result["figures"].items():
            if "mean" in f:
                ratio = next(v for k, v in result.items() if k.startswith("mean / "))[contender]
                times = f"mean {1e3 * f['mean']:8.2f} ms  ratio {ratio:5.2f}  worst/median {f['worst/median']:.2f}"
                print(f"  {contender:36s} {times}")
        for contender, count in result.get("operations a parameter and step", {}).items():
            print(f"  {contender:36s} {count:.1f} operations a parameter and step")
        for recipe, ratio in result.get("ours / fastest rival", {}).items():
            print(f"  {recipe:36s} {ratio:.2f}x of the fastest rival")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
