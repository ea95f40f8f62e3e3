"""One run: one contender at one rate and one seed, trained from start to end and measured."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import comoving
from comoving.race import contenders, resuming
from comoving.race.contenders import Contender, Refused
from comoving.race.ratios import build_with_ratio
from comoving.race.settings import DTYPES, Rank, RunSettings
from comoving.race.tasks import TASKS, Batch, Task
from comoving.race.wrapping import wrapping_of
from comoving.relative_updates import Movement, relative_updates
from comoving.roles import Role

SPIKE_WINDOW = 20
SPIKE_EXCESS = 0.25
SPIKE_DEVIATIONS = 5.0

Progress = Callable[[int, float], None]


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """Learning rate of step 0, 1, ... as a fraction of its peak: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's learning rate, in place where an optimizer keeps it in a tensor (torchao's does)."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def spikes(losses: list[float]) -> list[int]:
    """Steps whose training loss stands out of the 20 before it.

    Step t >= 20 is a spike if its loss exceeds the median of losses t-20 .. t-1 by more than 25% of it **and** by more
    than five times their median absolute deviation from it (the second keeps the noise of small batches out).
    """
    found: list[int] = []
    for t in range(SPIKE_WINDOW, len(losses)):
        window = losses[t - SPIKE_WINDOW : t]
        middle = statistics.median(window)
        spread = statistics.median(abs(x - middle) for x in window)
        if losses[t] - middle > max(SPIKE_EXCESS * abs(middle), SPIKE_DEVIATIONS * spread):
            found.append(t)
    return found


def validation_steps(steps: int, count: int) -> list[int]:
    """At most ``count`` numbers of finished steps, evenly spread, the last one ``steps``."""
    return sorted({max(1, round(steps * (i + 1) / count)) for i in range(count)})


def looks(run: RunSettings) -> set[int]:
    """Numbers of finished steps after which a run is validated: those of the whole one up to its end, and its end."""
    return {step for step in validation_steps(run.steps, run.validations) if step < run.length} | {run.length}


class Stopwatch:
    """Seconds spent inside it, the device waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def now(self) -> float:
        """The clock, after all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def timed(self):
        """Add the time of the ``with`` block."""
        start = self.now()
        try:
            yield
        finally:
            self.seconds += self.now() - start


def forget_peak(device: torch.device) -> None:
    """Start the measurement of peak memory here, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the allocator's peak on CUDA, of the process's largest resident size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        # Not ru_maxrss: Linux hands the parent's peak on to a process started from it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # noqa: PLC0415  (not there on Windows)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def initialize(task: Task, run: RunSettings) -> nn.Module:
    """The model of this seed, the same for every contender; the global RNG is seeded by the caller's fork."""
    torch.manual_seed(run.seed)
    model = task.model()
    if run.dtype == "bfloat16":
        model.bfloat16()
    elif run.dtype == "float64":
        model.double()  # leaves complex weights alone
        for p in model.parameters():
            if p.is_complex():
                p.data = p.data.to(torch.complex128)
    return model.to(run.device)


def projected_weights(model: nn.Module, rank: Rank) -> list[str]:
    """The parameters that ``comoving.AdamW`` projects at ``rank``; the hidden weights where it projects none.

    One set for all contenders: only so can their state on it be compared, AdamW's too, which projects nothing.
    """
    try:
        chosen = [row.parameter for row in comoving.explain(model, rank).rows if row.projected]
    except ValueError:  # a rank that is meant for a foreign contender
        chosen = []
    return chosen or list(contenders.hidden_weights(model))


def bytes_of_state(contender: Contender, optimizer: Any, model: nn.Module, names: list[str]) -> dict[str, int]:
    """State in total and on projected parameters, and the bytes of the parameters each belongs to, in this process."""
    projected = [model.get_parameter(name) for name in names]
    return {
        "state": comoving.state_bytes(optimizer) if contender.foreign is None else contenders.state_bytes(optimizer),
        "state_projected": contenders.state_bytes(optimizer, projected),
        "parameters": contenders.storage_bytes(model.parameters()),
        "parameters_projected": contenders.storage_bytes(projected),
    }


def move(x: Tensor, run: RunSettings) -> Tensor:
    """To the run's device; floating-point data to its dtype too."""
    return x.to(run.device, DTYPES[run.dtype]) if x.is_floating_point() else x.to(run.device)


def stepped(optimizer: Any, stepping: Stopwatch, watched: nn.Module | None) -> dict[Role, float]:
    """One step, timed; of a model that is watched how far it went, role by role, over the size of the weights."""
    with relative_updates(watched) if watched is not None else nullcontext(dict[Role, Movement]()) as moved:
        with stepping.timed():
            optimizer.step()
    return {role: movement.ratio for role, movement in moved.items()}


def portions(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of at most ``size`` samples; 0 for one part."""
    if not size or len(batch[0]) <= size:
        return [batch]
    return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


def backward(task: Task, model: nn.Module, parts: list[Batch]) -> Tensor:
    """Add the gradient of the mean loss of all samples to the parameters', and return that loss, detached.

    Each part gives up its graph before the next one goes through the model.
    """
    samples = sum(len(inputs) for inputs, _ in parts)
    total: Tensor | float = 0.0
    for part in parts:
        loss = task.loss(model, part) * (len(part[0]) / samples)
        loss.backward()
        total = total + loss.detach()
    return torch.as_tensor(total)


def train(
    run: RunSettings,
    task: Task | None = None,
    progress: Progress = lambda step, loss: None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Train and measure. The global RNG is left as it was found.

    Args:
        run: the settings.
        task: already loaded, else it is loaded here.
        progress: called after every step with the number of finished steps and the training loss.
        kept: a file; a run that ends before its last step leaves there what a longer one goes on from, which removes it
            when it is through.

    Returns:
        A record for JSON with ``status`` "finished", "diverged" (with ``error``) or "refused" (with ``error``).
        Finished and diverged runs hold the curves and all figures; times in seconds, memory in bytes.
    """
    if task is None:
        task = TASKS[run.task].load(text=run.text)
    devices = [torch.device(run.device)] if torch.device(run.device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return race(run, task, contenders.parse(run.contender), progress, kept)


@dataclass
class Course:
    """What has been measured of a run, step by step, and the losses on held-out data; seconds of three stopwatches."""

    losses: list[float] = field(default_factory=list[float])
    step_seconds: list[float] = field(default_factory=list[float])
    optimizer_seconds: list[float] = field(default_factory=list[float])
    curve: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    updates: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def go_on(self, due: Collection[int], watches: Sequence[Stopwatch], draw: Callable[[], Batch]) -> None:
        """Keep the validations that are ``due``, set the stopwatches, and draw the batches that are behind it again."""
        self.curve = [point for point in self.curve if point["step"] in due]
        self.updates = [point for point in self.updates if point["step"] in due]
        for watch, seconds in zip(watches, self.seconds, strict=True):
            watch.seconds = seconds
        for _ in self.losses:
            draw()

    def record(self, error: str | None, refreshes: bool) -> dict[str, Any]:
        """Status, curves and times; ``refreshes`` where the third stopwatch was held to refreshes."""
        # The first step creates the state and warms caches up; it says nothing about the ones after it.
        settled = self.optimizer_seconds[1:] or self.optimizer_seconds
        whole, stepping, refresh = self.seconds
        return {
            "status": "finished" if error is None else "diverged",
            **({} if error is None else {"error": error}),
            "validation": self.curve,
            "updates": self.updates,
            "losses": self.losses,
            "final": self.curve[-1]["value"] if error is None else None,
            "final_loss": self.curve[-1]["loss"] if error is None else None,
            "spikes": spikes(self.losses),
            "seconds": whole,
            "step_seconds": statistics.median(self.step_seconds[1:] or self.step_seconds),
            "optimizer_seconds": statistics.median(settled),
            "worst_step_ratio": max(settled) / statistics.median(settled),
            "refresh_share": refresh / stepping if refreshes else None,
        }


def validated(task: Task, model: nn.Module) -> dict[str, float]:
    """What the task says of the model on its held-out data."""
    model.eval()
    with torch.no_grad():
        point = task.validate(model)
    model.train()
    return point


def race(
    run: RunSettings, task: Task, contender: Contender, progress: Progress, kept: Path | None = None
) -> dict[str, Any]:
    """:func:`train` inside its fork of the global RNG."""
    device = torch.device(run.device)
    wrapping = wrapping_of(run)
    model = initialize(task, run)
    projected = projected_weights(model, run.rank)
    try:
        optimizer = build_with_ratio(
            contender, wrapping.sharded(model), run.rate, run.ratio, run.rank, run.weight_decay
        )
        trained = wrapping.trained(model, optimizer)
    except Refused as reason:
        return {"status": "refused", "error": str(reason)}
    whole, stepping, refresh = watches = [Stopwatch(device) for _ in range(3)]
    measured = hasattr(optimizer, "refresh_scope")
    if measured:
        scope: Callable[[], AbstractContextManager[None]] = refresh.timed
        optimizer.refresh_scope = scope
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    due = looks(run)
    batches = torch.Generator().manual_seed(run.seed)
    course = Course(**resuming.load(kept, model, optimizer, run.length))
    course.go_on(due, watches, lambda: task.batch(run.batch, batches))
    error = None
    # The hook of compressed gradients wants to know beforehand how often they are added to.
    forward = 0 if run.compress else TASKS[run.task].forward
    forget_peak(device)
    for step in range(len(course.losses), run.length):
        before, before_step = whole.seconds, stepping.seconds
        with whole.timed():
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                set_rate(group, peak * rate_factor(step, run.steps, run.warmup))
            batch = wrapping.part(task.batch(run.batch, batches))
            optimizer.zero_grad()
            loss = backward(task, trained, [(move(x, run), move(y, run)) for x, y in portions(batch, forward)])
            course.losses.append(wrapping.mean(loss))
            if math.isfinite(course.losses[-1]):
                moved = stepped(optimizer, stepping, model if step + 1 in due else None)
                course.updates += [{"step": step + 1, **moved}] if moved else []
        course.step_seconds.append(whole.seconds - before)
        course.optimizer_seconds.append(stepping.seconds - before_step)
        progress(step + 1, course.losses[-1])
        if not math.isfinite(course.losses[-1]):
            error = f"training loss became {course.losses[-1]} at step {step + 1}"
            break
        if step + 1 in due:
            point = validated(task, model)
            course.curve.append({"step": step + 1, "seconds": whole.seconds, **point})
            if not math.isfinite(point["value"]):
                error = f"validation became {point['value']} at step {step + 1}"
                break
    course.seconds = [watch.seconds for watch in watches]
    if error is None and run.length < run.steps:
        resuming.save(kept, model, optimizer, asdict(course))
    elif kept is not None:
        kept.unlink(missing_ok=True)
    return {
        **course.record(error, measured),
        "peak_memory": peak_memory(device),
        **bytes_of_state(contender, optimizer, model, projected),
        **wrapping.facts(len(course.losses)),
    }
