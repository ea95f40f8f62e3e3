"""Which runs a study makes: equally many rates for all, the best one on every seed, follow-ups, resuming."""

import json

import pytest

from comoving.files import write_json
from comoving.lab import campaign as campaigns
from comoving.lab import config as configs
from comoving.lab.campaign import Campaign
from comoving.lab.studies import find
from comoving.race.settings import SettingsError
from lab import synthetic

BEST = {"E4-r4": 0.004, "B1": 0.001}
"""The best rate of some arms; of the others it is 0.002."""


class Silent:
    def __init__(self):
        self.lines = []

    def total(self, runs, reused):
        self.runs, self.reused = runs, reused

    def started(self, name, steps):
        pass

    def progress(self, name, step, loss):
        pass

    def ended(self, name, record):
        pass

    def say(self, line):
        self.lines.append(line)


class Stub:
    """Trains nobody; remembers who was asked."""

    def __init__(self, record=None, interrupt_at=None):
        self.asked, self.record, self.interrupt_at = [], record, interrupt_at

    def __call__(self, run, file, progress):
        if self.interrupt_at is not None and len(self.asked) >= self.interrupt_at:
            raise KeyboardInterrupt
        self.asked.append((run.arm.name, run.rate, run.seed))
        progress(1, 2.0)
        good = run.rate == BEST.get(run.arm.name, 0.002)
        made = synthetic.run(run.seed, final=96.0 if good else 90.0, rate=run.rate, steps=40)
        record = {**made, "shapes": {"layer": [4, 4]}, "notes": {}} | ({} if self.record is None else self.record(run))
        write_json(file, record)
        return record


@pytest.fixture
def quick(monkeypatch):
    """No data are loaded."""
    monkeypatch.setattr(campaigns, "examined", lambda config: (f"of {config.samples}", {"layer": [4, 4]}))


def made(tmp_path, study="e4", seeds=3, runner=None, **changes):
    config = configs.configure(configs.load("vit-tiny-digits"), {"rate": 2e-3, "rates": (0.5, 1.0, 2.0), **changes})
    return Campaign(find(study), config, seeds, tmp_path, Silent(), runner=runner or Stub())


def test_every_arm_tries_equally_many_rates_and_the_best_one_gets_all_seeds(tmp_path, quick):
    stub = Stub()
    results = made(tmp_path, runner=stub).run("comoving lab run e4")
    names = [arm["name"] for arm in results["arms"]]
    assert names == ["B0", "E4-r4", "E4-r8", "B1", "B2-r4", "B2-r8", "B3-r4", "B3-r8"]
    for name in names:
        own = [(rate, seed) for other, rate, seed in stub.asked if other == name]
        best = BEST.get(name, 0.002)
        assert sorted(own) == sorted([(0.001, 0), (0.002, 0), (0.004, 0), (best, 1), (best, 2)])
    by_name = {arm["name"]: arm for arm in results["arms"]}
    assert by_name["E4-r4"]["rate"] == 0.004 and [r["seed"] for r in by_name["E4-r4"]["runs"]] == [0, 1, 2]
    assert by_name["B0"]["rates"] == {
        "0.001": pytest.approx(90.0),
        "0.002": pytest.approx(96.0),
        "0.004": pytest.approx(90.0),
    }
    stored = json.loads((tmp_path / "results-e4-vit-tiny-digits.json").read_text())
    assert stored["arms"][0]["runs"][0]["losses"][0] == pytest.approx(2.41, rel=1e-4)
    assert campaigns.found(tmp_path) == [stored]


def test_lower_is_better_where_the_metric_says_so(tmp_path, quick):
    config = configs.configure(configs.load("lm-bytes"), {"rate": 2e-3})
    results = Campaign(find("1"), config, 1, tmp_path, Silent(), runner=Stub()).run("")
    assert all(arm["rate"] in (0.001, 0.004) for arm in results["arms"])


def test_an_interrupted_campaign_goes_on(tmp_path, quick):
    first = Stub(interrupt_at=7)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, runner=first).run("")
    partial = campaigns.found(tmp_path)[0]
    assert sum(len(arm["rates"]) for arm in partial["arms"]) == 7
    second = Stub()
    results = made(tmp_path, runner=second).run("")
    assert len(first.asked) + len(second.asked) == 8 * 5 and not set(first.asked) & set(second.asked)
    again = Stub()
    assert made(tmp_path, runner=again).run("") == results and not again.asked


def test_studies_share_their_baseline(tmp_path, quick):
    made(tmp_path, "1").run("")
    stub = Stub()
    made(tmp_path, "2", runner=stub).run("")
    assert {name for name, _, _ in stub.asked} == {"zero-r4", "zero-r8"}
    assert len(campaigns.found(tmp_path)) == 2


def test_what_decides_the_outcome_is_in_the_name_of_the_file(tmp_path, quick):
    made(tmp_path, "3", seeds=1).run("")
    for change in ({"steps": 300}, {"weight_decay": 0.1}, {"spec_every": 10}, {"samples": 100}):
        stub = Stub()
        made(tmp_path, "3", seeds=1, runner=stub, **change).run("")
        assert len(stub.asked) == 3, change


def test_followups_where_studies_1_and_2_coincide(tmp_path, quick):
    stub = Stub()
    campaign = made(tmp_path, "12", runner=stub)
    results = campaign.run("")
    names = [arm["name"] for arm in results["arms"]]
    assert names[5:] == [
        "frozen-r2", "zero-r2", "frozen-r4-half", "zero-r4-half", "B0-harder", "frozen-r4-harder", "zero-r4-harder",
    ]  # fmt: skip
    assert len(results["followups"]) == 3 and any("coincide" in line for line in campaign.watcher.lines)
    assert {(a["name"], a["layers"], a["task"]) for a in results["arms"]} >= {
        ("zero-r4-half", "half", None),
        ("B0-harder", "all", "harder"),
    }


def test_no_followups_where_they_differ(tmp_path, quick):
    def record(run):
        shift = -20.0 if run.arm.backbone == "zero" else 0.0
        value = synthetic.run(run.seed, final=96.0 + shift, rate=run.rate)
        return {"curve": value["curve"], "final": value["final"]}

    results = made(tmp_path, "12", runner=Stub(record)).run("")
    assert results["followups"] == [] and len(results["arms"]) == 5


def test_an_arm_that_diverges_at_every_rate_gets_no_further_seeds(tmp_path, quick):
    def record(run):
        return synthetic.broken(run.seed) if run.arm.name == "B1" else {}

    stub = Stub(record)
    campaign = made(tmp_path, runner=stub)
    results = campaign.run("")
    line = next(arm for arm in results["arms"] if arm["name"] == "B1")
    assert line["rate"] is None and line["runs"] == [] and set(line["rates"].values()) == {None}
    assert [seed for name, _, seed in stub.asked if name == "B1"] == [0, 0, 0]
    assert any("B1: diverged at every rate" in said for said in campaign.watcher.lines)


def test_a_fault_ends_the_campaign_and_is_tried_again(tmp_path, quick):
    class Broken(Stub):
        def __call__(self, run, file, progress):
            return {"status": "failed", "error": "out of memory"}

    with pytest.raises(SettingsError, match=r"B0 lr 0.001 seed 0 failed: out of memory"):
        made(tmp_path, "3", runner=Broken()).run("")
    assert len(made(tmp_path, "3").run("")["arms"][0]["runs"]) == 3


@pytest.mark.parametrize(("options", "message"), [({"seeds": 0}, "seeds is 0; it must be at least 1")])
def test_numbers_out_of_range(tmp_path, quick, options, message):
    with pytest.raises(SettingsError, match=message):
        made(tmp_path, **options)


def test_a_folder_without_results(tmp_path):
    with pytest.raises(SettingsError, match="holds no results; run a study first"):
        campaigns.found(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="give the folder that comoving lab run had as --out.*file"):
        campaigns.found(tmp_path / "file")


def removed(record, *path):
    for step in path[:-1]:
        record = record[step]
    del record[path[-1]]


def replaced(record, *path, by):
    for step in path[:-1]:
        record = record[step]
    record[path[-1]] = by


RESULTS = [
    (lambda r: removed(r, "metric"), "it lacks metric"),
    (lambda r: removed(r, "metric", "goal"), "metric lacks goal"),
    (lambda r: replaced(r, "metric", "goal", by="up"), "metric.goal is 'up' and must be one of max, min"),
    (lambda r: removed(r, "arms"), "it lacks arms"),
    (lambda r: replaced(r, "arms", by=[]), r"arms is \[\] and must be a list of 1 or more"),
    (lambda r: replaced(r, "arms", by={"B0": {}}), "arms is {'B0': {}} and must be a list of 1 or more"),
    (lambda r: removed(r, "arms", 1, "name"), r"arms\[1\] lacks name"),
    (lambda r: replaced(r, "arms", 1, "rank", by="4"), r"arms\[1\].rank is '4' and must be an int"),
    (lambda r: removed(r, "arms", 0, "runs", 2, "seed"), r"arms\[0\].runs\[2\] lacks seed"),
    (lambda r: replaced(r, "arms", 0, "runs", 0, "losses", by="x"), r"arms\[0\].runs\[0\].losses is 'x'"),
    (lambda r: removed(r, "arms", 0, "runs", 0, "curve", 1, "step"), r"runs\[0\].curve\[1\] lacks step"),
    (
        lambda r: replaced(r, "arms", 0, "runs", 0, "curve", 1, "seconds", by=-1),
        "seconds is -1 and must be at least",
    ),
    (lambda r: replaced(r, "arms", 0, "runs", 0, "spectra", by={"a": [[1]]}), r"spectra.a\[0\] is \[1\]"),
    (lambda r: replaced(r, "config", by=[1]), r"config is \[1\] and must be an object"),
    (lambda r: replaced(r, "seeds", by="three"), "seeds is 'three' and must be an int"),
    ("{", "is no JSON, or cut short"),
    ("", "is no JSON, or cut short"),
    ("[]", r"the whole is \[\] and must be an object"),
]


@pytest.mark.parametrize(("damage", "says"), RESULTS, ids=[says for _, says in RESULTS])
def test_damaged_results_are_named_and_what_to_do(damage, says, tmp_path):
    results, file = json.loads(json.dumps(synthetic.against())), tmp_path / "results-e4-x.json"
    if callable(damage):
        damage(results)
    file.write_text(json.dumps(results) if callable(damage) else damage)
    with pytest.raises(SettingsError, match=says) as found:
        campaigns.found(tmp_path)
    assert str(found.value).startswith(f"{file} ") and "comoving lab run with the same --out" in str(found.value)


DAMAGES = [
    (lambda r: removed(r, "curve"), "it lacks curve"),
    (lambda r: replaced(r, "curve", by=[]), "curve is"),
    (lambda r: replaced(r, "losses", by={}), "losses is {}"),
    (lambda r: removed(r, "shapes"), "it lacks shapes"),
    (lambda r: replaced(r, "spectra", by=[]), "spectra is"),
    (lambda r: replaced(r, "status", by="failed"), "status is 'failed' and must be one of finished, diverged"),
    (lambda r: replaced(r, "status", by="diverged"), "it lacks error"),
    ('{"status": "finished"', "is no JSON, or cut short"),
    ("[3]", "must be an object"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES, ids=[says for _, says in DAMAGES])
def test_a_damaged_record_is_named_and_the_run_made_anew(damage, says, tmp_path, quick):
    whole = made(tmp_path, "3", seeds=1).run("")
    file = sorted((tmp_path / "runs").iterdir())[1]
    record = json.loads(file.read_text())
    if callable(damage):
        damage(record)
    file.write_text(json.dumps(record) if callable(damage) else damage)
    stub = Stub()
    campaign = made(tmp_path, "3", seeds=1, runner=stub)
    assert campaign.run("") == whole and len(stub.asked) == 1
    (line,) = campaign.watcher.lines
    assert line.startswith(f"{file} ") and says in line and line.endswith("; the run is made anew")
