"""The report: one HTML file with everything in it, and its pictures as files."""

import base64
import html
from pathlib import Path
from typing import Any

from comoving.files import write_bytes, write_text
from comoving.race import pictures
from comoving.race.table import DASH, columns, remarks

CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #e3e3e3;white-space:nowrap}
th{color:#555;font-weight:600;white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}tr.best td{font-weight:600}
.wide{overflow-x:auto}img{max-width:100%}code,pre{background:#f5f5f5;border-radius:3px;padding:.1rem .3rem}
pre{padding:.7rem;overflow-x:auto}dt{font-weight:600}dd{margin:0 0 .3rem 1rem}.small{color:#666;font-size:13px}
"""


def picture(data: bytes, text: str) -> str:
    """An image whose bytes are in the page."""
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def table(found: dict[str, Any]) -> str:
    """The summary, best contender first; the refused and failed have a line as well."""
    chosen = columns(found)
    head = "".join(f'<th title="{html.escape(c.meaning)}">{html.escape(c.heading)}</th>' for c in chosen)
    rows: list[str] = []
    for i, line in enumerate(found["summary"]):
        if line["status"] == "finished":
            cells = [c.show(line) for c in chosen]
        else:
            cells = [line["contender"], line["status"], *[DASH] * (len(chosen) - 2)]
        kind = ' class="best"' if i == 0 and line["status"] == "finished" else ""
        rows.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def pairs(values: dict[str, Any]) -> str:
    """A mapping in one paragraph."""
    return "; ".join(f"{html.escape(str(k))} <b>{html.escape(str(v))}</b>" for k, v in values.items() if v is not None)


def sweep(found: dict[str, Any]) -> str:
    """Final validation of every run: contender, rate, seeds."""
    groups: dict[tuple[str, float], list[str]] = {}
    for run in found["runs"]:
        value = f"{run['final']:.4g}" if run["status"] == "finished" else run["status"]
        groups.setdefault((run["contender"], run["rate"]), []).append(value)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{rate:g}</td><td>{html.escape(', '.join(values))}</td></tr>"
        for (name, rate), values in groups.items()
    )
    return f"<table><tr><th>optimizer</th><th>rate</th><th>final, by seed</th></tr>{rows}</table>"


def page(found: dict[str, Any], curves: bytes, frontier: bytes, updates: bytes | None) -> str:
    """The whole HTML text; it refers to nothing outside itself."""
    task, settings = found["task"], found["settings"]
    seeds = f"{settings['seeds']} seed" + ("s" if settings["seeds"] > 1 else "")
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in remarks(found))
    legend = "".join(f"<dt>{html.escape(c.heading)}</dt><dd>{html.escape(c.meaning)}</dd>" for c in columns(found))
    moves = (
        ""
        if updates is None
        else f"<h2>How far a step moves each role</h2>{picture(updates, 'Update over weight of every role')}"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Race: {html.escape(task["title"])}</title><style>{CSS}</style></head>
<body>
<h1>Race: {html.escape(task["title"])}</h1>
<p class="small">{settings["steps"]} steps of {settings["batch"]} samples, {seeds}, rank {settings["rank"]}; every
contender from the same initialization on the same batches, each at the best of its rates{
        f", trained by {settings['ranks']} processes" if settings["wrapping"] else ""
    }. Lower is better.</p>
{table(found)}
{f"<ul>{notes}</ul>" if notes else ""}
<h2>Curves</h2>
{picture(curves, "Training loss and validation of every contender")}
<h2>Quality against optimizer state</h2>
{picture(frontier, "Validation against bytes of optimizer state")}
{moves}
<h2>All rates</h2>
{sweep(found)}
<h2>What the columns mean</h2>
<dl class="small">{legend}</dl>
<h2>How it was run</h2>
<pre>{html.escape(found["command"])}</pre>
<p class="small">Settings: {pairs(settings)}</p>
<p class="small">Machine: {pairs(found["machine"])}</p>
<p class="small">Versions: {pairs(found["versions"])}</p>
</body></html>
"""


def save(found: dict[str, Any], out: Path) -> Path:
    """Write ``curves.png``, ``frontier.png``, ``updates.png`` and ``report.html`` into ``out``."""
    curves, frontier, updates = pictures.curves(found), pictures.frontier(found), pictures.updates(found)
    write_bytes(out / "curves.png", curves)
    write_bytes(out / "frontier.png", frontier)
    if updates is not None:
        write_bytes(out / "updates.png", updates)
    write_text(out / "report.html", page(found, curves, frontier, updates))
    return out / "report.html"
