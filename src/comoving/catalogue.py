"""The recipes as a table: in a terminal, as JSON, and as the page docs/recipes.md."""

import json
import re
from typing import Any

from .recipes import Recipe, recipes

_ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
_HEAD = """\
# Recipes

Every method is a composition of the engine's parts: `comoving.build(name, model, lr, rank=...)`. This page is made by
`comoving recipes --markdown`.

The state is that of one real m x n matrix, m <= n, at rank r: how many float32 numbers, then bytes (B) of what is
stored otherwise, without step counts and other single numbers. It is read off the layout of the state, not written by
hand; dense parameters (embeddings, heads, norms, biases) have AdamW's, 2 mn. Parts that are not named have their
defaults. The rate is where to start looking, as a multiple of AdamW's.
"""
_ROLES = (
    "view",
    "precondition",
    "frame",
    "finder",
    "cadence",
    "transport",
    "rule",
    "residual",
    "codec",
    "moments",
    "bases",
    "ranks",
)
_KINDS = {"Low rank": False, "Full rank": True}


def entries() -> list[dict[str, Any]]:
    """A plain dict per recipe: those of low rank first, each kind by name."""
    return [_entry(r) for r in sorted(recipes().values(), key=lambda r: (r.full_rank, r.name))]


def _entry(recipe: Recipe) -> dict[str, Any]:
    formula = recipe.state_formula()
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "paper": recipe.paper,
        "full_rank": recipe.full_rank,
        "relative_rate": recipe.relative_rate,
        "state": recipe.state or (None if formula is None else str(formula)),
        "parts": {role: recipe.parts[role] for role in sorted(recipe.parts, key=_place)},
    }


def _place(role: str) -> int:
    """Roles in the order of a step, then numbers."""
    return _ROLES.index(role) if role in _ROLES else len(_ROLES)


def as_json() -> str:
    """The entries as a JSON list."""
    return json.dumps(entries(), indent=2, ensure_ascii=False)


def as_markdown() -> str:
    """The page docs/recipes.md."""
    sections = [_HEAD]
    found = entries()
    for title, full_rank in _KINDS.items():
        lines = ["| recipe | what it is | paper | state | rate | parts |", "|---|---|---|---|---|---|"]
        for entry in found:
            if entry["full_rank"] == full_rank:
                paper = _ARXIV.sub(lambda id: f"[{id[0]}](https://arxiv.org/abs/{id[0]})", entry["paper"])
                parts = "<br>".join(f"{role} `{choice}`" for role, choice in entry["parts"].items())
                cells = [f"`{entry['name']}`", entry["summary"], paper, entry["state"] or "–"]
                cells = [*cells, f"{entry['relative_rate']:g}", parts or "–"]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        sections.append("\n".join([f"## {title}", "", *lines, ""]))
    return "\n".join(sections)


def as_table() -> Any:
    """A table of rich, which the extra "cli" installs."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(
        show_lines=True, caption="state: of an m x n matrix, m <= n, at rank r; float32 numbers, then bytes (B)"
    )
    for heading in ("recipe", "what it is", "paper", "state", "parts"):
        table.add_column(heading, overflow="fold")
    for entry in entries():
        parts = "\n".join(f"{role}: {choice}" for role, choice in entry["parts"].items())
        cells = (entry["name"], entry["summary"], entry["paper"] or "–", entry["state"] or "–", parts or "–")
        table.add_row(*(Text(cell) for cell in cells))
    return table
