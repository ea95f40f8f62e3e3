"""The measurements on tiny tensors, the report made from them, and the command from end to end."""

import dataclasses
import json
import math

import pytest
import torch

from bench_streams import SHAPES, stream
from comoving import finders
from comoving.bench import command, contenders, gradients, report, subspace
from comoving.cli import main
from comoving.codecs import Spec
from comoving.decompositions import tt_svd
from comoving.frames import Modes
from race.small import Small

PARTS = {
    name
    for name in finders.__all__
    if dataclasses.is_dataclass(getattr(finders, name)) and name not in {"Operand", "Memoryless", "Delayed"}
}


def test_every_finder_takes_part_under_a_name_of_its_own():
    assert {kind for _, kind, _, _ in contenders.CONTENDERS} >= PARTS
    everyone = contenders.contenders()
    assert {type(c.finder).__name__ for c in everyone} == PARTS
    assert len({c.name for c in everyone}) == len(everyone)
    assert everyone[0].name == contenders.EXACT
    assert all(c.finder.inertia == 0.9 for c in everyone if c.name in {contenders.EXACT, "Power", "TrainSVD"})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follow_has_a_row_for_each_contender(shape):
    everyone = contenders.contenders()
    rows = subspace.follow(stream(shape, 5), everyone, every=2, repeats=1)
    assert [row["finder"] for row in rows] == [c.name for c in everyone]
    assert all(0 <= row["energy"] <= 1 + 1e-6 for row in rows)
    by = {row["finder"]: row for row in rows}
    exact = by[contenders.EXACT]
    assert exact["time_of_exact"] == exact["energy_of_exact"] == 1
    if len(shape) == 2:  # nothing beats the truncated SVD with one side whole
        assert all(row["energy_of_exact"] <= 1 + 1e-6 for row in rows if row["frame"] in {"Modes", "Cosines", "Seeded"})
    assert by["Exact, SVD"]["energy_of_exact"] == pytest.approx(1, abs=1e-5)
    assert by["Exact, 1 HOOI sweep"]["energy_of_exact"] >= 1 - 1e-5
    assert all(row["find_seconds"] >= 0 and row["refresh_seconds"] >= row["find_seconds"] for row in rows)


def test_energy_is_that_of_the_mean_and_the_newest_gradient():
    own = stream((12, 10), 3)
    row = subspace.follow(own, contenders.contenders()[:1], every=1, repeats=2)[0]
    mean, energies = torch.zeros(12, 10), []
    for t, g in enumerate(own.gradients):
        mean = 0.9 * mean + 0.1 * g
        values = torch.linalg.svdvals(0.9 * mean / (1 - 0.9 ** (t + 1)) + 0.1 * g).square()
        energies.append(float(values[: own.rank].sum() / values.sum()))
    assert row["energy"] == pytest.approx(sum(energies[1:]) / 2, abs=1e-5)


def test_finding_twice_goes_on_from_one_memory():
    class Counting(finders.Exact):
        def schema(self, shape, ranks, dtype):
            return {"draws": counter}

        def find(self, operand, start, warm, memory):
            memory["draws"] += 1
            return super().find(operand, start, warm, memory)

    counter = Spec((), torch.int64, scalar=True)
    own = stream((12, 10), 3)
    follower = subspace.Follower(contenders.Contender("x", Counting(inertia=0.9), Modes()), own)
    for t, g in enumerate(own.gradients):
        follower.observe(g)
        follower.refresh(g, g, repeats=3)
        assert int(follower.memory["draws"]) == t + 1
    assert len(follower.finding) == len(follower.energies) == 2


def test_exponent_of_made_data():
    xs = [3, 4, 5, 8]
    assert subspace.exponent(xs, [7 * x**1.3 for x in xs]) == pytest.approx(1.3)
    assert subspace.exponent(xs, [5.0] * 4) == pytest.approx(0)


def test_cost_of_order(monkeypatch):
    monkeypatch.setattr(subspace, "INNER", 500)
    rows = subspace.cost_of_order((3, 4), size=4, rank=2, rounds=2)
    assert len(rows) == 2 * len(subspace.ORDER_FINDERS)
    assert all(row["step_seconds_per_entry"] > 0 and row["refresh_seconds_per_entry"] > 0 for row in rows)
    states = {(row["order"], row["finder"]): row["state"] for row in rows}
    assert states[3, "Exact"] == 3 * 4 * 2 + 2 * 2**3
    assert states[4, "TrainSVD"] == 2 * 4 * 2 + 2 * 4 * 2**2 + 2 * 2**2  # 2 d r + (N - 2) d r^2, and two moments
    summary = {row["finder"]: row for row in subspace.order_summary(rows, size=4, rank=2, far=(8, 16))}
    assert summary["TrainSVD"]["exponent"] == pytest.approx(
        math.log(states[4, "TrainSVD"] / states[3, "TrainSVD"], 4 / 3)
    )
    assert 1 < summary["TrainSVD"]["far_exponent"] < summary["TrainSVD"]["exponent"]
    assert summary["TrainSVD"]["state_per_mode"] == [4 * 2**2]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_errors_of_tensor_trains(noise):
    x = gradients.train_tensor(8, 4, 3, noise, 0)
    rows = {row["method"]: row for row in subspace.decompositions(x, 3, rounds=1)}
    cores = tt_svd(x, 3)
    direct = torch.einsum("iaj,jbk,kcl,ldm->abcd", *cores)
    assert rows["tt_svd"]["error"] == pytest.approx(float((direct - x).norm() / x.norm()), rel=1e-3, abs=1e-6)
    assert (rows["tt_svd"]["error"] < 1e-5) == (noise == 0)
    if rows[subspace.TENSORLY]["status"] == "measured":
        assert rows[subspace.TENSORLY]["error"] == pytest.approx(rows["tt_svd"]["error"], rel=0.02, abs=1e-5)
        assert rows[subspace.TENSORLY]["faster_than_tensorly"] == 1


def test_a_missing_rival_is_said_to_be_missing(monkeypatch):
    def missing(x, rank):
        raise ImportError

    monkeypatch.setitem(subspace.TT_METHODS, subspace.TENSORLY, missing)
    rows = subspace.decompositions(gradients.train_tensor(4, 3, 2, 0.0, 0), 2, rounds=1)
    assert rows[-1] == {"method": subspace.TENSORLY, "status": "not installed"}
    assert all(row["faster_than_tensorly"] is None for row in rows[:-1])


def test_increments():
    steps = list(gradients.turning(6, 4, 2, 5))
    assert [x.shape for x in steps] == [(6, 6, 6, 6)] * 5
    rows = {row["method"]: row for row in subspace.increments(steps, 2, recompute_every=2)}
    assert rows["TrainIncrement"]["refreshes"] == 4 and rows["TrainSVD, Gram"]["refreshes"] == 2
    assert {row["compared_at"] for row in rows.values()} == {2}
    assert all(0 < row["energy"] <= 1 + 1e-6 and row["faster_than"][name] == 1 for name, row in rows.items())
    # Energy by hand: tt_svd's error at the steps that count.
    kept = [1 - float((subspace.whole(tt_svd(x, 2)) - x).norm() / x.norm()) ** 2 for x in (steps[2], steps[4])]
    assert rows["tt_svd"]["energy"] == pytest.approx(sum(kept) / 2, abs=1e-4)
    assert rows["TrainIncrement"]["energy_of"]["TrainSVD, Gram"] == pytest.approx(1, abs=0.05)


def test_gradients_are_those_of_the_training():
    task = Small()
    torch.manual_seed(0)
    model = task.model()
    wanted = {"first": lambda name, p: name == "0.weight"}
    found = gradients.saved(task, model, wanted, warmup=2, steps=3, batch=8, rate=1e-2)["first"]
    assert [g.shape for g in found] == [(24, 16)] * 3
    assert len(task.batches) == 5 and not torch.equal(found[0], found[1])
    with pytest.raises(ValueError, match="no parameter for second"):
        gradients.saved(task, model, {"second": lambda name, p: False}, warmup=0, steps=1, batch=8, rate=1e-2)


def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    tiny = dataclasses.replace(
        command.QUICK, every=2, steps=5, orders=(3, 4), rounds=1, train_size=6, train_rounds=1, rank=2, stream_size=6,
        stream_steps=5,
    )  # fmt: skip
    monkeypatch.setattr(command, "QUICK", tiny)
    monkeypatch.setattr(subspace, "INNER", 500)
    monkeypatch.setattr(command, "from_training", lambda warmup, steps, wide: [stream(s, steps) for s in SHAPES])
    with pytest.raises(SystemExit) as end:
        main(["bench", "subspace", "--quick", "--out", str(tmp_path / "out")])
    assert end.value.code == 0
    found = json.loads((tmp_path / "out" / "subspace.json").read_text())
    assert found["command"].startswith("comoving bench subspace --quick --out")
    assert (
        found["machine"]["threads"] == 1
        and found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    )
    assert {row["tensor"] for row in found["streams"]} == {str(shape) for shape in SHAPES}
    printed, text = capsys.readouterr().out, (tmp_path / "out" / "subspace.md").read_text()
    for table in report.tables(found):
        assert table.title in text
        assert all(len(row) == len(table.headings) for row in table.rows)
        assert table.title.split()[0] in printed
    for name in ("accuracy", "order"):
        assert (tmp_path / "out" / f"subspace-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_targets_tell_met_from_missed():
    def row(finder, time, energy):
        return {"tensor": "t", "every": 4, "ranks": (2, 2, 2), "finder": finder, "time_of_exact": time,
                "time_of_exact_every_step": 2 * time, "energy_of_exact": energy}  # fmt: skip

    rates = [row("slices 1%", 0.1, 0.9), row("slices 5%", 0.3, 0.985), row("slices 10%", 0.5, 0.999)]
    found = {
        "streams": [row("StreamingTucker", 0.2, 0.97)], "rates": rates, "orders": {"summary": []}, "trains": [],
        "increments": [],
    }  # fmt: skip
    lines = report.targets(found)
    assert [line["met"] for line in lines] == [True, False, False, False]
    assert lines[0]["reached"] == "3.33x at 0.985 (slices 5%)"
