"""The study behind the default's table, without training."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from comoving.composition import Table, measured
from comoving.composition.table import FILE

STUDY = Path(__file__).parents[2] / "benchmarks" / "budgets.py"


@pytest.fixture(scope="module")
def budgets():
    pytest.importorskip("typer")
    spec = importlib.util.spec_from_file_location("budgets", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_package_is_that_of_the_study(budgets):
    """Else: python benchmarks/study.py table."""
    read = Table.read({"roles": budgets.CANDIDATES})
    assert read.rows.keys() == measured().rows.keys()
    for role, choices in read.rows.items():
        own = measured().rows[role]
        assert [(c.name, c.options, c.rate, c.width) for c in own] == [
            (c.name, c.options, c.rate, c.width) for c in choices
        ]
    assert json.loads(FILE.read_text())["command"]


class Runs:
    """Validation is best at a rate and a ratio of its own."""

    def __init__(self):
        self.entries = {label: SimpleNamespace(rates=[0.01]) for label in ("x", "x:4", "x:16")}
        self.asked = []

    def one(self, label, rate, seed):
        self.asked.append((label, rate, seed))
        return abs({"x": 1, "x:4": 4, "x:16": 16}[label] - 4) + abs(rate - 0.04) + 0.001 * seed

    def all(self, runs):
        return [self.one(*run) for run in runs]

    def state(self, label, rate):
        return {"state": 5, "parameters": 10}


def test_rivals_are_tuned_in_ratio_and_rate(budgets):
    line = budgets._tuned(Runs(), "x", ["x", "x:4", "x:16"], 3)
    assert (line["label"], line["rate"]) == ("x:4", 0.04)
    assert line["seeds"] == pytest.approx([0.0, 0.001, 0.002]) and line["deviation"] == pytest.approx(0.001)
    assert len(line["tried"]) == 3 + 3  # three ratios; then rates .02, .04 and .08, with which the best has both sides


def test_a_frontier_is_drawn_and_said(budgets, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [("adamw", 1.0, 800), ("muon", 0.9, 400), ("comoving, 1/2", 0.8, 390), ("comoving, 0", 0.85, 0)]
    found = {
        "task": "lm",
        "contenders": [
            {"contender": n, "mean": m, "deviation": 0.01, "state": s, "rate": 0.1, "parameters": 400}
            for n, m, s in lines
        ],
    }
    assert budgets.shares(found) == {"adamw": 1, "muon": 0.5, "comoving, 1/2": 390 / 800, "comoving, 0": 0}
    assert budgets.lines(found)[0].startswith("comoving, 1/2")
    budgets.draw([found, found], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
