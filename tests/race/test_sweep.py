"""The race as a whole: sweep, extension, resuming, failures, summary, report."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import cache

import pytest

from comoving.files import write_json
from comoving.race import report, sweep
from comoving.race.command import blocks
from comoving.race.runner import train
from comoving.race.sweep import Race, beyond, reach, results, save
from comoving.race.table import remarks, size
from race.small import Small, settings


@cache
def trained(run):
    """The record of a run of :class:`Small`, which takes far longer than all that is tested here."""
    return json.dumps(train(run, Small(), lambda step, loss: None))


class InProcess:
    """Trains :class:`Small` here, and counts."""

    def __init__(self, interrupt_at=None, final=None):
        self.runs = []
        self.interrupt_at = interrupt_at
        self.final = final

    def __call__(self, run, file, progress):
        if len(self.runs) == self.interrupt_at:
            raise KeyboardInterrupt
        self.runs.append(run)
        record = json.loads(trained(run))
        if self.final is not None:
            record["final"] = self.final(run)
        write_json(file, {"settings": asdict(run), **record})
        return record


def race_of(made, runner):
    return Race(made, runner=runner, data="small")


def test_interrupted_race_resumes(tmp_path):
    made = settings(tmp_path, optimizers=("torch-adamw", "torch-muon"), seeds=2)
    first = InProcess(interrupt_at=3)
    with pytest.raises(KeyboardInterrupt):
        race_of(made, first).run()
    assert len(first.runs) == 3
    second = InProcess()
    race_of(made, second).run()
    assert len(second.runs) == 1 and {r.key for r in first.runs}.isdisjoint(r.key for r in second.runs)
    third = InProcess()
    entries = race_of(made, third).run()
    assert third.runs == [] and all(len(e.records) == 2 for e in entries)
    fourth = InProcess()
    race_of(settings(tmp_path, optimizers=("torch-adamw",), steps=13), fourth).run()
    assert len(fourth.runs) == 1


class Told(sweep.Silence):
    """A watcher that remembers what is said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def without(*names):
    return lambda record: {key: value for key, value in record.items() if key not in names}


def changed(**values):
    return lambda record: record | values


DAMAGES = {
    "empty": (b"", "is no JSON, or cut short"),
    "cut short": (lambda record: json.dumps(record)[:50].encode(), "is no JSON, or cut short"),
    "garbage": (b"\xff\x00garbage", "is no JSON, or cut short"),
    "deep": (b"[" * 10**5, "is no JSON, or cut short"),
    "NaN": (lambda record: json.dumps(record | {"final": float("nan")}).encode(), "it holds NaN"),
    "a list": ([1, 2], r"the whole is \[1, 2\] and must be an object"),
    "null": (None, "the whole is None and must be an object"),
    "no status": (without("status"), "it lacks status"),
    "other status": (changed(status="done"), "status is 'done' and must be one of finished, diverged, refused, failed"),
    "list of statuses": (changed(status=["finished"]), "status is .* must be one of"),
    "no final": (without("final", "spikes"), "it lacks final, spikes"),
    "final in words": (changed(final="good"), "final is 'good' and must be a finite number"),
    "no error": (changed(status="refused"), "it lacks error"),
    "short losses": (changed(losses=[1.0]), r"losses is \[1.0\] and must be a list of 12 or more"),
    "null in losses": (changed(losses=[1.0] * 12 + [None]), r"losses\[12\] is None"),
    "other curve": (changed(validation=[{"step": 1}] * 3), r"validation\[0\] lacks seconds, value"),
    "true for a number": (changed(state=True), "state is True and must be an int"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_and_the_run_made_anew(damage, tmp_path):
    made, runner, told = settings(tmp_path), InProcess(), Told()
    race_of(made, runner).run()
    file = sweep.file_of(runner.runs[0], tmp_path)
    whole, (damaged, says) = json.loads(file.read_text()), DAMAGES[damage]
    found = damaged(whole) if callable(damaged) else damaged
    file.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    for _ in range(2):
        Race(made, told, runner, data="small").run()
    assert len(runner.runs) == 2 and json.loads(file.read_text())["final"] == whole["final"]
    (line,) = told.lines
    assert line.startswith(f"{file} ") and line.endswith("; the run is made anew") and re.search(says, line)


@pytest.mark.parametrize("record", [{"status": "failed", "error": "killed"}, None])
def test_failed_or_missing_runs_are_run_without_a_word(record, tmp_path):
    made, runner, told = settings(tmp_path), InProcess(), Told()
    race_of(made, runner).run()
    file = sweep.file_of(runner.runs[0], tmp_path)
    file.unlink() if record is None else file.write_text(json.dumps(record))
    Race(made, told, runner, data="small").run()
    assert len(runner.runs) == 2 and not told.lines


def test_a_folder_in_place_of_a_record_is_named_before_anything_runs(tmp_path):
    made, runner = settings(tmp_path), InProcess()
    race_of(made, runner).run()
    file = sweep.file_of(runner.runs[0], tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(IsADirectoryError, match=f"remove the folder.*{file.name}"):
        race_of(made, runner).run()
    assert len(runner.runs) == 1


@pytest.mark.parametrize(
    ("optimum", "added", "edge"), [(1e-2, 3e-2, True), (1e-3, 1e-3 / 3, False), (3e-3, None, False)]
)
def test_sweep_is_extended_once_at_its_edge(tmp_path, optimum, added, edge):
    def final(run):
        return abs(run.rate - (1.0 if edge else optimum))

    runner = InProcess(final=final)
    made = settings(tmp_path, rates=(1e-3, 3e-3, 9e-3) if edge else (1e-3, 3e-3, 1e-2), steps=2)
    race = race_of(made, runner)
    (entry,) = race.run()
    expected = 2.7e-2 if edge else added
    assert entry.extended == (None if expected is None else pytest.approx(expected, rel=1e-4))
    assert entry.still_at_edge == edge
    assert len(runner.runs) == (3 if added is None else 4)
    text = " ".join(remarks(results(race, "")))
    assert ("extended" in text) == (added is not None) and ("edge again" in text) == edge


def test_beyond():
    assert beyond([1e-3, 1e-2], 1e-2) == pytest.approx(0.1)
    assert beyond([1e-3, 1e-2], 1e-3) == pytest.approx(1e-4)
    assert beyond([1e-3, 1e-2, 1e-1], 1e-2) is None
    assert beyond([1e-3], 1e-3) is None


def test_best_rate_is_chosen_by_the_mean_over_seeds_all_of_which_finished(tmp_path):
    finals = {(1e-3, 0): 1.0, (1e-3, 1): 1.2, (2e-3, 0): 0.9, (2e-3, 1): 1.5, (4e-3, 0): 2.0, (4e-3, 1): 2.0}
    made = settings(tmp_path, rates=(1e-3, 2e-3, 4e-3), seeds=2, steps=2)
    race = race_of(made, InProcess(final=lambda run: finals.get((run.rate, run.seed), 9.0)))
    (entry,) = race.run()
    assert entry.best() == 1e-3
    (line,) = results(race, "")["summary"]
    assert line["mean"] == pytest.approx(1.1) and line["deviation"] == pytest.approx(0.1414, rel=1e-3)
    entry.records[1e-3, 1]["status"] = "diverged"
    assert entry.best() == 2e-3


def test_refused_and_failed_contenders_stay_in_the_table(tmp_path):
    def runner(run, file, progress):
        if run.contender == "torch-muon":
            return {"status": "refused", "error": "no tensors, please"}
        if run.contender == "galore-torch":
            return {"status": "failed", "error": "RuntimeError: oops"}
        return json.loads(trained(run))

    made = settings(tmp_path, optimizers=("torch-muon", "torch-adamw", "galore-torch"))
    race = race_of(made, runner)
    race.run()
    found = results(race, "comoving race ...")
    assert {line["contender"]: line["status"] for line in found["summary"]} == {
        "torch-adamw": "finished",
        "torch-muon": "refused",
        "galore-torch": "failed",
    }
    text = " ".join(remarks(found))
    assert "no tensors, please" in text and "oops" in text
    page = report.save(found, tmp_path).read_text()
    assert "torch-muon" in page and "oops" in page


def test_results_and_report_are_complete_and_self_contained(tmp_path):
    made = settings(tmp_path, optimizers=("torch-adamw", "torch-muon"), seeds=2, target=1e9)
    race = race_of(made, InProcess())
    race.run()
    found = results(race, "comoving race --task vit")
    stored = json.loads(save(found, tmp_path).read_text())
    assert stored["command"] == "comoving race --task vit"
    assert stored["versions"]["torch"] and stored["machine"]["cpu"] and stored["machine"]["cores"]
    assert len(stored["runs"]) == 4 and all(len(run["losses"]) == 12 for run in stored["runs"])
    muon, adamw = sorted(stored["summary"], key=lambda line: line["state"])
    assert adamw["state_over_adamw"] == 1 and muon["state_over_adamw"] < 1
    assert adamw["target"]["steps"] == 4 and adamw["target"]["counted"] == 32
    page = report.save(found, tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "@import" not in page
    assert "comoving race --task vit" in page and "spikes" in page
    for name in ("curves.png", "frontier.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_race_that_nobody_finished_still_has_a_report(tmp_path):
    race = race_of(settings(tmp_path), lambda run, file, progress: {"status": "failed", "error": "no"})
    race.run()
    assert report.save(results(race, ""), tmp_path).exists()


def test_reaching_a_target():
    record = {"validation": [{"step": 5, "value": 2.0, "seconds": 1.0}, {"step": 10, "value": 1.0, "seconds": 2.0}]}
    assert reach(record, 1.5, 8) == {"steps": 10, "counted": 80, "seconds": 2.0}
    assert reach(record, 0.5, 8) is None


def test_sizes():
    assert [size(n) for n in (12, 2048, 3 * 2**20, 5 * 2**30)] == ["12 B", "2 KiB", "3 MiB", "5 GiB"]


def test_a_wide_table_is_cut_into_blocks():
    assert blocks([10, 5, 5, 5], 25) == [[0, 1, 2, 3]]
    assert blocks([10, 5, 5, 5], 20) == [[0, 1, 2], [0, 3]]
    assert blocks([10, 50, 5], 20) == [[0, 1], [0, 2]]


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.0]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.0]}


OPTIONS = ["--task", "vit", "--optimizers", "torch-adamw"]


def test_command_line_end_to_end(tmp_path, monkeypatch, capsys):
    """The command here, the run in a process of its own."""
    from comoving.cli import main  # noqa: PLC0415

    monkeypatch.setenv("COMOVING_DIGITS", "1")
    with pytest.raises(SystemExit) as ended:
        main(["race", *OPTIONS, "--steps", "2", "--out", str(tmp_path), "--batch", "4"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert "torch-adamw" in said.out and "worst/median" in said.out
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["command"].startswith("comoving race --task vit")
    assert stored["summary"][0]["peak_memory"] > 2**26


def test_interrupt_ends_the_processes_and_keeps_the_command_resumable(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOVING_DIGITS", "1")
    command = [sys.executable, "-m", "comoving.race", *OPTIONS, "--steps", "5000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    runs = tmp_path / "runs"
    deadline = time.monotonic() + 120
    while not (runs.exists() and any(runs.glob("*.log"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "goes on from there" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--task", "chess"], "unknown task"),
        (["--task", "vit", "--optimizers", "nobody"], "unknown optimizer"),
        (["--task", "vit", "--steps", "many"], "steps"),
        (["--task", "vit", "--lr", "0"], "learning rate"),
        (["--task", "lm", "--optimizers", "torch-adamw", "--text", "EMPTY"], "no text found"),
        ([], "task"),
    ],
)
def test_bad_command_line_is_one_line_and_status_two(options, word, tmp_path, capsys):
    from comoving.cli import main  # noqa: PLC0415

    with pytest.raises(SystemExit) as ended:
        main(["race", *(str(tmp_path) if option == "EMPTY" else option for option in options)])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(errors.strip().splitlines()) == 1 and word in errors


def test_version_and_recipes(capsys):
    from comoving.cli import main  # noqa: PLC0415

    for arguments, word in ((["--version"], "0."), (["recipes"], "ldadam")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert word in capsys.readouterr().out


def test_missing_extra_is_named(monkeypatch, capsys):
    from comoving.cli import main  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as ended:
        main(["race"])
    assert ended.value.code == 2 and "comoving[cli]" in capsys.readouterr().err
