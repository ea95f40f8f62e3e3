"""Every recipe does to weights what was recorded."""

import json
from functools import cache
from math import isfinite
from typing import Any

import pytest

import comoving
from golden.record import FOLDER, REFUSED, outcome
from golden.scenarios import SCENARIOS, STEPS

USUAL = 1e-7
"""What a step may differ by, as a share of its root mean square: other kernels, and another order of sums, differ by
less than 1e-8 in float64."""
SINGLE = 1e-5
"""Where something is kept or drawn in float32, whose last digit is each kernel's own: the steps of codes, and the
sketches of increments. The codes themselves agree: on the edge of two of them lies one float64 in 10^9."""
BFLOAT16 = 2e-2
"""Where all is worked in float32, and then rounded stochastically to neighbours some 1e-2 of a step apart: an entry
whose draw lies on the edge goes to the other one, and of some hundred entries few do."""
IN_CODES = {"coded", "quantized", "comoving-adamw", "dct-adamw", "q-galore"}
SKETCHED = {"tt-ice-adam", "ht-rise-adam"}


def tolerance(recipe: str, scenario: str) -> float:
    if scenario == "bf16":
        return BFLOAT16
    return SINGLE if {recipe, scenario} & (IN_CODES | SKETCHED) else USUAL


@cache
def recorded(recipe: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{recipe}.json").read_text())


def test_every_recipe_and_scenario_is_recorded():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(comoving.recipes())
    assert all(list(recorded(recipe)) == list(SCENARIOS) for recipe in comoving.recipes())


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("recipe", comoving.recipes())
def test_weights_change_as_recorded(recipe, scenario):
    expected, found = recorded(recipe)[scenario], outcome(recipe, scenario)
    if REFUSED in expected or REFUSED in found:
        assert found == expected
        return
    assert list(found) == list(expected)
    most = tolerance(recipe, scenario)
    for name, steps in expected.items():
        assert len(found[name]) == len(steps) == STEPS
        for t, (own, given) in enumerate(zip(found[name], steps, strict=True)):
            worst = max(abs(a - b) for a, b in zip(own, given, strict=True))
            assert all(map(isfinite, own)) and worst <= most * given[0], f"{name}, step {t}: {own} is not {given}"
