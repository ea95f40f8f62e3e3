"""All figures of a GPU in one run of less than 8 minutes, written as JSON section by section.

GPU:  python benchmarks/gpu.py --out benchmarks/results/gpu.json
CPU:  python benchmarks/gpu.py --device cpu --small --out out/gpu.json

correctness  every recipe on a matrix, a complex tensor, experts and a bias, with the same weights and gradients on
             the device and on the CPU, in float64 and in float32: how far the updates of each step are apart. Nothing
             is asserted: where moments stay in the coordinates of an old frame (transport Keep), the signs of singular
             vectors matter, and those are each library's own choice.
host reads   every recipe with on_nonfinite="skip" under torch.cuda.set_sync_debug_mode("error"): whether the first
             step, the steps between refreshes and those with one pass, and if not, the line that read first.
memory       every recipe: state, and what a step allocates beside it, against comoving.plan.
times        LLaMA-1B's matrices: fused AdamW, torch's Muon, 8-bit AdamW of bitsandbytes and torchao, and ours, each
             with moments of its own on one set of weights and gradients, interleaved step by step.
graphs       every recipe after capture() beside a twin without: how many recordings were made and replayed, what share
             of rows they served, how far the updates are apart, and whether replays pass under the same error mode.
graph times  LLaMA-1B's matrices between refreshes, one contender after the other: ours before and after capture(),
             fused AdamW and torch's Muon with and without a graph of the whole step, interleaved.

Each section has a budget of seconds (--seconds for all alike) and names what it did not finish within it. One that
fails leaves its traceback's last lines, and the others go on. The file is written anew after every section. On a CPU
small shapes show that the script works; what needs CUDA is skipped, by name.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

import comoving
from comoving.drivers.graphs import Graphs
from comoving.memory import Usage, measure
from comoving.transport import Keep
from step_time import machine

Figures = dict[str, Any]
Step = Callable[[], object]
SECONDS = {"correctness": 95, "host reads": 65, "memory": 65, "times": 105, "graphs": 60, "graph times": 50}
"""The budget of each section: 440 seconds in all, which leaves the start and the end of the run 40 of 8 minutes."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Relative differences of an update from which on the figures say so; rounding is amplified over the steps."""
OFTEN, SELDOM = 4, 8
"""Steps between refreshes of recipes that do not refresh at each step: so that figures see many, or steps without."""
GRACE = 1.0
"""Seconds after which a section is interrupted that has not stopped by itself at the end of its budget."""
NEVER = 10**9
WATCHED = 12
"""Steps that are looked at for host reads: one beyond those at which Shampoo computes roots."""
TWINNED = 2 * SELDOM + 4
"""Steps of an optimizer that replays beside its twin: every frame is refreshed twice."""
FEWEST = 3
"""Steps that are timed with and without a graph, however long they take."""
LR, DECAY = 1e-3, 0.01
MISSING = {"bitsandbytes": "8-bit AdamW of bitsandbytes", "torchao": "8-bit AdamW of torchao"}
"""Packages that are optional, and who needs them."""
LLAMA: list[tuple[int, ...]] = [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]
"""The matrices of a layer of LLaMA-1B."""


class OutOfTime(BaseException):
    """The budget of a section is spent; not an Exception, so that nobody on the way takes it for an error."""


class Skipped(Exception):
    """A section, or a part of one, that makes no sense here."""


class Run:
    """One run: its settings, its report, and the clock of the section at work.

    Args:
        device: "cuda", "cuda:1" ... or "cpu".
        out: the JSON file.
        small: small shapes instead of LLaMA-1B's, and fewer steps.
        seconds: of every section; None for :data:`SECONDS`.
        recipes: those that are looked at; None for all.
        layers: of LLaMA-1B.
        rounds: steps that are timed, at most.
    """

    guard: Callable[[], AbstractContextManager[Any]] | None = None
    """A context in which a host read raises; None where there is none."""
    capture: Callable[[Step], Step] | None = None
    """Captures a whole step and returns what replays it; None where there are no graphs."""
    record: Callable[[comoving.LowRankOptimizer], object] | None = None
    """Lets one of our optimizers replay its steps; None where there are no graphs."""
    usage: Callable[..., Usage] | None = None
    """Measures the memory of a call; None where that means nothing."""

    def __init__(
        self,
        device: str,
        out: Path,
        small: bool = False,
        seconds: float | None = None,
        recipes: Iterable[str] | None = None,
        layers: int = 24,
        rounds: int = 24,
    ) -> None:
        self.device, self.out, self.small, self.seconds = torch.device(device), out, small, seconds
        self.recipes = sorted(comoving.recipes(), key="comoving-adamw".__ne__) if recipes is None else list(recipes)
        self.shapes: list[tuple[int, ...]] = [(64, 48), (96, 64)] if small else LLAMA * layers
        self.rank, self.rounds = (16, 4) if small else (256, rounds)
        self.steps = 4 if small else 8
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.set_device(self.device.index or 0)
            self.guard, self.capture, self.usage = errors_on_reads, captured, measure
            self.record = comoving.LowRankOptimizer.capture
        self.sections: dict[str, Figures] = {
            name: {"status": "not started", "budget": self._budget(name), "figures": {}} for name in SECTIONS
        }
        missing = {package: f"not installed: no {who}" for package, who in MISSING.items() if not _installed(package)}
        self.report: Figures = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(device),
            "settings": {
                "small": small,
                "layers": None if small else layers,
                "rank": self.rank,
                "recipes": self.recipes,
                "float32 products": torch.get_float32_matmul_precision(),
            },
            "missing": missing,
            "finished": False,
            "sections": self.sections,
        }
        self.waiting: list[str] = []
        """What the section at work has still to finish."""
        self._end = math.inf

    def _budget(self, section: str) -> float:
        return float(SECONDS[section] if self.seconds is None else self.seconds)

    def each(self, names: Iterable[str]) -> Iterator[str]:
        """One name after the other; a section that ends before is said not to have finished the rest.

        Raises:
            OutOfTime: between two of them, when the section's budget is spent.
        """
        self.waiting = list(names)
        while self.waiting:
            self.check()
            yield self.waiting[0]
            self.waiting.pop(0)

    def left(self) -> float:
        """Seconds of the section's budget."""
        return self._end - time.monotonic()

    def check(self) -> None:
        """Stop where the section's budget is spent.

        Raises:
            OutOfTime: it is.
        """
        if self.left() <= 0:
            raise OutOfTime

    @contextmanager
    def until(self, seconds: float) -> Generator[None]:
        """At most so many seconds: then what runs inside is interrupted, as soon as Python has its turn.

        Raises:
            OutOfTime: it was.
        """
        before, self._end = self._end, min(self._end, time.monotonic() + seconds)
        alarmed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGALRM, _ring) if alarmed else None
        try:
            if alarmed and self.left() > 0:  # without any time, the first check will say so, and of whom
                # Again and again: someone may swallow the first.
                signal.setitimer(signal.ITIMER_REAL, self.left() + GRACE, 1.0)
            yield
        finally:
            if alarmed:
                _silence()
                signal.signal(signal.SIGALRM, handler)
            self._end = before
            if alarmed and before < math.inf:
                signal.setitimer(signal.ITIMER_REAL, max(self.left(), 0) + GRACE, 1.0)

    @contextmanager
    def attempt(self, name: str, figures: Figures) -> Generator[None]:
        """What fails inside is recorded under its name, and goes no further."""
        try:
            yield
        except Skipped as why:
            figures[name] = {"skipped": str(why)}
        except ImportError as error:
            figures[name] = {"missing": str(error)}
        except Exception as error:
            figures[name] = {"failed": last_lines(error)}
        self.tidy()

    def tidy(self) -> None:
        """Give back what nobody uses any more; small shapes are not worth the time."""
        if not self.small:
            gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def section(self, name: str) -> None:
        """Run a section and write the report."""
        entry = self.sections[name]
        entry["status"], self.waiting = "running", []
        self.write()
        start = time.monotonic()
        try:
            with self.until(entry["budget"]):
                SECTIONS[name](self, entry["figures"])
            entry["status"] = "done"
        except Skipped as why:
            entry |= {"status": "skipped", "reason": str(why)}
        except OutOfTime:
            entry["status"] = "out of time"
        except Exception as error:
            entry |= {"status": "failed", "traceback": last_lines(error)}
        finally:
            _silence()  # an alarm during the last lines of a context would have left it on
            self._end = math.inf
        entry["seconds"] = round(time.monotonic() - start, 2)
        if self.waiting and entry["status"] != "skipped":
            entry["not finished"] = list(self.waiting)
        self.write()
        self.tidy()

    def write(self) -> None:
        """Write the report, so that whoever is killed while writing leaves the last one."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        draft = self.out.with_name(self.out.name + ".draft")
        draft.write_text(json.dumps(_plain(self.report), indent=1, allow_nan=False) + "\n")
        draft.replace(self.out)

    def settle(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, step: Step) -> float:
        """Seconds of a step that begins on an idle device: by CUDA's events, or by the clock of a CPU."""
        self.settle()
        if not self.cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _ring(*_: object) -> None:
    raise OutOfTime


def _silence() -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _plain(x: Any) -> Any:
    """What JSON can hold: a number that is not finite becomes a word."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x if isinstance(x, str | int | float | bool | None) else str(x)


def last_lines(error: BaseException, count: int = 8) -> list[str]:
    """The end of a traceback."""
    return "".join(traceback.format_exception(error)).rstrip().splitlines()[-count:]


def origin(error: BaseException) -> Figures:
    """The innermost line of this package that an error passed, and its message; of the first error in a chain."""
    while error.__context__ is not None:
        error = error.__context__
    package = Path(comoving.__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(package)]
    where = [f"{Path(f.filename).relative_to(package)}:{f.lineno} in {f.name}: {f.line}" for f in own[-1:]]
    message = str(error).strip().splitlines()
    return {"line": where[0] if where else None, "error": f"{type(error).__name__}: {message[0] if message else ''}"}


@contextmanager
def errors_on_reads() -> Generator[None]:
    """A context in which CUDA raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Step) -> Step:
    """A CUDA graph of a step, which is not taken by capturing it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# ------------------------------------------------------------------------------------------------------------- subjects


class Mixed(nn.Module):
    """A matrix, a complex tensor, experts and a bias; the same numbers on every device and in every precision."""

    shapes = {"matrix": (48, 80), "tensor": (12, 10, 6), "experts": (4, 24, 40), "bias": (48,)}

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self._dtype = {name: dtype.to_complex() if name == "tensor" else dtype for name in self.shapes}
        self._generator = torch.Generator().manual_seed(0)
        shared = {name: self._draw(name) for name in self.shapes}
        for name in self.shapes:
            # Small weights: the update, read off as a difference, is hardly rounded.
            setattr(self, name, nn.Parameter((0.01 * self._draw(name)).to(device, self._dtype[name])))
        self._shared = shared

    def _draw(self, name: str) -> Tensor:
        dtype = torch.complex128 if name == "tensor" else torch.float64
        return torch.randn(self.shapes[name], generator=self._generator, dtype=dtype)

    def new_gradients(self) -> None:
        """Write into every gradient a fixed part plus fresh noise."""
        for name, p in self.named_parameters():
            gradient = self._shared[name] + 0.5 * self._draw(name)
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(gradient.to(p.dtype))

    def values(self) -> dict[str, Tensor]:
        """A copy of the weights on the CPU, in double precision."""
        return {name: p.detach().to("cpu", torch.promote_types(p.dtype, torch.float64), copy=True)
                for name, p in self.named_parameters()}  # fmt: skip


class Alike(Mixed):
    """The same, and three matrices that are alike, so that they are stepped together."""

    shapes = Mixed.shapes | {"query": (40, 64), "key": (40, 64), "value": (40, 64)}


class Matrices(nn.Module):
    """Matrices, drawn on their device, whose gradients share a part of rank 16, and stay in place."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        super().__init__()
        self._generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=self._generator, device=device)

        self.weights = nn.ParameterList([nn.Parameter(draw(*shape).mul_(0.02)) for shape in shapes])
        self._signals = [(draw(m, 16), draw(16, n)) for m, n in shapes]
        for p in self.weights:
            p.grad = torch.empty_like(p)

    def new_gradients(self) -> None:
        """Write into every gradient the shared part plus fresh noise."""
        for p, (a, b) in zip(self.weights, self._signals, strict=True):
            assert p.grad is not None
            p.grad.normal_(generator=self._generator).addmm_(a, b, alpha=0.2)


def periodic(recipe: str, every: int) -> dict[str, Any]:
    """A refresh period as an option, for recipes that do not refresh at every step."""
    method = comoving.recipes()[recipe]
    return {"refresh_every": every} if not method.full_rank and method.options.get("refresh_every", 1) > 1 else {}


class Subject:
    """A recipe on :class:`Mixed`, or another model, which counts its refreshes."""

    def __init__(
        self,
        recipe: str,
        dtype: torch.dtype,
        device: torch.device | str,
        every: int,
        on_nonfinite: str = "skip",
        model: type[Mixed] = Mixed,
    ) -> None:
        self.model = model(dtype, device)
        options: dict[str, Any] = periodic(recipe, every) | {"on_nonfinite": on_nonfinite}
        self.blocks = True
        """Whether each expert has a frame of its own; some frames cannot."""
        try:
            self.optimizer = comoving.build(recipe, self.model, 1e-2, experts=("experts",), **options)
        except (TypeError, ValueError):
            self.blocks = False
            self.optimizer = comoving.build(recipe, self.model, 1e-2, **options)
        self.optimizer.refresh_scope = self._refresh
        self.refreshes = 0

    @contextmanager
    def _refresh(self) -> Generator[None]:
        self.refreshes += 1
        yield

    def step(self, under: AbstractContextManager[Any] | None = None) -> bool:
        """A step with new gradients, in a context if one is given; whether a frame was refreshed."""
        self.model.new_gradients()
        before = self.refreshes
        if under is None:
            self.optimizer.step()
        else:
            with under:
                self.optimizer.step()
        return self.refreshes > before

    def update(self) -> dict[str, Tensor]:
        """What a step with new gradients adds to the weights."""
        self.model.new_gradients()
        before = self.model.values()
        self.optimizer.step()
        return {name: value - before[name] for name, value in self.model.values().items()}


def apart(ours: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Name -> norm of the difference by the norm of the other."""
    return {name: _relative(x, other[name]) for name, x in ours.items()}


def _relative(x: Tensor, reference: Tensor) -> float:
    size, difference = float(torch.linalg.vector_norm(reference)), float(torch.linalg.vector_norm(x - reference))
    return difference / size if size else math.inf if difference else 0.0


# ------------------------------------------------------------------------------------------------------------- sections


def correctness(run: Run, figures: Figures) -> None:
    """How far updates on the device are from those on the CPU."""
    for recipe in run.each(run.recipes):
        with run.attempt(recipe, figures):
            own: Figures = {}
            blocks = False
            for dtype, tolerance in TOLERANCE.items():
                here, there = (Subject(recipe, dtype, device, OFTEN, "raise") for device in (run.device, "cpu"))
                steps = [apart(here.update(), there.update()) for _ in range(run.steps)]
                largest = {name: _most(step[name] for step in steps) for name in Mixed.shapes}
                beyond = [t for t, step in enumerate(steps) if not _most(step.values()) <= tolerance]
                own[str(dtype).removeprefix("torch.")] = {
                    "largest": _most(largest.values()),
                    "tolerance": tolerance,
                    "within": not beyond,
                    "first step beyond": beyond[0] if beyond else None,
                    "at the first step": _most(steps[0].values()),
                    "parameters": largest,
                }
                blocks = here.blocks
            kept = isinstance(comoving.recipes()[recipe].options.get("transport"), Keep)
            figures[recipe] = own | {"signs matter": kept, "experts": "blocks" if blocks else "one tensor"}


def _most(values: Iterable[float]) -> float:
    values = list(values)
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def host_reads(run: Run, figures: Figures) -> None:
    """Which steps read from the device, and where.

    Raises:
        Skipped: there is nothing to find out by.
    """
    if run.guard is None:
        raise Skipped("needs CUDA: torch.cuda.set_sync_debug_mode")
    for recipe in run.each(run.recipes):
        with run.attempt(recipe, figures):
            probe = Subject(recipe, torch.float32, run.device, SELDOM)
            refreshed = [probe.step() for _ in range(WATCHED)]
            figures[recipe] = {
                "first": _watched(run, recipe, {0}),
                "between": _watched(run, recipe, {t for t in range(1, WATCHED) if not refreshed[t]}),
                "refresh": _watched(run, recipe, {t for t in range(1, WATCHED) if refreshed[t]}),
            }


def _watched(run: Run, recipe: str, steps: set[int]) -> Figures:
    """Steps of a new optimizer, those of the given numbers under the guard."""
    assert run.guard is not None
    if not steps:
        return {"passes": None, "why": "there is no such step"}
    subject = Subject(recipe, torch.float32, run.device, SELDOM)
    for t in range(max(steps) + 1):
        run.check()
        try:
            subject.step(run.guard() if t in steps else None)
        except Exception as error:
            return {"passes": False, "step": t, **origin(error)}
    return {"passes": True, "steps": len(steps)}


def memory(run: Run, figures: Figures) -> None:
    """State and temporaries against the plan, in bytes."""
    figures["peaks"] = "torch.cuda.max_memory_allocated" if run.cuda else "counts of storages"
    if run.usage is None:
        figures["peaks"] = {"skipped": "needs CUDA: torch.cuda.max_memory_allocated"}
    shapes: list[tuple[int, ...]] = [(24, 40), (40, 24)] if run.small else [(1024, 1024)] * 2 + [(2816, 1024)]
    if run.cuda:  # libraries' workspaces, which are allocated once
        x = torch.randn(256, 256, device=run.device)
        torch.linalg.svd(x @ x)
        torch.linalg.eigh(x + x.mT)
        torch.linalg.qr(x)
    for recipe in run.each(run.recipes):
        with run.attempt(recipe, figures):
            figures[recipe] = _remembered(run, recipe, Matrices(shapes, run.device))


def _remembered(run: Run, recipe: str, model: Matrices) -> Figures:
    rank = None if recipe == "apollo-mini" else 0.25
    plan = comoving.plan(model, recipe, rank, device=run.device.type, **periodic(recipe, OFTEN))
    optimizer = comoving.build(recipe, model, LR, rank, **periodic(recipe, OFTEN))
    refreshes: list[bool] = []

    @contextmanager
    def refresh() -> Generator[None]:
        refreshes.append(True)
        yield

    optimizer.refresh_scope = refresh
    used: dict[str, int] = {}
    usages: list[Usage] = []
    stored = comoving.state_bytes(optimizer)
    for t in range(2 * OFTEN + 1):
        run.check()
        model.new_gradients()
        refreshes.clear()
        if run.usage is None:
            optimizer.step()
            continue
        usage = run.usage(optimizer.step, _there(model, optimizer), run.device)
        usages.append(usage)
        kind = "first" if t == 0 else "refresh" if refreshes else "between"
        # The state that the first step makes stays; temporaries are what does not.
        used[kind] = max(used.get(kind, 0), usage.peak - max(usage.before, usage.after))
    state: Figures = {"measured": comoving.state_bytes(optimizer), "planned": plan.state_bytes}
    figures: Figures = {"state": state | {"as planned": state["measured"] == state["planned"]}}
    if usages:
        planned = {"first": plan.refresh_temporaries, "between": plan.step_temporaries}
        planned["refresh"] = planned["first"]
        figures["temporaries"] = {kind: {"measured": size, "planned": planned[kind]} for kind, size in used.items()}
        # What is there besides, such as what gradients are made of, and libraries' workspaces, cancels.
        besides = usages[0].before - stored - plan.weights - plan.gradients
        peak = max(usage.peak for usage in usages) - besides
        figures["state"]["allocated"] = usages[0].after - usages[0].before + stored
        figures["peak"] = {"measured": peak, "planned": plan.peak_bytes, "measured / planned": peak / plan.peak_bytes}
    return figures


def _there(model: Matrices, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for p in model.weights:
        yield p.data
        if p.grad is not None:
            yield p.grad
        yield from (x for x in optimizer.state.get(p, {}).values() if isinstance(x, Tensor))


# ---------------------------------------------------------------------------------------------------------------- times

Maker = Callable[[Run, Matrices], torch.optim.Optimizer]


def _torch(name: str, **options: Any) -> Maker:
    return lambda run, model: getattr(torch.optim, name)(list(model.weights), lr=LR, weight_decay=DECAY, **options)


def _foreign(module: str, name: str) -> Maker:
    """8-bit AdamW of a package that is optional."""

    def make(run: Run, model: Matrices) -> torch.optim.Optimizer:
        if not run.cuda and _installed(module.partition(".")[0]):
            raise Skipped("needs CUDA: its kernels are written for it, or compiled")
        constructor = getattr(importlib.import_module(module), name)
        return constructor(list(model.weights), lr=LR, weight_decay=DECAY)

    return make


def _ours(recipe: str, **options: Any) -> Maker:
    options = {"on_nonfinite": "skip", "weight_decay": DECAY} | options

    def make(run: Run, model: Matrices) -> torch.optim.Optimizer:
        rank = 1 if recipe == "apollo-mini" else run.rank
        return comoving.build(recipe, model, LR, rank=rank, **options)

    return make


BASE = "torch fused adamw"
CONTENDERS: dict[str, Maker] = {
    BASE: _torch("AdamW", fused=True),
    "comoving-adamw": _ours("comoving-adamw"),
    "torch muon": _torch("Muon", adjust_lr_fn="match_rms_adamw"),
    "bitsandbytes 8-bit adamw": _foreign("bitsandbytes.optim", "AdamW8bit"),
    "torchao 8-bit adamw": _foreign("torchao.optim", "AdamW8bit"),
    "muon": _ours("muon"),
    "adamw": _ours("adamw"),
    "adamw, 8 bits": _ours("adamw", moments="int8"),
    "comoving-adamw, raise": _ours("comoving-adamw", on_nonfinite="raise"),
    "tucker-adam": _ours("tucker-adam"),
    "apollo": _ours("apollo"),
    "lion": _ours("lion"),
    "muon, 8 bits": _ours("muon", moments="int8"),
    "ldadam": _ours("ldadam"),
    "galore": _ours("galore"),
}
"""Who is timed, in the order in which time is spent on their first step."""
GRAPHED: dict[str, Maker] = {
    BASE: _torch("AdamW", fused=True, capturable=True),
    "comoving-adamw": _ours("comoving-adamw", on_nonfinite="raise"),
    "torch muon": CONTENDERS["torch muon"],
    "adamw, 8 bits": _ours("adamw", moments="int8", on_nonfinite="raise"),
    "tucker-adam": _ours("tucker-adam", on_nonfinite="raise"),
    "muon": _ours("muon", on_nonfinite="raise"),
}
"""Who is timed with and without graphs; ours with the look at all gradients that lets large ones stay in place."""


def spread(times: list[float]) -> Figures:
    """Median, quartiles and mean of seconds."""
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times * 3)
    return {"median": median(times), "interquartile range": high - low, "quartiles": [low, high],
            "mean": mean(times), "worst": max(times), "steps": len(times)}  # fmt: skip


def times(run: Run, figures: Figures) -> None:
    """Steps of all contenders in turn. Making them, the first steps included, may take two thirds of the budget."""
    model = Matrices(run.shapes, run.device)
    steppers: dict[str, Step] = {}
    firsts: dict[str, float] = {}
    unmade: list[str] = []
    try:
        with run.until(run.left() * 2 / 3):
            for name in run.each(CONTENDERS):
                with run.attempt(name, figures):
                    firsts[name], steppers[name] = _warm(run, model, CONTENDERS[name])
    except OutOfTime:
        unmade = list(run.waiting)
        if not steppers:
            raise
    samples: dict[str, list[float]] = {name: [] for name in steppers}
    try:
        for _ in range(run.rounds):
            model.new_gradients()
            for name, step in steppers.items():
                run.check()
                samples[name].append(run.timed(step))
    except OutOfTime:
        pass  # with as many rounds as there were
    base = samples.get(BASE) or [math.nan]
    for name, own in samples.items():
        if own:
            figures[name] = {"first": firsts[name], **spread(own), "median / fused adamw": median(own) / median(base)}
    run.waiting = unmade + [name for name, own in samples.items() if not own]
    if run.waiting:
        raise OutOfTime


def _warm(run: Run, model: Matrices, make: Maker) -> tuple[float, Step]:
    """Seconds of the first step, and the steps after two more."""
    optimizer = make(run, model)
    model.new_gradients()
    first = run.timed(optimizer.step)
    for _ in range(2):
        optimizer.step()
    return first, optimizer.step


# --------------------------------------------------------------------------------------------------------------- graphs


class Watched:
    """Stands between an engine and its graphs: counts the rows that they serve, and what replays read.

    Args:
        graphs: what replays.
        guard: a context in which a host read raises, for all replays of a recording but the first.
    """

    def __init__(self, graphs: Graphs, guard: Callable[[], AbstractContextManager[Any]]) -> None:
        self.graphs, self._guard = graphs, guard
        self.rows = self.guarded = 0
        self._before: set[Any] = set()

    def step(self, which: Any, gradient: Callable[[Tensor], Tensor]) -> bool:
        """As the graphs'."""
        before, known = self.graphs.replayed, which.rows in self._before
        with self._guard() if known else nullcontext():
            served = self.graphs.step(which, gradient)
        if self.graphs.replayed > before:
            self._before.add(which.rows)
            self.rows += len(which.rows)
            self.guarded += known
        return served

    def forget(self) -> None:
        """Likewise."""
        self._before.clear()
        self.graphs.forget()


def graphs(run: Run, figures: Figures) -> None:
    """What is replayed of each recipe, and whether replays are its steps; with a look at gradients, and without.

    Raises:
        Skipped: there are no graphs.
        RuntimeError: the device did not recover from a capture that failed.
    """
    if run.record is None or run.guard is None:
        raise Skipped("needs CUDA: torch.cuda.graph")
    for recipe in run.each(run.recipes):
        own: Figures = {}
        for on_nonfinite in ("raise", "skip"):
            with run.attempt(on_nonfinite, own):
                own[on_nonfinite] = _replayed(run, recipe, on_nonfinite)
        figures[recipe] = own
        _alive(run, recipe)


def _replayed(run: Run, recipe: str, on_nonfinite: str) -> Figures:
    """Steps of an optimizer that replays, beside the same steps of a twin."""
    assert run.record is not None and run.guard is not None
    replaying, plain = (Subject(recipe, torch.float32, run.device, SELDOM, on_nonfinite, model=Alike) for _ in range(2))
    engine = replaying.optimizer.engine
    run.record(replaying.optimizer)
    made: Any = engine.replays
    engine.replays = watched = Watched(made, run.guard)
    differences, shares, total = list[float](), list[float](), 0
    for _ in range(TWINNED):
        run.check()
        before = watched.rows
        try:
            ours = replaying.update()
        except Exception as error:
            return {"passes": False, "why": "a step cannot be recorded, or its replay reads", **origin(error)}
        differences.append(_most(apart(ours, plain.update()).values()))
        rows = sum(len(engine.rows_of(p)) for p, site in engine.roster.sites.items() if not site.plain)
        if not rows:
            return {"passes": None, "why": "torch's AdamW steps all of it"}
        total += rows
        shares.append((watched.rows - before) / rows)
    return {
        "passes": True if watched.guarded else None,
        "recorded": made.recorded,
        "replayed": made.replayed,
        "under the error mode": watched.guarded,
        "rows": total,
        "share of rows": watched.rows / total,
        "share at best": max(shares),
        "steps": TWINNED,
        "refreshed": replaying.refreshes,
        "largest difference": _most(differences),
        "difference at the first step": differences[0],
    }


def _alive(run: Run, after: str) -> None:
    """Raise where a failed capture has left the device unusable."""
    try:
        run.settle()
        float(torch.randn(2, device=run.device).sum())
    except Exception as error:
        raise RuntimeError(f"the device did not recover after {after}: {error}") from error


def graph_times(run: Run, figures: Figures) -> None:
    """Steps with and without graphs, between refreshes; what is left of the budget is shared out evenly.

    Raises:
        Skipped: there are no graphs.
        RuntimeError: the device did not recover from a capture that failed.
    """
    if run.capture is None or run.record is None or run.guard is None:
        raise Skipped("needs CUDA: torch.cuda.graph")
    model = Matrices(run.shapes, run.device)
    for name in run.each(GRAPHED):
        end = time.monotonic() + 0.8 * run.left() / len(run.waiting)
        with run.attempt(name, figures):
            optimizer = GRAPHED[name](run, model)
            ours = isinstance(optimizer, comoving.LowRankOptimizer)
            figures[name] = (_before_and_after if ours else _with_and_without)(run, model, optimizer, end)
        _alive(run, name)


def _before_and_after(run: Run, model: Matrices, optimizer: Any, end: float) -> Figures:
    """One of our optimizers, before capture() and after it."""
    assert run.record is not None
    model.new_gradients()
    optimizer.step()
    every = max(group["refresh_every"] for group in optimizer.param_groups)
    for _ in range(every):  # phases lie within a period
        run.check()
        optimizer.step()
    for group in optimizer.param_groups:
        group["refresh_every"] = NEVER
    optimizer.step()
    (eager,) = _rounds(run, model, [optimizer.step], (time.monotonic() + end) / 2)
    run.settle()
    start = time.perf_counter()
    run.record(optimizer)
    made: Any = optimizer.engine.replays
    try:
        for _ in range(2):  # once as it will be recorded, then recorded
            run.check()
            optimizer.step()
    except Exception as error:
        return {"captured": False, "why": "the capture failed", **origin(error)}
    run.settle()
    took, before = time.perf_counter() - start, made.replayed
    if not made.recorded:
        return {"captured": False, "why": "no step of it is replayed"}
    (replayed,) = _rounds(run, model, [optimizer.step], end)
    counts = {"recorded": made.recorded, "replayed in each step": (made.replayed - before) / len(replayed)}
    return {"captured": True, "capture": took, **counts, **_compared(eager, replayed)}


def _with_and_without(run: Run, model: Matrices, optimizer: torch.optim.Optimizer, end: float) -> Figures:
    """One of torch's, its whole step in a graph, and not."""
    assert run.capture is not None and run.guard is not None
    model.new_gradients()
    for _ in range(2):
        optimizer.step()
    try:
        with run.guard():
            optimizer.step()
    except Exception as error:
        return {"captured": False, "why": "the step reads from the device", **origin(error)}
    run.settle()
    start = time.perf_counter()
    try:
        replay = run.capture(optimizer.step)
    except Exception as error:
        return {"captured": False, "why": "the capture failed", **origin(error)}
    took = time.perf_counter() - start
    for _ in range(2):
        replay()
    eager, replayed = _rounds(run, model, [optimizer.step, replay], end)
    return {"captured": True, "capture": took, **_compared(eager, replayed)}


def _rounds(run: Run, model: Matrices, steps: list[Step], end: float) -> list[list[float]]:
    """Seconds of each of these steps in turn, a few times at least, and not much beyond a time of the clock."""
    samples: list[list[float]] = [[] for _ in steps]
    for i in range(run.rounds):
        run.check()
        if i >= FEWEST and time.monotonic() > end:
            break
        model.new_gradients()
        for own, step in zip(samples, steps, strict=True):
            own.append(run.timed(step))
    return samples


def _compared(eager: list[float], replayed: list[float]) -> Figures:
    return {"without": spread(eager), "with": spread(replayed), "with / without": median(replayed) / median(eager)}


# ------------------------------------------------------------------------------------------------------------- the run

SECTIONS: dict[str, Callable[[Run, Figures], None]] = {
    "correctness": correctness,
    "host reads": host_reads,
    "memory": memory,
    "times": times,
    "graphs": graphs,
    "graph times": graph_times,
}
"""In this order: what may leave the device in disorder comes last."""


def summary(run: Run) -> list[str]:
    """A short table of what came out."""
    lines: list[str] = []
    for name, entry in run.sections.items():
        reason = entry.get("reason") or (entry["traceback"][-1] if "traceback" in entry else "")
        lines.append(f"{name}: {entry['status']} in {entry.get('seconds', 0)} s {reason}".rstrip())
        if "not finished" in entry:
            lines.append(f"  not finished: {', '.join(entry['not finished'])}")
        for label, own in entry["figures"].items():
            if isinstance(own, dict):
                lines.append(f"  {label:26s} {_line(name, own)}")
    return lines


def _line(section: str, own: Figures) -> str:
    for word in ("missing", "skipped", "failed"):
        if word in own:
            return f"{word}: {own[word][-1] if isinstance(own[word], list) else own[word]}"
    return _LINES[section](own)


def _of_correctness(own: Figures) -> str:
    figures = "  ".join(f"{key} {own[key]['largest']:.1e}" for key in ("float64", "float32"))
    return figures + ("  signs matter" if own["signs matter"] else "")


def _of_flags(own: Figures) -> str:
    return "  ".join(f"{kind} {_word(x['passes'])}{_at(x)}" for kind, x in own.items())


def _of_graphs(own: Figures) -> str:
    return "  ".join(f"{kind}: {_of_replays(x)}" for kind, x in own.items())


def _of_replays(own: Figures) -> str:
    for word in ("skipped", "failed", "why"):
        if word in own:
            return f"{own[word][-1] if isinstance(own[word], list) else own[word]}{_at(own)}"
    counts = f"{own['replayed']} replays of {own['recorded']}, {own['share of rows']:.0%} of rows"
    return f"{counts}, {own['largest difference']:.0e} apart" if own["recorded"] else "nothing is replayed"


def _of_memory(own: Figures) -> str:
    peak = f"  peak {own['peak']['measured / planned']:.3f} of the plan" if "peak" in own else ""
    return f"state {own['state']['measured']} of {own['state']['planned']} bytes{peak}"


def _of_times(own: Figures) -> str:
    return f"{1e3 * own['median']:9.2f} ms  {own['median / fused adamw']:6.2f}x  first {own['first']:.2f} s"


def _of_graph_times(own: Figures) -> str:
    if "with" not in own:
        return f"{own['why']}{_at(own)}"
    return f"{1e3 * own['without']['median']:9.2f} ms  with a graph {1e3 * own['with']['median']:9.2f} ms"


_LINES: dict[str, Callable[[Figures], str]] = {
    "correctness": _of_correctness,
    "host reads": _of_flags,
    "memory": _of_memory,
    "times": _of_times,
    "graphs": _of_graphs,
    "graph times": _of_graph_times,
}


def _word(flag: bool | None) -> str:
    return "-" if flag is None else "yes" if flag else "no"


def _at(own: Figures) -> str:
    return f" ({(own['line'] or own['error']).partition(' in ')[0]})" if "error" in own else ""


def main(arguments: list[str] | None = None) -> Run:
    """Run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="small shapes and few steps")
    parser.add_argument("--seconds", type=float, help="of each section; without it 440 in all, shared out")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="those that are run")
    parser.add_argument("--recipes", help="those that are looked at, without it all")
    parser.add_argument("--layers", type=int, default=24, help="of LLaMA-1B")
    parser.add_argument("--rounds", type=int, default=24, help="steps that are timed")
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    options = parser.parse_args(arguments)
    unknown = set(options.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}; known are {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    recipes = None if options.recipes is None else options.recipes.split(",")
    run = Run(options.device, options.out, options.small, options.seconds, recipes, options.layers, options.rounds)
    for name in SECTIONS:
        if name in options.sections.split(","):
            print(f"{name} ...", file=sys.stderr, flush=True)
            run.section(name)
        else:
            run.sections[name] |= {"status": "skipped", "reason": "not asked for"}
    run.report["finished"] = True
    run.write()
    print("\n".join(summary(run)))
    return run


if __name__ == "__main__":
    gc.freeze()  # what was imported lives to the end: no collection need go through it
    main()
