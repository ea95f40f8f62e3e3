"""What the user asked for: one frozen, checked record for the race and one for each run of it."""

import ast
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from comoving.race.tasks import TASKS, TaskInfo

Rank = int | float | tuple[int | None, ...]
WRAPPINGS = ("", "ddp", "fsdp")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class SettingsError(ValueError):
    """A request that cannot be met; the message is one line and says what is allowed."""


@dataclass(frozen=True)
class RunSettings:
    """One training: everything that decides its outcome, and nothing else.

    Two runs with equal settings give equal curves on one machine: :attr:`key` names the file a finished run is in.

    Args:
        task, contender: names; ``contender`` with its overrides.
        rate: peak learning rate.
        seed: of the initialization and of the batches.
        steps, warmup: training steps in all, and those of the linear warm-up.
        rank: handed to the contender.
        batch: samples per step.
        weight_decay: decoupled, the same for all contenders.
        dtype, device: of the parameters.
        text: corpus of a task on text ("" = CPython's standard library).
        validations: how many times the held-out set is looked at, the last time at the end.
        fingerprint: of the task's data and of the code that trains.
        wrapping, ranks, compress: as in :class:`RaceSettings`.
        ratio: rate of all but the hidden weights over ``rate``.
        until: it ends after so many of the steps, on the schedule of all of them; 0 for all.
    """

    task: str
    contender: str
    rate: float
    seed: int
    steps: int
    warmup: int
    rank: Rank
    batch: int
    weight_decay: float
    dtype: str
    device: str
    text: str
    validations: int
    fingerprint: str
    wrapping: str = ""
    ranks: int = 1
    compress: bool = False
    ratio: float = 1.0
    until: int = 0

    @property
    def length(self) -> int:
        """Steps that it takes."""
        return self.until or self.steps

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def kept(run: RunSettings, folder: Path) -> Path:
    """The file that a run which ends early leaves, and one with the same settings that ends later goes on from."""
    return folder / f"{replace(run, until=0).key}.pt"


@dataclass(frozen=True)
class RaceSettings:
    """A whole race. Empty or None means: the task's or the contender's own default.

    Args:
        wrapping: "ddp" or "fsdp", how the processes that train each run share its model; "" for one process.
        ranks: how many they are.
        compress: with "ddp", send cores of gradients instead of gradients.
        tune: candidates of (rate, ratio) for each contender, halved over ``rungs`` rungs; 0 for the rates as given.

    Raises:
        SettingsError: for a value outside its interval; nothing has run by then.
    """

    task: str
    optimizers: tuple[str, ...]
    steps: int
    seeds: int
    rates: tuple[float, ...]
    rank: Rank
    out: Path
    device: str = "cpu"
    dtype: str = "float32"
    target: float | None = None
    batch: int | None = None
    text: str = ""
    jobs: int = 1
    weight_decay: float | None = None
    warmup: int | None = None
    validations: int | None = None
    wrapping: str = ""
    ranks: int = 1
    compress: bool = False
    tune: int = 0
    rungs: int = 3

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise SettingsError(f"unknown task {self.task!r}; known: {', '.join(TASKS)}")
        if not self.optimizers:
            raise SettingsError("the list of optimizers is empty")
        for name in self.optimizers:
            if self.optimizers.count(name) > 1:
                raise SettingsError(f"optimizer {name!r} is listed twice")
        for name in ("steps", "seeds", "jobs", "validations", "batch", "rungs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}; it must be at least 1")
        if self.warmup is not None and not 0 <= self.warmup <= self.steps:
            raise SettingsError(f"warmup is {self.warmup}; it must lie in [0, {self.steps}], the number of steps")
        if self.weight_decay is not None and not 0 <= self.weight_decay < float("inf"):
            raise SettingsError(f"weight decay is {self.weight_decay}; it must be at least 0 and finite")
        check_tuning(self.tune, self.rates)
        check_rates(self.rates)
        check_rank(self.rank)
        if self.dtype not in DTYPES:
            raise SettingsError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.dtype not in self.info.dtypes:
            raise SettingsError(f"task {self.task} cannot run in {self.dtype}; it takes {', '.join(self.info.dtypes)}")
        if self.text and not self.info.reads_text:
            readers = ", ".join(name for name, info in TASKS.items() if info.reads_text)
            raise SettingsError(f"--text belongs to the tasks on text ({readers}), not to {self.task}")
        check_device(self.device)
        self._check_ranks()

    def _check_ranks(self) -> None:
        """Raise SettingsError unless the processes can share each run."""
        if self.wrapping not in WRAPPINGS:
            raise SettingsError(f"unknown wrapping {self.wrapping!r}; known: ddp, fsdp")
        if self.compress and self.wrapping != "ddp":
            raise SettingsError("--compress sends less of what --ddp sends: give both")
        if not self.wrapping:
            return
        if self.jobs > 1:
            raise SettingsError(
                f"jobs is {self.jobs}; with --{self.wrapping} all processes train each run together: leave it out"
            )
        if ":" in self.device:
            raise SettingsError(f"device is {self.device!r}; with --{self.wrapping} each process has one: give cuda")
        batch = self.info.batch if self.batch is None else self.batch
        if batch % self.ranks:
            raise SettingsError(
                f"a batch of {batch} samples cannot be split evenly over {self.ranks} processes: "
                f"give --batch {-(-batch // self.ranks) * self.ranks}"
            )

    @property
    def info(self) -> TaskInfo:
        """The task's facts and defaults."""
        return TASKS[self.task]

    def run(self, contender: str, rate: float, seed: int, fingerprint: str) -> RunSettings:
        """The settings of one run, with every default filled in."""
        return RunSettings(
            task=self.task,
            contender=contender,
            rate=rate,
            seed=seed,
            steps=self.steps,
            warmup=int(self.steps * self.info.warmup) if self.warmup is None else self.warmup,
            rank=self.rank,
            batch=self.info.batch if self.batch is None else self.batch,
            weight_decay=self.info.weight_decay if self.weight_decay is None else self.weight_decay,
            dtype=self.dtype,
            device=self.device,
            text=self.text,
            validations=self.info.validations if self.validations is None else self.validations,
            fingerprint=fingerprint,
            wrapping=self.wrapping,
            ranks=self.ranks,
            compress=self.compress,
        )


def check_tuning(trials: int, rates: tuple[float, ...]) -> None:
    """Raise SettingsError unless ``trials`` counts candidates, and the rates are left to them."""
    if trials < 0:
        raise SettingsError(f"tune is {trials}; it is a number of candidates, 0 for none")
    if trials and rates:
        raise SettingsError("--tune chooses the rates, around each contender's default: leave --lr out")


def check_rates(rates: tuple[float, ...]) -> None:
    """Raise SettingsError unless all ``rates`` are positive, finite and different."""
    for rate in rates:
        if not 0 < rate < float("inf"):
            raise SettingsError(f"learning rate is {rate}; it must be positive and finite")
    if len(set(rates)) < len(rates):
        raise SettingsError("a learning rate is listed twice")


def check_rank(rank: Rank) -> None:
    """Raise SettingsError unless ``rank`` is a positive int, in (0, 1], or a tuple of positive ints and None."""
    entries = rank if isinstance(rank, tuple) else (rank,)
    for entry in entries:
        if isinstance(entry, float) and not isinstance(rank, tuple):
            if not 0 < entry <= 1:
                raise SettingsError(f"rank is {entry}; as a fraction it must lie in (0, 1]")
        elif entry is None and isinstance(rank, tuple):
            continue
        elif isinstance(entry, bool) or not isinstance(entry, int) or entry < 1:
            raise SettingsError(f"rank has {entry!r}; directions are counted by ints of at least 1")
    if not entries:
        raise SettingsError("rank is an empty tuple")


def check_device(name: str) -> None:
    """Raise SettingsError unless torch can use the device ``name``."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def literal(text: str) -> Any:
    """A Python literal if ``text`` is one, else the text itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def parse_rank(text: str) -> Rank:
    """Read a rank: ``64``, ``0.1``, or ``8,8,4,None`` for one entry per mode."""
    value = literal(text)
    rank = tuple(value) if isinstance(value, list) else value
    if not isinstance(rank, int | float | tuple) or isinstance(rank, bool):
        raise SettingsError(f"rank is {text!r}; give an int, a fraction in (0, 1], or one int per mode: 8,8,4,None")
    return rank


def parse_names(text: str) -> tuple[str, ...]:
    """Split a list at its commas, except those inside brackets or quotes of an override."""
    names: list[str] = []
    depth, quote, start = 0, "", 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            names.append(text[start:i])
            start = i + 1
    names.append(text[start:])
    return tuple(name.strip() for name in names if name.strip())


def parse_rates(text: str) -> tuple[float, ...]:
    """Read numbers separated by commas, sorted; none if there are none."""
    try:
        return tuple(sorted(float(rate) for rate in text.split(",") if rate.strip()))
    except ValueError as error:
        raise SettingsError(f"learning rates are {text!r}; give numbers separated by commas") from error
