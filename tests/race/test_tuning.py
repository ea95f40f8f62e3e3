"""Tuned races: ratios of rates, rungs that go on where the one before ended, equal allowances."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch

from comoving.files import write_json
from comoving.race import contenders, resuming, sources
from comoving.race.command import settings_from
from comoving.race.ratios import build_with_ratio
from comoving.race.runner import train
from comoving.race.settings import SettingsError, kept
from comoving.race.sweep import Race, file_of, results
from comoving.race.table import remarks
from race.small import Small, settings
from race.test_contenders import Net


def rates_of(name, ratio):
    model = Net()
    optimizer = build_with_ratio(contenders.parse(name), model, 1e-2, ratio, 4, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    return (
        {names[id(p)]: float(g["lr"]) * g.get("rate", 1.0) for g in optimizer.param_groups for p in g["params"]},
        model,
        optimizer,
    )


@pytest.mark.parametrize("name", ["torch-adamw", "torch-muon", "galore-torch", "adamw", "galore", "muon"])
def test_all_but_hidden_weights_get_the_ratio(name):
    pytest.importorskip("galore_torch")
    found, model, optimizer = rates_of(name, 0.25)
    assert set(found) == {n for n, _ in model.named_parameters()}
    for n, rate in found.items():
        assert rate == pytest.approx(1e-2 if n in ("up.weight", "down.weight") else 2.5e-3), n
    model(torch.arange(10)).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert set(rates_of(name, 1.0)[0].values()) == {1e-2}


def test_a_rate_in_a_tensor_is_not_shared():
    class Kept(torch.optim.SGD):
        pass

    model = Net()
    made = contenders.Foreign(lambda model, lr, rank, weight_decay: Kept(model.parameters(), torch.tensor(lr)))
    contender = replace(contenders.parse("torch-adamw"), foreign=made)
    optimizer = build_with_ratio(contender, model, 1e-2, 0.5, 4, 0.0)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([1e-2, 5e-3])


def run_of(tmp_path, name, **changes):
    return replace(settings(tmp_path, steps=16).run(name, 1e-2, 0, ""), ratio=0.5, **changes)


@pytest.mark.parametrize("name", ["torch-adamw", "torch-muon", "adamw", "comoving", "galore"])
def test_a_rung_goes_on_where_the_one_before_ended(name, tmp_path):
    whole = train(run_of(tmp_path, name), Small())
    file = kept(run_of(tmp_path, name), tmp_path)
    lengths = []
    for until in (4, 8, 0):
        told = []
        run = run_of(tmp_path, name, until=until)
        assert kept(run, tmp_path) == file
        record = train(run, Small(), lambda step, loss, told=told: told.append(step), file)
        lengths.append(len(told))
        assert len(record["losses"]) == run.length and record["validation"][-1]["step"] == run.length
        assert file.exists() == (until > 0)
    assert lengths == [4, 4, 8]
    assert record["losses"] == whole["losses"]
    assert [p["value"] for p in record["validation"]] == [p["value"] for p in whole["validation"]]
    assert [p["step"] for p in record["validation"]] == [p["step"] for p in whole["validation"]]
    assert all(
        a["seconds"] < b["seconds"] for a, b in zip(record["validation"], record["validation"][1:], strict=False)
    )


def test_a_run_that_cannot_go_on_begins_anew(tmp_path):
    whole = train(run_of(tmp_path, "torch-adamw"), Small())
    file = tmp_path / "kept.pt"
    for damage in (b"", b"garbage"):
        file.write_bytes(damage)
        assert train(run_of(tmp_path, "torch-adamw"), Small(), kept=file)["losses"] == whole["losses"]
    train(run_of(tmp_path, "torch-adamw", until=8), Small(), kept=file)
    shorter = train(run_of(tmp_path, "torch-adamw", until=4), Small(), kept=file)
    assert shorter["losses"] == whole["losses"][:4]

    class Stubborn(torch.optim.SGD):
        def state_dict(self):
            raise NotImplementedError

    model = torch.nn.Linear(2, 2)
    resuming.save(file, model, Stubborn(model.parameters(), 1.0), {"losses": []})
    assert not file.exists()


class Pretend:
    """Trains nothing: the validation is the distance from the best candidate, some runs diverge."""

    def __init__(self):
        self.runs = []

    def __call__(self, run, file, progress):
        self.runs.append(run)
        if run.contender == "torch-muon":
            return {"status": "refused", "error": "no"}
        if run.rate > 4e-3:
            record = {"status": "diverged", "error": "nan"}
        else:
            record = json.loads(json.dumps(train(replace(run, contender="torch-adamw"), Small())))
            record["final"] = 1 + abs(run.rate - 2e-3) * 100 + abs(run.ratio - 1) / 50 + 0.01 * run.seed
        write_json(file, {"settings": asdict(run), **record})
        kept(run, file.parent).write_bytes(b"")
        return record


def test_rungs_of_a_race(tmp_path):
    made = settings(
        tmp_path, optimizers=("torch-adamw", "torch-muon", "adamw"), rates=(), tune=8, rungs=3, seeds=2, steps=8
    )
    runner = Pretend()
    race = Race(made, runner=runner, data="small")
    entries = {entry.contender.label: entry for entry in race.run()}
    counts = Counter((run.contender, run.length, run.seed) for run in runner.runs)
    for name in ("torch-adamw", "adamw"):
        first = [run for run in runner.runs if run.contender == name and run.length == 2]
        assert counts[name, 2, 0] == 8 and len({(r.rate, r.ratio) for r in first}) == 8
        assert counts[name, 4, 0] <= 4 and counts[name, 8, 0] <= 2
        assert counts[name, 8, 0] == counts[name, 8, 1] > 0
        assert all(run.rate <= 4e-3 for run in runner.runs if run.contender == name and run.length > 2)
        entry = entries[name]
        (rate,) = entry.rates
        finals = {t["rate"]: t["value"] for t in entry.trials if t["rung"] == 2 and t["seed"] == 0}
        assert rate == min(finals, key=finals.get) and set(entry.records) == {(rate, 0), (rate, 1)}
        best = next(t for t in entry.trials if t["rate"] == rate)
        assert entry.ratio == best["ratio"]
    # Nobody waits any more for what was left on the way, and the refused one was asked once.
    waiting = {kept(run, file_of(run, tmp_path).parent) for run in runner.runs if not run.until}
    assert {path for path in (tmp_path / "runs").glob("*.pt")} <= waiting
    assert counts["torch-muon", 2, 0] == 1 and entries["torch-muon"].refusal() == "no"
    found = results(race, "")
    assert found["tuning"]["allowance"] == 8 * 2 + 4 * 2 + 2 * 4 + 2 * 8
    assert len(found["tuning"]["trials"]["adamw"]) == sum(n for (who, *_), n in counts.items() if who == "adamw")
    tuned = next(line for line in found["summary"] if line["contender"] == "adamw")
    assert ("as tuned" in " ".join(remarks(found))) == any(e.ratio != 1 for e in entries.values())
    assert tuned["ratio"] == entries["adamw"].ratio
    again = Pretend()
    Race(made, runner=again, data="small").run()
    assert [run.contender for run in again.runs] == ["torch-muon"]


def test_nobody_is_left_of_a_contender_that_always_diverges(tmp_path):
    made = settings(tmp_path, rates=(), tune=4, rungs=2, steps=4)
    race = Race(made, runner=lambda run, file, progress: {"status": "diverged", "error": "nan"}, data="small")
    race.run()
    (line,) = results(race, "")["summary"]
    assert line["status"] == "failed" and len(line["problems"]) == 4


def test_what_cannot_be_tuned(tmp_path):
    with pytest.raises(SettingsError, match="leave --lr out"):
        settings(tmp_path, tune=4)
    with pytest.raises(SettingsError, match="tune is -1"):
        settings(tmp_path, tune=-1)
    with pytest.raises(SettingsError, match="fewer rungs or more steps"):
        Race(settings(tmp_path, rates=(), tune=4, rungs=5), data="small")
    assert settings_from("vit", "adamw", None, "", None, None, seeds=1, tune=4, rungs=2).tune == 4


def test_tuned_race_from_end_to_end(tmp_path, monkeypatch):
    """In processes of their own: the second rung goes on from a file."""
    monkeypatch.setenv("COMOVING_DIGITS", "1")
    made = settings(tmp_path, rates=(), tune=1, rungs=2, steps=4, batch=4, validations=1)
    race = Race(made)
    (entry,) = race.run()
    assert [t["steps"] for t in entry.trials] == [2, 4] and entry.best() is not None
    assert not list((tmp_path / "runs").glob("*.pt"))


def names(paths):
    return {path.relative_to(sources.ROOT).as_posix() for path in paths}


def test_a_run_is_kept_under_the_code_that_it_uses():
    ours = names(sources.of_optimizers())
    assert {"__init__.py", "optimizer.py", "rules/adam.py", "finders/power.py", "linalg/lapack.py"} <= ours
    assert not any(name.split("/")[0] in sources.ASIDE for name in ours)
    assert "distributed/compression.py" in names(sources.of_optimizers(wrapped=True))
    fno, tuned = names(sources.of_task("fno")), names(sources.of_task("ft"))
    assert {"race/runner.py", "race/contenders.py", "race/ratios.py", "race/darcy.py", "race/tasks/fno.py"} <= fno
    assert {"race/tasks/ft.py", "race/tasks/lm_bpe.py", "race/tasks/lm.py"} <= tuned
    assert not {"race/tasks/lm.py", "race/tasks/vit.py", "race/tasks/__init__.py", "optimizer.py"} & fno


def test_relative_imports_are_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    for name, text in {
        "__init__.py": "",
        "a/__init__.py": "from .b import x",
        "a/b.py": "from ..c import y\nfrom . import d",
        "c.py": "def f():\n    import comoving.e\n",
        "a/d.py": "import numpy, os.path",
        "e.py": "",
        "f.py": "import comoving.a",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = sources.closure([tmp_path / "a" / "__init__.py"])
    assert names(found) == {"__init__.py", "a/__init__.py", "a/b.py", "c.py", "a/d.py", "e.py"}
    before = sources.digest(found)
    (tmp_path / "e.py").write_text("1")
    assert sources.digest(found) != before
