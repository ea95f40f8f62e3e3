"""The race: which runs are due, running them in processes of their own, keeping what is done."""

import math
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from comoving.files import write_json
from comoving.race import contenders, host, records, sources
from comoving.race.contenders import Contender
from comoving.race.processes import Processes
from comoving.race.records import cases, having, integer, listed, maybe, number, text
from comoving.race.runner import looks
from comoving.race.settings import RaceSettings, RunSettings, SettingsError, kept
from comoving.race.tuning import Tuning

Record = dict[str, Any]
Runner = Callable[[RunSettings, Path, Callable[[int, float], None]], Record]

_NUMBERS = ("final", "seconds", "step_seconds", "optimizer_seconds", "worst_step_ratio")
_BYTES = ("peak_memory", "state", "state_projected", "parameters", "parameters_projected")
_LOOK = having({"step": integer, "seconds": number, "value": number})
FINISHED = {
    **dict.fromkeys(_NUMBERS, number),
    **dict.fromkeys(_BYTES, integer),
    **dict.fromkeys(("final_loss", "refresh_share"), maybe(number)),
    "spikes": listed(integer),
}
"""What the file of a finished run holds, beside its curves."""
ENDED = ("diverged", "refused", "failed")


class Watcher(Protocol):
    """Who is told how the race goes; calls come from several threads."""

    def total(self, runs: int, reused: int) -> None:
        """``runs`` runs are known of by now, ``reused`` of them were found finished."""

    def started(self, run: RunSettings) -> None:
        """A run begins."""

    def progress(self, run: RunSettings, step: int, loss: float) -> None:
        """A run has finished ``step`` steps."""

    def ended(self, run: RunSettings, record: Record) -> None:
        """A run is over."""

    def say(self, line: str) -> None:
        """Something worth one line."""


class Silence:
    """A watcher that watches nothing."""

    def total(self, runs: int, reused: int) -> None:
        """Ignore it."""

    def started(self, run: RunSettings) -> None:
        """Ignore it."""

    def progress(self, run: RunSettings, step: int, loss: float) -> None:
        """Ignore it."""

    def ended(self, run: RunSettings, record: Record) -> None:
        """Ignore it."""

    def say(self, line: str) -> None:
        """Ignore it."""


@dataclass
class Entry:
    """A contender's part of the race: its rates, and its records by (rate, seed).

    A tuned one has its best rate alone, the ratio that belongs to it, and all its ``trials``.
    """

    contender: Contender
    rates: list[float]
    records: dict[tuple[float, int], Record] = field(default_factory=dict[tuple[float, int], Record])
    extended: float | None = None
    still_at_edge: bool = False
    ratio: float = 1.0
    trials: list[Record] = field(default_factory=list[Record])

    def refusal(self) -> str | None:
        """Why the contender cannot take part, if it cannot."""
        return next((r["error"] for r in self.records.values() if r["status"] == "refused"), None)

    def finals(self, rate: float) -> list[float]:
        """Final validation of every finished seed at ``rate``; empty unless all of them finished."""
        records = [record for (at, _), record in self.records.items() if at == rate]
        finished = [r["final"] for r in records if r["status"] == "finished"]
        return finished if len(finished) == len(records) else []

    def best(self) -> float | None:
        """The rate with the lowest mean final validation among those at which every seed finished."""
        means = {rate: statistics.fmean(values) for rate in self.rates if (values := self.finals(rate))}
        return min(means, key=lambda rate: means[rate]) if means else None


def beyond(rates: list[float], best: float) -> float | None:
    """One more rate outside the list if ``best`` is at its edge, by the geometric step found there; else None."""
    ordered = sorted(rates)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    inner = ordered[1] if best == ordered[0] else ordered[-2]
    return float(f"{best * best / inner:.6g}")


def file_of(run: RunSettings, out: Path) -> Path:
    """Where the record of a run is kept: readable, and unique by the key of its settings."""
    name = "".join(c if c.isalnum() or c in "-+." else "_" for c in run.contender)[:60]
    return out / "runs" / f"{name}-{run.rate:g}-seed{run.seed}-{run.key}.json"


def shape_of(run: RunSettings) -> records.Check:
    """What the file of a run may hold."""
    curves = {
        "losses": listed(number, run.length),
        "validation": listed(_LOOK, len(looks(run))),
    }
    ended = having({"error": text})
    return cases("status", {"finished": having({**FINISHED, **curves}), **dict.fromkeys(ENDED, ended)})


def code_fingerprint(contender: Contender, settings: RaceSettings) -> str:
    """Digest of everything of ours that a run's outcome depends on: the task's code, and what steps the contender."""
    task = sources.digest(sources.of_task(settings.info.file))
    return f"{task}{settings.info.forward},{contender.code(wrapped=bool(settings.wrapping))}"


class Race:
    """All runs of a race.

    Args:
        settings: what is asked for.
        watcher: is told how it goes.
        runner: trains one run and returns its record; a process for each by default.
        data: digest of the task's data; found by loading them (and so making them, once, before anybody trains).

    Raises:
        SettingsError: for a contender nobody knows, or data that cannot be loaded.
    """

    def __init__(
        self,
        settings: RaceSettings,
        watcher: Watcher | None = None,
        runner: Runner | None = None,
        data: str | None = None,
    ) -> None:
        self.settings = settings
        self.watcher = watcher or Silence()
        self.processes = Processes("comoving.race.worker")
        self.runner = runner or self.in_a_process
        self.entries = [self.entry(contenders.parse(label)) for label in settings.optimizers]
        if data is None:
            try:
                data = settings.info.load(text=settings.text).fingerprint()
            except (ImportError, ValueError, OSError) as error:
                raise SettingsError(str(error)) from error
        self.fingerprints = {
            entry.contender.label: f"{data[:16]}-{code_fingerprint(entry.contender, settings)}"
            for entry in self.entries
        }
        self.known = self.reused = 0
        self.tuning = Tuning(self) if settings.tune else None

    def entry(self, contender: Contender) -> Entry:
        """The rates as given, else the contender's own: measured on this task, or the task's times its factor."""
        info = self.settings.info
        usual = info.rates.get(contender.name, info.rate * contender.relative_rate)
        default = float(f"{info.rates.get(contender.label, usual):.6g}")
        return Entry(contender, list(self.settings.rates) or [default])

    def due(self, rates: Callable[[Entry], Iterable[float]]) -> list[tuple[Entry, RunSettings]]:
        """Runs of all entries at some rates; seeds outermost, so that an interrupted race has compared everybody."""
        return [
            (entry, self.settings.run(entry.contender.label, rate, seed, self.fingerprints[entry.contender.label]))
            for seed in range(self.settings.seeds)
            for entry in self.entries
            for rate in rates(entry)
        ]

    def run(self) -> list[Entry]:
        """Run what is not done yet, extend sweeps whose best rate is at the edge, and return everybody's records.

        KeyboardInterrupt ends the processes and goes on to the caller; finished runs are on disk by then.
        """
        if self.tuning is not None:
            return self.tuning.run()
        self.run_all(self.due(lambda entry: entry.rates))
        for entry in self.entries:
            best = entry.best()
            entry.extended = None if best is None else beyond(entry.rates, best)
            if entry.extended is not None:
                self.watcher.say(
                    f"{entry.contender.label}: best rate {best:g} is at the edge; {entry.extended:g} is added"
                )
                entry.rates = sorted([*entry.rates, entry.extended])
        self.run_all(self.due(lambda entry: [] if entry.extended is None else [entry.extended]))
        for entry in self.entries:
            best = entry.best()
            entry.still_at_edge = best is not None and beyond(entry.rates, best) is not None
        return self.entries

    def run_all(self, runs: list[tuple[Entry, RunSettings]]) -> None:
        """Run or reuse every one of ``runs``, at most ``jobs`` at a time."""
        missing: list[tuple[Entry, RunSettings]] = []
        for entry, run in runs:
            record = self.finished(run)
            if record is None:
                missing.append((entry, run))
            else:
                entry.records[run.rate, run.seed] = record
        self.known += len(runs)
        self.reused += len(runs) - len(missing)
        self.watcher.total(self.known, self.reused)
        pool = ThreadPoolExecutor(self.settings.jobs)
        try:
            for future in as_completed([pool.submit(self.one, entry, run) for entry, run in missing]):
                future.result()
        except BaseException:
            self.processes.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def finished(self, run: RunSettings) -> Record | None:
        """The record of this very run from an earlier start; what failed (out of memory, killed) is tried again.

        So is a run whose file is damaged, which is said.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            record = records.read(file_of(run, self.settings.out), shape_of(run))
        except FileNotFoundError:
            return None
        except records.Misshapen as error:
            self.watcher.say(f"{error}; the run is made anew")
            return None
        return None if record["status"] == "failed" else record

    def forget(self, run: RunSettings) -> None:
        """Remove what a run that ended early has left for a longer one."""
        kept(run, file_of(run, self.settings.out).parent).unlink(missing_ok=True)

    def in_a_process(self, run: RunSettings, file: Path, progress: Callable[[int, float], None]) -> Record:
        """The usual runner."""
        return self.processes(asdict(run), file, progress)

    def one(self, entry: Entry, run: RunSettings) -> None:
        """Run one; a contender that has refused the model is not asked again."""
        reason = entry.refusal()
        if reason is not None:
            record: Record = {"status": "refused", "error": reason}
        else:
            self.watcher.started(run)
            record = self.runner(
                run, file_of(run, self.settings.out), lambda step, loss: self.watcher.progress(run, step, loss)
            )
        entry.records[run.rate, run.seed] = record
        self.watcher.ended(run, record)


def reach(record: Record, target: float, counted_per_step: int) -> dict[str, float] | None:
    """Steps, tokens or samples, and seconds of training up to the first validation at or below ``target``."""
    for point in record.get("validation", ()):
        if point["value"] is not None and point["value"] <= target:
            return {"steps": point["step"], "counted": point["step"] * counted_per_step, "seconds": point["seconds"]}
    return None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def summarize(entry: Entry, settings: RaceSettings, counted_per_step: int) -> Record:
    """A contender's line of the table, at its best rate; JSON-ready.

    Times are medians over steps and means over seeds, the worst step is the worst of all seeds, spikes are per run.
    """
    best = entry.best()
    problems = sorted(
        {f"{r['status']} at {rate:g}: {r['error']}" for (rate, _), r in entry.records.items() if "error" in r}
    )
    line: Record = {
        "contender": entry.contender.label,
        "note": entry.contender.note,
        "rates": entry.rates,
        "ratio": entry.ratio,
        "extended": entry.extended,
        "still_at_edge": entry.still_at_edge,
        "problems": problems,
    }
    refusal = entry.refusal()
    if refusal is not None:
        return {**line, "status": "refused", "problems": [refusal]}
    if best is None:
        return {**line, "status": "failed"}
    records = [entry.records[best, seed] for seed in range(settings.seeds)]
    finals = entry.finals(best)
    reached = [None if settings.target is None else reach(r, settings.target, counted_per_step) for r in records]
    everybody = all(r is not None for r in reached)
    return {
        **line,
        "status": "finished",
        "rate": best,
        "mean": statistics.fmean(finals),
        "deviation": statistics.stdev(finals) if len(finals) > 1 else None,
        "mean_loss": mean(r["final_loss"] for r in records),
        **{k: records[0][k] for k in ("state", "state_projected", "parameters", "parameters_projected")},
        **{k: records[0].get(k) for k in ("compressed", "sent") if settings.wrapping},
        "peak_memory": max(r["peak_memory"] for r in records),
        "optimizer_seconds": mean(r["optimizer_seconds"] for r in records),
        "step_seconds": mean(r["step_seconds"] for r in records),
        "worst_step_ratio": max(r["worst_step_ratio"] for r in records),
        "refresh_share": mean(r["refresh_share"] for r in records),
        "spikes": statistics.fmean(len(r["spikes"]) for r in records),
        "target": {k: mean(r[k] for r in reached if r) for k in ("steps", "counted", "seconds")} if everybody else None,
        "reached": sum(r is not None for r in reached),
    }


def against_adamw(lines: list[Record]) -> None:
    """Add state relative to AdamW's: measured if one raced, else two moments in the parameters' dtype."""
    finished = {line["contender"]: line for line in lines if line["status"] == "finished"}
    reference = finished.get("adamw") or finished.get("torch-adamw")
    for line in finished.values():
        for part in ("", "_projected"):
            theirs = reference["state" + part] if reference else 2 * line["parameters" + part]
            line[f"state{part}_over_adamw"] = line["state" + part] / theirs if theirs else None
            own = line["parameters" + part]
            line[f"state{part}_over_parameters"] = line["state" + part] / own if own else None


def versions(entries: list[Entry]) -> dict[str, str]:
    """Versions of everything that takes part."""
    taking_part = {p for e in entries if e.contender.foreign for p in e.contender.foreign.packages}
    return host.versions({"neuraloperator", *taking_part})


def results(race: Race, command: str) -> Record:
    """Everything about a race that has ended: what ``results.json`` holds."""
    settings, info = race.settings, race.settings.info
    first = settings.run("", 1.0, 0, "")  # with every default filled in
    lines = [summarize(entry, settings, info.per_sample * first.batch) for entry in race.entries]
    against_adamw(lines)
    lines.sort(key=lambda line: line.get("mean", math.inf))
    return {
        "command": command,
        "versions": versions(race.entries),
        "machine": host.machine(settings.device, settings.jobs),
        "task": asdict(info),
        "settings": {
            **asdict(settings),
            "out": str(settings.out),
            **{k: getattr(first, k) for k in ("batch", "warmup", "weight_decay", "validations")},
        },
        "summary": lines,
        **({} if race.tuning is None else {"tuning": race.tuning.facts()}),
        "runs": [
            {"contender": entry.contender.label, "rate": rate, "seed": seed, **record}
            for entry in race.entries
            for (rate, seed), record in sorted(entry.records.items())
        ],
    }


def save(found: Record, out: Path) -> Path:
    """Write ``results.json``."""
    write_json(out / "results.json", found)
    return out / "results.json"
