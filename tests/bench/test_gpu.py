"""The GPU benchmark on a CPU: complete, independent sections, budgets; what needs CUDA with stand-ins for it."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comoving.drivers.graphs import Graphs
from comoving.memory import measure
from tape import Recorder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FEW = "comoving-adamw,galore,apollo-mini,tt-adam,dion,muon,adamw"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def made(gpu, tmp_path, *arguments):
    out = tmp_path / "figures" / "gpu.json"
    gpu.main(["--device", "cpu", "--small", "--recipes", FEW, "--out", str(out), *arguments])
    report = json.loads(out.read_text())
    assert report["finished"] and set(report["sections"]) == set(gpu.SECTIONS)
    assert [*out.parent.iterdir()] == [out]
    return report


def test_a_small_run_has_every_section(gpu, tmp_path, capsys):
    report = made(gpu, tmp_path)
    sections = report["sections"]
    assert {name: own["status"] for name, own in sections.items()} == {
        "correctness": "done",
        "host reads": "skipped",
        "memory": "done",
        "times": "done",
        "graphs": "skipped",
        "graph times": "skipped",
    }
    for name in ("host reads", "graphs", "graph times"):
        assert "needs CUDA: torch.cuda." in sections[name]["reason"]
    assert "needs CUDA" in sections["memory"]["figures"]["peaks"]["skipped"]
    for recipe in FEW.split(","):
        own = sections["correctness"]["figures"][recipe]
        assert own["float64"]["within"] and own["float32"]["within"], own  # the same device twice
        assert sections["memory"]["figures"][recipe]["state"]["as planned"]
    assert sections["correctness"]["figures"]["galore"]["signs matter"]
    assert sections["correctness"]["figures"]["tt-adam"]["experts"] == "one tensor"
    assert set(sections["times"]["figures"]) == set(gpu.CONTENDERS)
    for name, own in sections["times"]["figures"].items():
        assert "8-bit" in name or own["steps"] == 4, own
    table = capsys.readouterr().out
    assert all(name in table for name in (*gpu.SECTIONS, *gpu.CONTENDERS, *FEW.split(",")))


def test_a_section_that_fails_leaves_the_others(gpu, tmp_path, monkeypatch):
    def broken(run, figures):
        figures["before"] = {"skipped": "kept"}
        raise ZeroDivisionError("on purpose")

    monkeypatch.setitem(gpu.SECTIONS, "correctness", broken)
    sections = made(gpu, tmp_path, "--sections", "correctness,times")["sections"]
    assert sections["correctness"]["status"] == "failed"
    assert sections["correctness"]["traceback"][-1] == "ZeroDivisionError: on purpose"
    assert sections["correctness"]["figures"] == {"before": {"skipped": "kept"}}
    assert sections["times"]["status"] == "done"
    assert sections["memory"]["reason"] == "not asked for"


def test_a_contender_that_fails_or_is_missing_leaves_the_others(gpu, tmp_path, monkeypatch):
    def broken(run, model):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setitem(gpu.CONTENDERS, "lion", broken)
    monkeypatch.setitem(gpu.CONTENDERS, "apollo", gpu._foreign("no_such_package.optim", "AdamW8bit"))
    monkeypatch.setitem(gpu.MISSING, "no_such_package", "8-bit AdamW")
    report = made(gpu, tmp_path, "--sections", "times")
    figures = report["sections"]["times"]["figures"]
    assert figures["lion"]["failed"][-1] == "ZeroDivisionError: on purpose"
    assert "no_such_package" in figures["apollo"]["missing"]
    assert figures["galore"]["steps"] == 4
    assert report["missing"]["no_such_package"] == "not installed: no 8-bit AdamW"


def test_without_time_everything_is_named_that_was_not_reached(gpu, tmp_path):
    sections = made(gpu, tmp_path, "--seconds", "0")["sections"]
    for name in ("correctness", "memory", "times"):
        assert sections[name]["status"] == "out of time"
        names = gpu.CONTENDERS if name == "times" else FEW.split(",")
        assert sections[name]["not finished"] == list(names)


def test_who_was_not_reached_is_named(gpu, tmp_path, monkeypatch):
    class Slow(gpu.Subject):
        def __init__(self, recipe, *others, **options):
            time.sleep(30 if recipe == "apollo-mini" else 0)
            super().__init__(recipe, *others, **options)

    def slow(run, model):
        time.sleep(30)

    monkeypatch.setattr(gpu, "GRACE", 0.1)
    monkeypatch.setattr(gpu, "Subject", Slow)
    monkeypatch.setitem(gpu.CONTENDERS, "muon", slow)
    start = time.monotonic()
    sections = made(gpu, tmp_path, "--seconds", "2.4", "--sections", "correctness,times")["sections"]
    assert time.monotonic() - start < 12
    assert sections["correctness"]["status"] == sections["times"]["status"] == "out of time"
    assert sections["correctness"]["not finished"] == FEW.split(",")[2:]
    assert set(sections["correctness"]["figures"]) == {"comoving-adamw", "galore"}
    names = list(gpu.CONTENDERS)
    assert sections["times"]["not finished"] == names[names.index("muon") :]
    assert sections["times"]["figures"]["comoving-adamw"]["steps"] == 4


def test_a_killed_run_leaves_what_it_had(gpu, tmp_path, monkeypatch):
    def killed(run, figures):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.SECTIONS, "times", killed)
    out = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--small", "--recipes", "adamw", "--out", str(out)])
    report = json.loads(out.read_text())
    statuses = [own["status"] for own in report["sections"].values()]
    assert statuses == ["done", "skipped", "done", "running", "not started", "not started"]
    assert not report["finished"]


def test_unknown_sections_are_refused(gpu, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["--sections", "time"])


# ------------------------------------------------------------------------------------------------- stand-ins for CUDA


class NoReads(TorchDispatchMode):
    """Raises when a flag is read; counts and seeds, torch's own among them, live on the host here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            raise RuntimeError("called a synchronizing operation")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def run(gpu, tmp_path):
    run = gpu.Run("cpu", tmp_path / "gpu.json", small=True, recipes=FEW.split(","))
    run.guard, run.capture, run.usage = NoReads, lambda step: step, measure
    run.record = lambda optimizer: recorded_by(optimizer, Recorder())
    return run


def recorded_by(optimizer, recorder):
    optimizer.engine.replays = Graphs(optimizer.engine, recorder)


def figures(run, section):
    run.section(section)
    assert run.sections[section]["status"] == "done", run.sections[section]
    return json.loads(run.out.read_text())["sections"][section]["figures"]


def test_host_reads_are_found_where_they_are(gpu, run):
    found = figures(run, "host reads")
    assert found["adamw"]["between"] == {"passes": True, "steps": gpu.WATCHED - 1}
    assert found["adamw"]["refresh"]["passes"] is None
    assert found["dion"]["between"]["passes"] is None  # every step is a refresh
    assert found["comoving-adamw"]["between"]["passes"]
    reads = [x for own in found.values() for x in own.values() if x["passes"] is False]
    assert reads
    for x in reads:
        path, _, line = x["line"].partition(" in ")[0].rpartition(":")
        source = (Path(gpu.comoving.__file__).parent / path).read_text().splitlines()[int(line) - 1]
        assert x["line"].endswith(source.strip())
        assert x["error"] == "RuntimeError: called a synchronizing operation"


def test_replays_are_compared_with_steps(gpu, run):
    run.recipes = ["comoving-adamw", "galore", "dion", "muon", "adamw"]
    found = figures(run, "graphs")
    for recipe in ("comoving-adamw", "galore", "muon"):
        own = found[recipe]["raise"]
        assert own["passes"] and own["steps"] == gpu.TWINNED
        assert own["recorded"] >= 2 and own["replayed"] > 2 * own["recorded"]
        assert own["under the error mode"] == own["replayed"] - own["recorded"]
        assert 0 < own["share of rows"] < own["share at best"] < 1  # experts are blocks, or made at every step
        assert own["largest difference"] < 1e-4
    assert found["comoving-adamw"]["raise"]["refreshed"] > 2 > found["muon"]["raise"]["refreshed"]
    skipping = found["comoving-adamw"]["skip"]
    assert (
        skipping["recorded"] == 1 and 0 < skipping["share of rows"] < found["comoving-adamw"]["raise"]["share of rows"]
    )
    assert found["dion"]["raise"]["passes"] is None and found["dion"]["raise"]["replayed"] == 0
    assert found["adamw"]["skip"]["passes"] is None
    table = "\n".join(gpu.summary(run))
    assert "nothing is replayed" in table and "of rows, " in table


def test_replays_that_differ_or_read_are_found(gpu, run, monkeypatch):
    class Wrong(Recorder):
        def __call__(self, work, device):
            replay = super().__call__(work, device)
            return lambda: [replay(), self.played > 2 and self.then()]

        def then(self):
            bool(torch.zeros(1).any())

    run.recipes, run.record = ["comoving-adamw"], lambda optimizer: recorded_by(optimizer, Wrong())
    own = figures(run, "graphs")["comoving-adamw"]["raise"]
    assert own["passes"] is False and own["error"] == "RuntimeError: called a synchronizing operation"

    stepped, update = [], gpu.Subject.update
    monkeypatch.setattr(gpu.Subject, "update", lambda subject: stepped.append(subject) or update(subject))
    monkeypatch.setattr(Wrong, "then", lambda self: stepped[-1].model.matrix.data.mul_(1.1))
    own = figures(run, "graphs")["comoving-adamw"]["raise"]
    assert own["passes"] and own["largest difference"] > 0.1


def fails(*given):
    try:
        raise RuntimeError("operation not permitted when stream is capturing")
    finally:
        raise RuntimeError("the capture was invalidated")


def test_a_capture_that_fails_says_why(gpu, run):
    class Failing(Recorder):
        def __call__(self, work, device):
            fails()

    run.capture, run.record = fails, lambda optimizer: recorded_by(optimizer, Failing())
    run.recipes = ["comoving-adamw"]
    own = figures(run, "graphs")["comoving-adamw"]["raise"]
    assert own["passes"] is False
    assert own["error"] == "RuntimeError: operation not permitted when stream is capturing"
    times = figures(run, "graph times")
    for own in times.values():
        assert own["why"] == "the capture failed" and own["captured"] is False
        assert own["error"] == "RuntimeError: operation not permitted when stream is capturing"
    assert gpu.summary(run)


def test_graphs_are_timed_beside_steps(gpu, run):
    found = figures(run, "graph times")
    assert set(found) == set(gpu.GRAPHED)
    for name, own in found.items():
        assert own["captured"] and own["with"]["steps"] == own["without"]["steps"] == 4, own
        if "torch" not in name:
            assert own["recorded"] == own["replayed in each step"] == 2
    assert gpu.summary(run)


def test_graphs_are_timed_for_as_long_as_there_is_time(gpu, run):
    run.rounds, run.sections["graph times"]["budget"] = 10**6, 4.0
    found = figures(run, "graph times")
    assert all(own["with"]["steps"] >= gpu.FEWEST for own in found.values())
    run.sections["graph times"]["budget"] = 0.0
    run.section("graph times")
    assert run.sections["graph times"]["status"] == "out of time"
    assert run.sections["graph times"]["not finished"] == list(gpu.GRAPHED)


def test_temporaries_are_compared_with_the_plan(gpu, run):
    found = figures(run, "memory")
    for recipe in run.recipes:
        own = found[recipe]
        assert own["state"]["as planned"]
        assert own["peak"]["measured / planned"] == pytest.approx(1, rel=0.15), (recipe, own)
    assert set(found["comoving-adamw"]["temporaries"]) == {"first", "between", "refresh"}
    assert gpu.summary(run)
