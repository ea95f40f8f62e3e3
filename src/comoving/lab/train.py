"""One run of the laboratory: one arm at one rate and one seed, trained from start to end and measured."""

import logging
import math
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import comoving
from comoving.directions import SpectralMonitor, targets
from comoving.directions.sinks import Sink
from comoving.files import explained
from comoving.lab import tasks
from comoving.lab.config import Config, from_plain
from comoving.lab.interventions import Intervention, intervention
from comoving.lab.studies import Arm
from comoving.race.runner import rate_factor, spikes, validation_steps

LOG = logging.getLogger(__name__)
KINDS = ("weight", "gradient", "momentum", "update")
CHECKPOINT_EVERY = 60.0
"""Seconds between checkpoints of a long run."""

Progress = Callable[[int, float], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class LabRun:
    """Everything that decides the outcome of a run, and where else its spectra are written.

    Args:
        config: of the task, harder where the arm wants that.
        arm: what is done.
        rate: peak learning rate of AdamW.
        seed: of the initialization and of the batches, the same for all arms.
        device: of the model.
        fingerprint: of data and code.
        log: sinks for the spectra, besides the record; they change nothing.
    """

    config: Config
    arm: Arm
    rate: float
    seed: int
    device: str
    fingerprint: str
    log: Mapping[str, str] = field(default_factory=dict[str, str])

    def plain(self) -> Record:
        """All fields, as JSON holds them."""
        rest = {name: getattr(self, name) for name in ("rate", "seed", "device", "fingerprint")}
        return {"config": self.config.plain(), "arm": self.arm.plain(), **rest, "log": dict(self.log)}

    @staticmethod
    def of(found: Record) -> "LabRun":
        """The inverse of :meth:`plain`."""
        fields: Record = {**found, "config": from_plain(found["config"]), "arm": Arm(**found["arm"])}
        return LabRun(**fields)


class Recorder:
    """A sink that keeps every value as a list of [step, value]."""

    def __init__(self) -> None:
        self.values: dict[str, list[list[float]]] = {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one reading."""
        for name, value in values.items():
            self.values.setdefault(name, []).append([step, value])

    def close(self) -> None:
        """Nothing is open."""


def train(
    run: LabRun,
    task: tasks.LabTask | None = None,
    progress: Progress = lambda step, loss: None,
    checkpoint: Path | None = None,
    sinks: tuple[Sink, ...] = (),
) -> Record:
    """Train and measure. The global RNG is left as it was found.

    Args:
        run: the settings.
        task: already loaded, else it is loaded here.
        progress: called after every step with the number of finished steps and the training loss.
        checkpoint: a file from which an interrupted run goes on, and which is removed in the end.
        sinks: further readers of the spectra.

    Returns:
        A record for JSON, its ``status`` "finished" or "diverged" (with ``error``).
    """
    task = tasks.load(run.config) if task is None else task
    devices = [torch.device(run.device)] if torch.device(run.device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        trial = Trial(run, task, sinks)
        found = None if checkpoint is None else stored(checkpoint, run.device)
        if found is not None:
            trial.load(found)
        trial.train(progress, checkpoint)
        record = trial.record()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return record


class Trial:
    """A model in training, with its optimizer, its monitor and what has been measured so far."""

    def __init__(self, run: LabRun, task: tasks.LabTask, sinks: tuple[Sink, ...]) -> None:
        self.run, self.task, self.config = run, task, run.config
        torch.manual_seed(run.seed)
        self.model = task.model().to(run.device)
        self.layers = targets(self.model, self.config.targets)
        self.shapes = {name: list(self.weight(module).shape) for name, module in self.layers.items()}
        self.intervention: Intervention = intervention(run.arm, self.config, self.model, self.layers, run.seed)
        self.optimizer = torch.optim.AdamW(self.intervention.groups(run.rate), lr=run.rate)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.recorder = Recorder()
        self.monitor = SpectralMonitor(
            self.model,
            self.config.targets,
            every=self.config.spec_every,
            k=self.config.topk,
            kinds=KINDS if self.intervention.trains_targets else ("weight",),
            sinks=(self.recorder, *sinks),
        )
        self.monitor.attach(self.optimizer)
        self.intervention.begin(self.optimizer, self.monitor)
        self.batches = torch.Generator().manual_seed(run.seed)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.energy: list[list[float]] = []
        self.alignment: list[list[float]] = []
        self.error: str | None = None

    @staticmethod
    def weight(module: nn.Module) -> Tensor:
        """The weight that the layer uses."""
        return module.weight  # pyright: ignore[reportReturnType]

    def train(self, progress: Progress, checkpoint: Path | None) -> None:
        """From wherever it stands to the end, or to the first number that is not finite."""
        due = set(validation_steps(self.config.steps, self.config.evaluations))
        saved = time.monotonic()
        if self.step == 0:
            self.evaluate()
        while self.step < self.config.steps and self.error is None:
            started = time.perf_counter()
            self.update()
            self.seconds += time.perf_counter() - started
            progress(self.step, self.losses[-1])
            if self.step in due and self.error is None:
                self.evaluate()
                if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_EVERY:
                    comoving.save(checkpoint, self.state())
                    saved = time.monotonic()
        self.monitor.close()

    def update(self) -> None:
        """One step of training."""
        if self.step == self.config.split:
            self.guarded(lambda: self.intervention.split(self.step))
        if self.error is not None:
            self.losses.append(math.nan)
            return
        for group in self.optimizer.param_groups:
            factor = rate_factor(self.step, self.config.steps, round(self.config.warmup * self.config.steps))
            group["lr"] = group["initial_lr"] * factor
        inputs, expected = self.task.batch(self.config.batch, self.batches)
        loss = self.task.loss(self.model, (inputs.to(self.run.device), expected.to(self.run.device)))
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            self.fail(f"training loss became {self.losses[-1]}")
            return
        self.optimizer.zero_grad()
        loss.backward()
        reading = self.step % self.config.spec_every == 0
        if reading:
            energy = self.intervention.energy()
            if energy is not None and not math.isfinite(energy):
                self.fail(f"the energy of the gradient became {energy}")
                return
            self.note(self.energy, energy)
            self.note(self.alignment, self.intervention.alignment())
        self.guarded(self.optimizer.step)
        self.step += 1
        if reading and self.error is None:
            self.intervention.read(self.step)

    def guarded(self, act: Callable[[], Any]) -> None:
        """Do something that refuses numbers that are not finite, and keep its words if it does."""
        try:
            act()
        except ValueError as error:
            self.fail(str(error))

    def fail(self, reason: str) -> None:
        """The run has diverged; what was measured so far is kept."""
        phase = "before the split" if self.step < self.config.split else "after the split"
        self.error = f"{reason} at step {self.step + 1} ({phase})"

    def note(self, values: list[list[float]], value: float | None) -> None:
        """Add a value at the present step, if there is any."""
        if value is not None:
            values.append([self.step, value])

    def measured(self, part: str) -> dict[str, float]:
        """Metric and loss on held-out data."""
        self.model.eval()
        with torch.no_grad():
            point = self.task.evaluate(self.model, part)
        self.model.train()
        return point

    def evaluate(self) -> None:
        """Look at the validation data."""
        point = self.measured("validation")
        self.curve.append({"step": self.step, "seconds": self.seconds, **point})
        if not math.isfinite(point["value"]) or not math.isfinite(point["loss"]):
            self.fail(f"validation became {point['value']}, its loss {point['loss']},")

    def record(self) -> Record:
        """What is known in the end; the model is folded into plain weights before it is tested."""
        self.intervention.end()
        test = self.measured("test") if self.error is None else None
        return {
            "status": "finished" if self.error is None else "diverged",
            **({} if self.error is None else {"error": self.error}),
            "seed": self.run.seed,
            "rate": self.run.rate,
            "curve": self.curve,
            "losses": self.losses,
            "spikes": spikes(self.losses),
            "final": None if test is None else test["value"],
            "final_loss": None if test is None else test["loss"],
            "seconds": self.seconds,
            "shapes": self.shapes,
            "spectra": self.recorder.values,
            "energy": self.energy,
            "alignment": self.alignment,
            "notes": self.intervention.notes,
        }

    MEASURED = ("step", "seconds", "losses", "curve", "energy", "alignment")
    STATE = ("model", "optimizer", "monitor", "intervention", "batches", "spectra", *MEASURED)

    def state(self) -> Record:
        """Everything a run needs to go on, for ``weights_only=True``."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "monitor": self.monitor.state_dict(),
            "intervention": self.intervention.state_dict(),
            "batches": self.batches.get_state(),
            "spectra": self.recorder.values,
            **{name: getattr(self, name) for name in self.MEASURED},
        }

    def load(self, found: Record) -> None:
        """Go on from :meth:`state`."""
        self.intervention.resume(found["step"] > self.config.split, found["intervention"])
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.monitor.load_state_dict(found["monitor"])
        self.batches.set_state(found["batches"].cpu())
        self.recorder.values = found["spectra"]
        for name in self.MEASURED:
            setattr(self, name, found[name])


def stored(file: Path, device: str = "cpu") -> Record | None:
    """The checkpoint in a file; None where there is none. A damaged one is named in the log, and removed.

    Raises:
        OSError: the file cannot be read or removed.
    """
    if not file.exists():
        return None
    with explained(file):
        raw = BytesIO(file.read_bytes())  # so that no error of the disk passes for damage
    try:
        # torch does not look at the sums of tensors' bytes.
        if zipfile.ZipFile(raw).testzip() is not None:
            raise ValueError("its bytes do not add up")
        raw.seek(0)
        found = torch.load(raw, map_location=device, weights_only=True)
        lacking = [name for name in Trial.STATE if name not in found]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # zipfile, zlib and torch's reader have no common class for bytes of any kind
        said = (str(error) or type(error).__name__).splitlines()[0]
        LOG.warning("%s is damaged (%s); the run begins anew", file, said)
        with explained(file):
            file.unlink()
        return None
    return found
