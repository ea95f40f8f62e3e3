"""The report of one or several studies: one HTML file with everything in it, and the verdicts for the terminal."""

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comoving.files import write_text
from comoving.lab import pictures
from comoving.lab.statistics import finite
from comoving.lab.times import crossing, explosions, labels, targets
from comoving.lab.verdicts import NO, RULES, UNKNOWN, YES, judge
from comoving.lab.verdicts.base import Arm, Results, Verdict, arms, baseline_of, diverged, final, runs, seeds, validated
from comoving.race.extras import require
from comoving.race.report import CSS, picture
from comoving.race.table import DASH

COLORS = {YES: ("yes", "green"), NO: ("no", "red"), UNKNOWN: ("unknown", "yellow")}
"""Answer -> class in the page, color in the terminal."""
STYLE = (
    CSS
    + """
td.text{white-space:normal;text-align:left;min-width:24rem}td.word{text-align:left}tr td:nth-child(2){text-align:left}
.yes{color:#00664a;background:#e0f3ec;font-weight:600}.no{color:#993c00;background:#fbe8dc;font-weight:600}
.unknown{color:#665;background:#f3f0e0}nav a{margin-right:1rem}article{border-top:2px solid #ddd;margin-top:3rem}
"""
)


def number(value: Any, digits: int = 4) -> str:
    """A number, or a dash for none."""
    known = finite(value)
    return DASH if known is None else f"{known:.{digits}g}"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return DASH
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"


def figures(found: dict[str, Any]) -> str:
    """The figures of a verdict in one line; what does not exist is a dash."""
    said: list[str] = []
    for name, value in found.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            shown = ", ".join(number(v, 3) for v in value) or DASH
        else:
            shown = value if isinstance(value, str) else number(value, 3)
        said.append(f"{name} {shown}")
    return "; ".join(said)


def cell(text: str, kind: str = "") -> str:
    """One cell of a table, its text escaped."""
    shown = f' class="{kind}"' if kind else ""
    return f"<td{shown}>{html.escape(text)}</td>"


def rows(heads: Sequence[str], lines: Sequence[str]) -> str:
    """A table from its headings and the cells of its lines."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{cells}</tr>" for cells in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Every verdict with its text and, small, its figures."""
    if not verdicts:
        return "<p>There is nothing to judge: no arm beside the baseline, and no readings of directions.</p>"
    lines = [
        cell(v.criterion)
        + cell(v.arm)
        + cell(v.answer, COLORS[v.answer][0])
        # The figures in the page too, so that it holds everything a reader may want to check.
        + f'<td class="text">{html.escape(v.text)}<br><span class="small">{html.escape(figures(v.figures))}</span></td>'
        for v in verdicts
    ]
    return rows(("criterion", "arm", "answer", "why"), lines)


def reach(results: Results, arm: Arm, label: str) -> str:
    """Mean steps (and seconds) to a target over the seeds that arrive, and how many do where not all."""
    base, own = runs(baseline_of(results, arm)), runs(arm)
    found: list[tuple[float, float | None]] = []
    for seed, run in own.items():
        target = targets(results["metric"], validated(base.get(seed)))[label]
        there = None if target is None else crossing(run.get("curve") or [], target, results["metric"]["goal"])
        if there is not None:
            found.append((there.step, there.seconds))
    if not found:
        return f"never ({len(own)} runs)" if own else DASH
    seconds = [time for _, time in found if time is not None]
    text = f"{statistics.fmean(step for step, _ in found):.0f}"
    text += f" / {statistics.fmean(seconds):.3g} s" if len(seconds) == len(found) else ""
    return text + (f" ({len(found)} of {len(own)})" if len(found) < len(own) else "")


def tried(arm: Arm) -> str:
    """Rates and the first seed's final at each."""
    rates = arm.get("rates") or {}
    return ", ".join(f"{r}: {'diverged' if v is None else number(v)}" for r, v in rates.items()) or DASH


def arm_table(results: Results) -> str:
    """One line per arm: rates, finals, what went wrong, times to targets."""
    names = labels(results["metric"])
    lines: list[str] = []
    for arm in arms(results):
        own = runs(arm)
        finals = [value for value in (final(run) for run in own.values()) if value is not None]
        wrong = [explosions(run) for run in own.values()]
        state = f"{len(finals)} of {len(seeds(results, arm))} finished"
        state += f", {len(diverged(arm))} diverged" if diverged(arm) else ""
        state += f": {arm['error']}" if arm.get("error") else ""
        lines.append(
            cell(arm["name"])
            + cell(arm.get("summary") or "", "text")
            + "".join(cell(text) for text in (arm.get("role") or DASH, number(arm.get("rate")), tried(arm)))
            + "".join(cell(text) for text in (spread(finals), state, str(sum(len(w.spikes) for w in wrong))))
            + "".join(cell(reach(results, arm, name)) for name in names)
        )
    heads = ("arm", "what it is", "role", "rate", "rates tried", results["metric"]["name"], "runs", "spikes")
    return rows((*heads, *(f"steps / time to {name}" for name in names)), lines)


def flat(values: Any) -> str:
    """A mapping in one paragraph, names and values escaped."""
    pairs = (values or {}).items()
    return "; ".join(f"{html.escape(str(k))} <b>{html.escape(str(v))}</b>" for k, v in pairs if v is not None) or DASH


def called(results: Results) -> str:
    """A study's name with its configuration's, escaped; the anchor of its part of the page too."""
    config = (results.get("config") or {}).get("name")
    return html.escape(f"{results.get('study', '')}{f', {config}' if config else ''}")


def section(results: Results, verdicts: Sequence[Verdict]) -> str:
    """The part of the page on one study."""
    metric = results["metric"]
    seeded = int(results.get("seeds") or 0)
    asked = {v.criterion.partition(":")[0] for v in verdicts}
    rules = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in RULES.items() if name in asked)
    shown = "".join(
        f"<h3>{heading}</h3>"
        + (
            f'<p class="small">{words}</p>{picture(data, heading)}'
            if data is not None
            else '<p class="small">Nothing to draw: the runs hold no such data.</p>'
        )
        for heading, words, data in pictures.everything(results)
    )
    followed = "".join(f"<li>{html.escape(text)}</li>" for text in results.get("followups") or [])
    direction = "higher" if metric["goal"] == "max" else "lower"
    return f"""<article id="{called(results)}">
<h2>Study {called(results)}: {html.escape(str(results.get("title", "")))}</h2>
<p>{html.escape(str(results.get("question", "")))}</p>
<p class="small">{seeded} seed{"" if seeded == 1 else "s"}, paired: same initialization and batches in every arm, each
at the best of its rates. {html.escape(metric["name"])}, {direction} is better; tolerance {metric["tolerance"]:g}
{html.escape(metric.get("unit", ""))}.</p>
<h3>Verdicts</h3>
{verdict_table(verdicts)}
<p class="small">Each answer stands alone at a level of 5%; nothing corrects for there being {len(verdicts)}.</p>
<h3>Rules</h3>
<dl class="small">{rules}</dl>
<h3>Arms</h3>
{arm_table(results)}
{shown}
<h3>Follow-ups</h3>
{f"<ul>{followed}</ul>" if followed else '<p class="small">None were run.</p>'}
<h3>How it was run</h3>
<pre>{html.escape(str(results.get("command", "")))}</pre>
<p class="small">Configuration: {flat(results.get("config"))}</p>
<p class="small">Machine: {flat(results.get("machine"))}</p>
<p class="small">Versions: {flat(results.get("versions"))}</p>
</article>"""


def page(studies: Sequence[Results]) -> str:
    """The whole HTML text; it refers to nothing outside itself."""
    names = [called(results) for results in studies]
    links = "".join(f'<a href="#{name}">study {name}</a>' for name in names) if len(names) > 1 else ""
    body = "\n".join(section(results, judge(results)) for results in studies)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Directions: {", ".join(names)}</title><style>{STYLE}</style></head>
<body>
<h1>Directions: verdicts</h1>
{f"<nav>{links}</nav>" if links else ""}
{body}
</body></html>
"""


def save_all(studies: Sequence[Results], out: Path) -> Path:
    """Write one ``report.html`` on all ``studies`` into the folder ``out``, and return its path.

    Raises:
        ValueError: no study, or one without arms.
        ImportError: matplotlib or scipy is missing (extra ``lab``).
    """
    if not studies:
        raise ValueError("there is no study to report on")
    path = out / "report.html"
    write_text(path, page(studies))
    return path


def save(results: Results, out: Path) -> Path:
    """Write ``report.html`` on one study into the folder ``out``, and return its path."""
    return save_all([results], out)


def table(results: Results, verdicts: Sequence[Verdict], details: bool = False) -> Any:
    """The verdicts as a :class:`rich.table.Table`; those on speed at other targets only with ``details``."""
    rich, markup = require("rich.table", "lab"), require("rich.markup", "lab")
    name = results.get("study", "")
    found = rich.Table(title=markup.escape(f"Study {name}: {results.get('title', '')}"), title_justify="left")
    for heading in ("criterion", "arm", "answer"):
        found.add_column(heading, no_wrap=heading == "answer")
    found.add_column("why", ratio=1)
    for v in verdicts:
        if v.criterion.startswith("speed:") and not details:
            continue
        answer = f"[{COLORS[v.answer][1]}]{v.answer}[/]"
        found.add_row(markup.escape(v.criterion), markup.escape(v.arm), answer, markup.escape(v.text))
    return found
