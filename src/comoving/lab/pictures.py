"""Pictures of a study: curves, times, spectra, directions over time, mechanism; each as PNG, or None without data."""

import math
import statistics
from typing import Any

from comoving.lab.statistics import finite
from comoving.lab.times import labels, targets
from comoving.lab.verdicts.base import Arm, Results, Run, arms, baseline_of, runs, validated
from comoving.lab.verdicts.mechanism import QUANTITIES, points
from comoving.lab.verdicts.speed import SAVING, times
from comoving.lab.verdicts.stability import largest
from comoving.lab.verdicts.stable import OBJECTS
from comoving.race.extras import require
from comoving.race.pictures import COLORS, DASHES, STYLE, canvas, png, spread_apart

LAYERS = 4
PARTS = tuple(part.rstrip("/") for part in OBJECTS.values() if part)
Series = list[tuple[float, float]]


def style_of(results: Results) -> dict[str, tuple[str, str]]:
    """Color and dash of each arm, by its place, so that all pictures agree; baselines are black."""
    found: dict[str, tuple[str, str]] = {}
    colors = COLORS[:-1]
    for i, arm in enumerate(arms(results, "treatment", "control")):
        found[arm["name"]] = (colors[i % len(colors)], DASHES[i // len(colors) % len(DASHES)])
    for i, arm in enumerate(arms(results, "baseline")):
        found[arm["name"]] = ("#000000", DASHES[i % len(DASHES)])
    return found


def series(readings: Any) -> Series:
    """The readings that are numbers."""
    pairs = [(float(step), finite(value)) for step, value in readings or []]
    return [(step, value) for step, value in pairs if value is not None]


def mean_series(many: list[Series]) -> Series:
    """At each step the mean over those that have it, as far as all that exist go."""
    many = [one for one in many if one]
    at: dict[float, list[float]] = {}
    for one in many:
        for step, value in one:
            at.setdefault(step, []).append(value)
    return [(step, statistics.fmean(values)) for step, values in sorted(at.items()) if len(values) == len(many)]


def line(axes: Any, values: Series, style: tuple[str, str], **options: Any) -> None:
    """Draw one series."""
    if values:
        axes.plot(*zip(*values, strict=True), style[1], color=style[0], **{"lw": 1.6, **options})


def titled(axes: Any, text: str, below: str = "step") -> None:
    """Title at the left, as in all pictures of this package."""
    axes.set_title(text, loc="left", fontsize=11, color="#333333")
    axes.set_xlabel(below)


def legend(figure: Any, results: Results, names: list[str]) -> None:
    """The arms that were drawn, at the right of everything."""
    lines = require("matplotlib.lines", "cli")
    handles = [
        lines.Line2D([], [], color=color, ls=dash, lw=2, label=name)
        for name, (color, dash) in style_of(results).items()
        if name in names
    ]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=10)


def draw_curves(axes: Any, results: Results, shown: list[Arm], baseline: Arm) -> list[str]:
    """Held-out values of some arms and their baseline, with the targets; the names of those that had any."""
    styles, names, late = style_of(results), list[str](), list[float]()
    ends: list[tuple[float, str]] = []
    for arm in [baseline, *shown]:
        many = [series([(p["step"], p.get("value")) for p in run.get("curve") or []]) for run in runs(arm).values()]
        many = [one for one in many if one]
        for one in many:
            line(axes, one, styles[arm["name"]], lw=0.6, alpha=0.4)
            late += [value for _, value in one[len(one) // 4 :]]
        mean = mean_series(many)
        line(axes, mean, styles[arm["name"]], lw=2)
        if mean:
            names.append(arm["name"])
            ends.append((mean[-1][1], arm["name"]))
    if not late:
        return names
    # The first evaluations are far from the rest; what tells arms apart is beside the end.
    bottom, top = min(late), max(late)
    margin = 0.06 * (top - bottom) or 0.1 * abs(top) or 1.0
    axes.set_ylim(bottom - margin, top + margin)
    metric = results["metric"]
    found = [targets(metric, validated(run)) for run in runs(baseline).values()]
    last = axes.get_xlim()[1]
    for label in labels(metric):
        known = [value for value in (one[label] for one in found) if value is not None]
        height = statistics.fmean(known) if known else bottom - 2 * margin
        if bottom - margin <= height <= top + margin:
            axes.axhline(height, color="#888888", lw=0.8, ls=(0, (2, 2)))
            axes.annotate(label, (0, height), fontsize=8, color="#666666", va="bottom")
    ends.sort()
    heights = spread_apart([end for end, _ in ends], 0.07 * (top - bottom + 2 * margin))
    for (end, name), height in zip(ends, heights, strict=True):
        axes.annotate(
            f"{name}  {end:.4g}", (last, height), color=styles[name][0], va="center", fontsize=9, annotation_clip=False
        )
    axes.set_xlim(0, last)
    return names


def held_out(results: Results) -> bytes | None:
    """Held-out curves: every seed thin, means thick; treatments and controls each beside the baseline, per task."""
    groups: list[tuple[str, Arm, list[Arm]]] = []
    for baseline in arms(results, "baseline"):
        task = f", {baseline['task']} task" if baseline.get("task") else ""
        for role in ("treatment", "control"):
            chosen = [arm for arm in arms(results, role) if baseline_of(results, arm) is baseline]
            if chosen:
                groups.append((f"{role}s{task}", baseline, chosen))
        if not any(one is baseline for _, one, _ in groups):
            groups.append((f"baseline{task}", baseline, []))
    if not any(run.get("curve") for arm in arms(results) for run in runs(arm).values()):
        return None
    if not groups:
        return None
    with require("matplotlib", "cli").rc_context(STYLE):
        figure = canvas(11.5, 4.2 * math.ceil(len(groups) / 2))
        panels = figure.subplots(math.ceil(len(groups) / 2), min(2, len(groups)), squeeze=False).flatten()
        for axes, (title, baseline, chosen) in zip(panels, groups, strict=False):
            draw_curves(axes, results, chosen, baseline)
            titled(axes, f"{results['metric']['name']}: {title}")
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        return png(figure)


def ratios(results: Results) -> bytes | None:
    """Steps to each target over the baseline's: means, 95% intervals and seeds; left of 1 is faster."""
    chosen = arms(results, "treatment", "control")
    found = {(a["name"], label): times(results, a, label) for a in chosen for label in labels(results["metric"])}
    found = {key: value for key, value in found.items() if value.ratios}
    if not found:
        return None
    styles, names = style_of(results), [arm["name"] for arm in chosen]
    shown = [label for label in labels(results["metric"]) if any(key[1] == label for key in found)]
    with require("matplotlib", "cli").rc_context(STYLE):
        figure = canvas(11.5, 1.4 + 0.34 * len(names))
        for axes, label in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
            for place, name in enumerate(names):
                one, color = found.get((name, label)), styles[name][0]
                if one is None:
                    continue
                axes.plot(list(one.ratios.values()), [place] * len(one.ratios), "o", color=color, ms=3, alpha=0.5)
                if one.test.mean is not None:
                    axes.plot(math.exp(one.test.mean), place, "D", color=color, ms=6)
                if one.test.low is not None and one.test.high is not None:
                    # Three seeds can give an interval of any length; the axis shows where it leaves.
                    low, high = max(math.exp(one.test.low), 0.05), min(math.exp(one.test.high), 20)
                    axes.plot([low, high], [place] * 2, "-", color=color, lw=2)
            axes.axvline(1, color="#555555", lw=1)
            axes.axvline(1 - SAVING, color="#888888", lw=0.8, ls=(0, (2, 2)))
            inner = [r for one in found.values() for r in one.ratios.values()]
            axes.set_xlim(max(0.05, 0.7 * min(*inner, 0.9)), min(20, 1.3 * max(*inner, 1.0)))
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            titled(axes, label, "steps over the baseline's")
        return png(figure)


def layer_names(run: Run) -> list[str]:
    """Layers with a sigma_max, at most four of them, evenly from first to last."""
    keys = [key[len("spec/") : -len("/sigma_max")] for key in run.get("spectra") or {} if key.endswith("/sigma_max")]
    keys = [key for key in keys if key.rpartition("/")[2] not in PARTS]
    if len(keys) <= LAYERS:
        return keys
    return [keys[round(i * (len(keys) - 1) / (LAYERS - 1))] for i in range(LAYERS)]


def spectra(results: Results) -> bytes | None:
    """sigma_max over steps: the largest over layers of every arm, then a few layers with the baseline's other sv."""
    first = {arm["name"]: runs(arm)[min(runs(arm))] for arm in arms(results) if runs(arm)}
    first = {name: run for name, run in first.items() if largest(run)}
    if not first:
        return None
    styles = style_of(results)
    bases = [arm["name"] for arm in arms(results, "baseline") if arm["name"] in first]
    reference = first[(bases or list(first))[0]]
    shown = layer_names(reference)
    with require("matplotlib", "cli").rc_context(STYLE):
        figure = canvas(11.5, 3.2 * math.ceil((len(shown) + 1) / 3))
        panels = figure.subplots(math.ceil((len(shown) + 1) / 3), 3, squeeze=False).flatten()
        for name, run in first.items():
            line(panels[0], [(float(step), value) for step, value in largest(run)], styles[name])
        titled(panels[0], "sigma_max, largest over layers")
        for axes, layer in zip(panels[1:], shown, strict=False):
            kept = reference["spectra"]
            for key in kept:
                if key.startswith(f"spec/{layer}/sv"):
                    line(axes, series(kept[key]), ("#aaaaaa", "-"), lw=0.8)
            for name, run in first.items():
                line(axes, series((run.get("spectra") or {}).get(f"spec/{layer}/sigma_max")), styles[name])
            titled(axes, layer)
        for axes in panels[len(shown) + 1 :]:
            axes.set_visible(False)
        legend(figure, results, list(first))
        return png(figure)


def over_time(results: Results) -> bytes | None:
    """Alignment and energy of the directions used, means over seeds; for studies of a baseline alone, its cosines."""
    styles = style_of(results)
    panels: list[tuple[str, list[tuple[str, tuple[str, str], Series]]]] = []
    for quantity, title in (
        ("alignment", "mean cosine with the momentum's top k"),
        ("energy", "p_t, energy in the directions"),
    ):
        means = [
            (arm["name"], mean_series([series(run.get(quantity)) for run in runs(arm).values()]))
            for arm in arms(results)
        ]
        panels.append((title, [(name, styles[name], mean) for name, mean in means if mean]))
    for side in ("u", "v"):
        found: list[tuple[str, tuple[str, str], Series]] = []
        for i, (thing, part) in enumerate(OBJECTS.items()):
            many = [
                series(readings)
                for arm in arms(results, "baseline")[:1]
                for run in runs(arm).values()
                for key, readings in (run.get("spectra") or {}).items()
                if key.endswith(f"/{part}cos_{side}_mean") and (part or key.split("/")[-2] not in PARTS)
            ]
            mean = mean_series(many)
            if mean:
                found.append((thing, (COLORS[i], "-"), mean))
        panels.append((f"baseline: mean cosine of {side.upper()} with the reading before", found))
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        return None
    with require("matplotlib", "cli").rc_context(STYLE):
        figure = canvas(11.5, 3.6 * math.ceil(len(panels) / 2))
        places = figure.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False).flatten()
        for axes, (title, found) in zip(places, panels, strict=False):
            for name, style, mean in found:
                line(axes, mean, style, label=name)
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False, fontsize=9)
            titled(axes, title)
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        return png(figure)


def scatter(results: Results) -> bytes | None:
    """Mean p_t and mean alignment of every run against its speed-up; hollow: it never arrived."""
    found = {quantity: points(results, quantity) for quantity in QUANTITIES}
    found = {quantity: some for quantity, some in found.items() if some}
    if not found:
        return None
    styles = style_of(results)
    with require("matplotlib", "cli").rc_context(STYLE):
        figure = canvas(5.5 * len(found) + 1.5, 4.2)
        for axes, (quantity, some) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            for point in some:
                color = styles[point.arm][0]
                face = "none" if point.bound else color
                axes.plot(point.quantity, math.exp(point.speedup), "o", color=color, mfc=face, ms=6)
            axes.axhline(1, color="#888888", lw=0.8, ls=(0, (2, 2)))
            titled(axes, "speed-up to 90% (times)", f"mean {QUANTITIES[quantity]} of the run")
        legend(figure, results, sorted({point.arm for some in found.values() for point in some}))
        return png(figure)


def everything(results: Results) -> list[tuple[str, str, bytes | None]]:
    """Heading, words for what it shows or why it is not there, and PNG of each picture."""
    return [
        ("Held-out curves", "thin: seeds, thick: their mean; dashed: the targets", held_out(results)),
        (
            "Time to targets",
            "steps over the baseline's, by seed: dots; mean and 95% interval: diamond and line; dashed: 10% saved",
            ratios(results),
        ),
        (
            "Spectra",
            "the largest singular value over steps, first seed of each arm; grey: the baseline's other values",
            spectra(results),
        ),
        (
            "Directions over time",
            "means over seeds and layers, as far as every seed goes",
            over_time(results),
        ),
        (
            "Mechanism",
            "one point per run; hollow: never arrived, its speed-up is below",
            scatter(results),
        ),
    ]
