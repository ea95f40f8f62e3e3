"""A study's runs: equally many rates for every arm on seed 0, the best one on all seeds, and what follows from that."""

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

import comoving
from comoving.directions.targets import matrix_of, targets
from comoving.files import finite, refused, write_text
from comoving.lab import tasks
from comoving.lab.config import Config
from comoving.lab.records import RESULTS, RUN
from comoving.lab.studies import BASELINE, Arm, Study
from comoving.lab.train import LabRun
from comoving.lab.verdicts import follow_up
from comoving.race import host, records
from comoving.race.contenders import digest
from comoving.race.processes import Processes
from comoving.race.settings import SettingsError, check_device

Record = dict[str, Any]
Runner = Callable[[LabRun, Path, Callable[[int, float], None]], Record]

REUSED = ("finished", "diverged")
LATE = ("global", "gain", "extract")
"""What begins at the split."""
LAB = ("tasks.py", "train.py", "interventions.py")
RACE = ("runner.py", "tasks/lm.py", "tasks/vit.py")


class Watcher(Protocol):
    """Who is told how it goes; calls come from several threads."""

    def total(self, runs: int, reused: int) -> None:
        """``runs`` runs are known of by now, ``reused`` of them were found finished."""

    def started(self, name: str, steps: int) -> None:
        """A run begins."""

    def progress(self, name: str, step: int, loss: float) -> None:
        """A run has finished ``step`` steps."""

    def ended(self, name: str, record: Record) -> None:
        """A run is over."""

    def say(self, line: str) -> None:
        """Something worth one line."""


@dataclass
class Entry:
    """An arm and its records by (rate, seed)."""

    arm: Arm
    records: dict[tuple[float, int], Record] = field(default_factory=dict[tuple[float, int], Record])

    def validation(self, rate: float) -> float | None:
        """Seed 0's last value on the validation data, None unless it finished."""
        record = self.records.get((rate, 0), {})
        return record["curve"][-1]["value"] if record.get("status") == "finished" else None

    def best(self, goal: str) -> float | None:
        """The rate with the best validation of seed 0; None where every one diverged."""
        found = {rate: v for rate, seed in self.records if seed == 0 and (v := self.validation(rate)) is not None}
        if not found:
            return None
        return (max if goal == "max" else min)(found, key=lambda rate: found[rate])


class Campaign:
    """All runs of one study on one configuration.

    Args:
        study, config: what is asked.
        seeds: how many, from 0.
        out: folder of the results; a campaign that was interrupted goes on from what is there.
        watcher: is told how it goes.
        jobs: runs at once, each in a process with one thread.
        device: of the models.
        log: sinks for the spectra: "wandb" -> project, "jsonl" and "tensorboard" -> folder.
        runner: trains one run; a process for each by default.

    Raises:
        SettingsError: for numbers out of range, or data that cannot be loaded; nothing has run by then.
    """

    def __init__(
        self,
        study: Study,
        config: Config,
        seeds: int,
        out: Path,
        watcher: Watcher,
        jobs: int = 1,
        device: str = "cpu",
        log: Mapping[str, str] | None = None,
        runner: Runner | None = None,
    ) -> None:
        for name, value in (("seeds", seeds), ("jobs", jobs)):
            if value < 1:
                raise SettingsError(f"{name} is {value}; it must be at least 1")
        check_device(device)
        self.study, self.config, self.seeds, self.out, self.watcher = study, config, seeds, out, watcher
        self.jobs, self.device, self.log = jobs, device, dict(log or {})
        self.processes = Processes("comoving.lab.worker")
        self.runner = runner or self.in_a_process
        self.rates = [float(f"{config.rate * factor:.4g}") for factor in config.rates]
        self.entries = [Entry(arm) for arm in study.arms(config)]
        self.configs: dict[str | None, Config] = {None: config}
        self.fingerprints: dict[str | None, str] = {}
        self.fingerprints[None], self.shapes = examined(config)
        for _, arms in study.followups(config):
            for arm in arms:  # missed here rather than after all other arms
                self.setting(arm, self.rates[0], 0)
        self.followups: list[str] = []
        self.known = self.reused = 0

    def run(self, command: str) -> Record:
        """Run what is not done yet; the results are on disk all along, and returned.

        KeyboardInterrupt ends the processes and goes on to the caller.
        """
        try:
            self.compare(self.entries, command)
            if self.study.followups(self.config) and follow_up(self.results(command)):
                for what, arms in self.study.followups(self.config):
                    self.watcher.say(f"studies 1 and 2 coincide; follow-up: {what}")
                    self.followups.append(what)
                    entries = [Entry(arm) for arm in arms]
                    self.entries += entries
                    self.compare(entries, command)
        finally:
            self.save(command)
        return self.results(command)

    def compare(self, entries: list[Entry], command: str) -> None:
        """Every arm at every rate on seed 0, then at its best rate on the other seeds."""
        self.run_all([(entry, self.setting(entry.arm, rate, 0)) for entry in entries for rate in self.rates], command)
        best = {id(entry): entry.best(self.config.metric["goal"]) for entry in entries}
        for entry in entries:
            if best[id(entry)] is None:
                self.watcher.say(f"{entry.arm.name}: diverged at every rate; no further seeds are run")
        runs = [
            (entry, self.setting(entry.arm, rate, seed))
            for seed in range(1, self.seeds)
            for entry in entries
            if (rate := best[id(entry)]) is not None
        ]
        self.run_all(runs, command)

    def setting(self, arm: Arm, rate: float, seed: int) -> LabRun:
        """The run of an arm; a harder task is loaded when it is first needed."""
        if arm.task not in self.configs:
            self.configs[arm.task] = self.config.harder_task()
            self.fingerprints[arm.task], _ = examined(self.configs[arm.task])
        return LabRun(
            self.configs[arm.task], arm, rate, seed, self.device, self.fingerprints[arm.task], self.log
        )  # fmt: skip

    def run_all(self, runs: list[tuple[Entry, LabRun]], command: str) -> None:
        """Run or reuse every one of ``runs``, at most ``jobs`` at a time."""
        missing: list[tuple[Entry, LabRun]] = []
        for entry, run in runs:
            record = finished(file_of(run, self.out), self.watcher.say)
            if record is None:
                missing.append((entry, run))
            else:
                entry.records[run.rate, run.seed] = record
        self.known += len(runs)
        self.reused += len(runs) - len(missing)
        self.watcher.total(self.known, self.reused)
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for future in as_completed([pool.submit(self.one, entry, run) for entry, run in missing]):
                future.result()
                self.save(command)
        except BaseException:
            self.processes.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def one(self, entry: Entry, run: LabRun) -> None:
        """Run one.

        Raises:
            SettingsError: if the run fails by a fault rather than by its numbers; others would fail like it.
        """
        name = f"{run.arm.name} lr {run.rate:g} seed {run.seed}"
        self.watcher.started(name, run.config.steps)
        record = self.runner(run, file_of(run, self.out), lambda step, loss: self.watcher.progress(name, step, loss))
        self.watcher.ended(name, record)
        if record["status"] not in REUSED:
            raise SettingsError(f"{name} failed: {record['error']}")
        entry.records[run.rate, run.seed] = record

    def in_a_process(self, run: LabRun, file: Path, progress: Callable[[int, float], None]) -> Record:
        """The usual runner."""
        return self.processes(run.plain(), file, progress)

    def results(self, command: str) -> Record:
        """Everything about the study so far: what its report is made of."""
        return {
            "study": self.study.name,
            "title": f"{self.study.title}: {self.config.title}",
            "question": self.study.question,
            "command": command,
            "config": self.config.plain(),
            "metric": self.config.metric,
            "seeds": self.seeds,
            "shapes": self.shapes,
            "topk": self.config.topk,
            "arms": [self.line(entry) for entry in self.entries],
            "followups": self.followups,
            "machine": host.machine(self.device, self.jobs),
            "versions": host.versions(("datasets",)),
        }

    def line(self, entry: Entry) -> Record:
        """One arm."""
        rate = entry.best(self.config.metric["goal"])
        tried = sorted({rate for rate, seed in entry.records if seed == 0})
        return {
            **entry.arm.plain(),
            "begin": self.config.split if entry.arm.action in LATE else None,
            "rates": {f"{rate:g}": entry.validation(rate) for rate in tried},
            "rate": rate,
            "runs": [
                condensed(entry.records[rate, s], entry.arm.role == BASELINE)
                for s in range(self.seeds)
                if rate is not None and (rate, s) in entry.records
            ],
        }

    def save(self, command: str) -> Path:
        """Write the results."""
        file = self.out / f"results-{self.study.name}-{self.config.name}.json"
        write_text(file, json.dumps(finite(self.results(command)), separators=(",", ":"), allow_nan=False) + "\n")
        return file


COMPARED = ("sigma_max", "cos_u_mean", "cos_v_mean", "p", "p_weight")


def condensed(record: Record, everything: bool) -> Record:
    """A record as a study's results hold it, without what neither verdicts nor pictures need; the run's file has it.

    Of the spectra, in four digits: every weight's sigma_max; with ``everything`` the other figures that verdicts
    compare, of gradients, momenta and updates too, and in seed 0 all singular values of the first and the last layer.
    """
    layers = list(record["shapes"])
    ends = (layers[0], layers[-1]) if everything and record["seed"] == 0 else ()
    kept = {f"spec/{name}/sigma_max" for name in layers} | {
        f"spec/{name}/sv{i}" for name in ends for i in range(1, 100)
    }
    spectra = {
        name: [[step, shortened(value, 4)] for step, value in values]
        for name, values in record["spectra"].items()
        if name in kept or (everything and name.rpartition("/")[2] in COMPARED)
    }
    losses = [shortened(loss, 5) for loss in record["losses"]]
    return {k: v for k, v in record.items() if k != "settings"} | {"spectra": spectra, "losses": losses}


def shortened(value: float | None, digits: int) -> float | None:
    """So many significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")


def examined(config: Config) -> tuple[str, dict[str, list[int]]]:
    """Digest of the data of a configuration and of the code that trains on them; and the shapes of the target layers.

    Raises:
        SettingsError: data that cannot be loaded; patterns that find no matrices, or some of too low a rank.
    """
    task = tasks.load(config)
    with torch.random.fork_rng(devices=[]):
        model = task.model()
    try:
        shapes = {name: list(matrix_of(module).shape) for name, module in targets(model, config.targets).items()}
    except ValueError as error:
        raise SettingsError(f"{config.name}: {error}") from error
    for field_name, value in (("spec_topk", config.spec_topk), *(("ranks", rank) for rank in config.ranks)):
        small = next((name for name, shape in shapes.items() if min(shape) < value), None)
        if small is not None:
            limit = min(shapes[small])
            raise SettingsError(
                f"{config.name}: {field_name} is {value}; it must lie in [1, {limit}], the rank of {small}"
            )
    here, package = Path(__file__).parent, Path(comoving.__file__).parent
    code = [*(here / name for name in LAB), *(package / "race" / name for name in RACE)]
    code += sorted((package / "directions").rglob("*.py"))
    return f"{task.fingerprint()[:16]}-{digest(code)}-{torch.__version__}", shapes


def file_of(run: LabRun, out: Path) -> Path:
    """Where the record of a run is kept: readable, and unique by everything that decides its outcome."""
    decisive = {k: v for k, v in run.plain().items() if k != "log"}
    decisive["arm"] = {k: v for k, v in decisive["arm"].items() if k not in ("name", "role", "summary")}
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    return out / "runs" / f"{run.config.name}-{run.arm.name}-{run.rate:g}-seed{run.seed}-{key}.json"


def finished(file: Path, say: Callable[[str], None]) -> Record | None:
    """The record of this very run from an earlier start; one whose file is damaged is run again, which is said.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        return records.read(file, RUN)
    except FileNotFoundError:
        return None
    except records.Misshapen as error:
        say(f"{error}; the run is made anew")
        return None


def found(folder: Path) -> list[Record]:
    """The results of all studies in a folder.

    Raises:
        SettingsError: none is there, or one is damaged.
        OSError: ``folder`` is a file, or one in it cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise refused(errno.ENOTDIR, folder, "give the folder that comoving lab run had as --out")
    files: Iterable[Path] = sorted(folder.glob("results-*.json"))
    try:
        results = [records.read(file, RESULTS) for file in files]
    except records.Misshapen as error:
        raise SettingsError(
            f"{error}; comoving lab run with the same --out writes it anew from the finished runs, or remove it"
        ) from error
    if not results:
        raise SettingsError(f"{folder} holds no results; run a study first: comoving lab run STUDY --out {folder}")
    return results
