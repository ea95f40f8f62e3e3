"""The snippets of the documentation run as they stand."""

import re
from pathlib import Path

import pytest
import torch

SECTION = "## Branches, gain, extraction"
TEXT = Path(__file__).parents[2].joinpath("docs/directions.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", re.split(r"\n## ", TEXT.split(SECTION)[1])[0], re.DOTALL)


@pytest.mark.parametrize("number", range(3))
def test_snippet(number):
    assert len(SNIPPETS) == 3
    with torch.random.fork_rng():
        exec(SNIPPETS[number], {"__name__": "snippet"})
