"""The list of recipes: formulas of state against what is really held, the page, the command."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import comoving
from comoving import catalogue, cli
from comoving.codecs import Int8, Spec
from comoving.finders import Power
from comoving.formula import StateFormula, formula_of
from comoving.frames import Modes
from comoving.recipes import Recipe
from comoving.residual import Feedback
from contract.support import Holder, randn, step

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


IN_WORDS = {
    "tensorgrad": (
        "mr + 2 nr + 0.1 mn + 0.2 B mn", lambda m, n, r: 4 * (m * r + 2 * n * r) + 0.6 * m * n
    ),
    "comoving": ("within budget=", lambda m, n, r: m * n * (1 + 4 / 2048) + 4 * 256),
}  # fmt: skip
"""States that are no polynomials with whole numbers of entries."""


@pytest.mark.parametrize("name", comoving.recipes())
def test_a_formula_counts_the_bytes_that_are_held(name):
    m, n, r = 512, 768, 256
    model = Holder(torch.zeros(m, n))
    (p,) = model.parameters()
    optimizer = comoving.build(name, model, rank=r, **({"refresh_every": 1} if not known(name).full_rank else {}))
    for seed in (1, 2):
        step(optimizer, p, randn((m, n), torch.float32, seed))
    counted, formula = comoving.state_bytes(optimizer), known(name).state_formula()
    if name in IN_WORDS:
        says, count = IN_WORDS[name]
        assert formula is None
        assert known(name).state == says
        assert counted == pytest.approx(count(m, n, r), rel=0.02)
        return
    assert formula is not None
    assert counted == formula.total(m, n, r)


def known(name):
    return comoving.recipes()[name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adamw", "2 mn"),
        ("galore", "mr + 2 nr"),
        ("ldadam", "mn + mr + 2 nr"),
        ("tt-adam", "mr + nr + 2 r²"),
        ("flora", "nr + m + n"),
        ("dct-adamw", "2 nr + 1.016 B mn + 8 B r"),
        ("comoving-adamw", "mr + 1.016 B mn + 3.047 B nr"),
    ],
)
def test_formulas(name, says):
    assert str(known(name).state_formula()) == says


def test_anybody_s_recipe_has_a_formula():
    options = {"finder": Power(), "moments": Int8(), "residual": Feedback(lazy=False), "codec": Int8(block=64)}
    formula = Recipe("mine", "", "", options).state_formula()
    assert (formula.numbers["mr"], formula.coded["nr"], formula.coded["mn"]) == (1, 2, 1)
    assert formula.numbers["mn"] == Fraction(1, 64)
    assert str(Recipe("both", "", "", {"side": "both"}).state_formula()) == "mr + nr + 2 r²"


def test_what_is_no_polynomial_has_none():
    assert formula_of(lambda m, n, r: {"x": Spec((m * n * r,), torch.float32)}) is None
    assert formula_of(lambda m, n, r: {"x": Spec((min(m, 1400),), torch.int8)}) is None
    found = formula_of(lambda m, n, r: {"x": Spec((2 * n - m,), torch.float32), "y": Spec((), torch.int64)})
    assert str(found) == "-1 m + 2 n"
    assert str(formula_of(lambda m, n, r: {})) == "0"
    only_tensors = {"frame": Modes(), "side": "left", "view": "pairs"}
    assert Recipe("none", "", "", only_tensors).state_formula() is None


def test_totals_count_single_numbers():
    formula = StateFormula({"mn": Fraction(2), "1": Fraction(3)}, {"r": Fraction(8)})
    assert formula.total(4, 5, 2) == 4 * (2 * 20 + 3) + 16
    assert str(formula) == "2 mn + 8 B r"


def test_entries_are_sorted_and_complete():
    entries = catalogue.entries()
    assert {e["name"] for e in entries} == set(comoving.recipes())
    keys = [(e["full_rank"], e["name"]) for e in entries]
    assert keys == sorted(keys)
    assert all(e["state"] and e["summary"] and e["paper"] for e in entries)
    galore = next(e for e in entries if e["name"] == "galore")
    assert list(galore["parts"]) == ["finder", "transport", "residual", "codec", "refresh_every", "scale"]


def test_the_page_is_up_to_date():
    """Else: comoving recipes --markdown > docs/recipes.md."""
    assert PAGE.read_text() == catalogue.as_markdown()


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["recipes", *arguments])
    return ended.value.code, *capsys.readouterr()


@pytest.fixture
def few(monkeypatch):
    pytest.importorskip("typer")
    chosen = {name: known(name) for name in ("adamw", "galore")}
    monkeypatch.setattr(catalogue, "recipes", lambda: chosen)


def test_the_command_prints_a_table(few, capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert all(word in out for word in ("galore", "2403.03507", "mr + 2 nr", "finder: Exact()", "|g|^2", "2 mn"))


def test_the_command_prints_json_and_the_page(few, capsys):
    status, out, _ = run(capsys, "--json")
    assert (status, [e["name"] for e in json.loads(out)]) == (0, ["galore", "adamw"])
    status, out, _ = run(capsys, "--markdown")
    assert (status, out) == (0, catalogue.as_markdown())
    assert "| [2403.03507](https://arxiv.org/abs/2403.03507) | mr + 2 nr |" in out
    status, _, errors = run(capsys, "--json", "--markdown")
    assert (status, errors.count("\n")) == (2, 1)
    assert "choose one" in errors
