"""Write the traces of today's engine: ``PYTHONPATH=src:tests python -m golden.record [recipe ...]``.

Write them anew only for a change that is meant to change what a recipe does. They are recorded with every parameter
stepped alone, and hold for those that are stepped together.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import comoving
from comoving.engine import Engine

from .scenarios import SCENARIOS, trace

FOLDER = Path(__file__).parent / "traces"
REFUSED = "refused"


def outcome(recipe: str, scenario: str) -> dict[str, Any]:
    """The trace, or under ``REFUSED`` the type of the refusal and how it begins."""
    try:
        run = SCENARIOS[scenario](recipe)
    except (TypeError, ValueError) as error:
        return {REFUSED: [type(error).__name__, str(error)[:60]]}
    return {**trace(run)}


def text(outcomes: dict[str, dict[str, Any]]) -> str:
    """One line a parameter, of numbers with ten digits."""
    blocks = []
    for scenario, found in outcomes.items():
        lines = [f'  "{name}": {json.dumps(_rounded(x), separators=(",", ":"))}' for name, x in found.items()]
        blocks.append(f'"{scenario}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def main(chosen: list[str]) -> None:
    """Record these recipes, or all."""
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    Engine.stacked_entries = 0
    for recipe in chosen or comoving.recipes():
        found = {scenario: outcome(recipe, scenario) for scenario in SCENARIOS}
        (FOLDER / f"{recipe}.json").write_text(text(found))


if __name__ == "__main__":
    main(sys.argv[1:])
