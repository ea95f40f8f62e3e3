"""Two pictures of a race: curves, and quality against state."""

import io
import statistics
from typing import Any

from comoving.race.extras import require

# Okabe and Ito's palette, without its yellow (illegible on white); dashes tell apart where colors repeat.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}

Results = dict[str, Any]


def style_of(found: Results) -> dict[str, tuple[str, str]]:
    """Color and dash of each contender, by its place on the command line, so that all pictures agree."""
    return {
        name: (COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)])
        for i, name in enumerate(found["settings"]["optimizers"])
    }


def finished(found: Results) -> list[dict[str, Any]]:
    """Lines of the summary that have a result, best first."""
    return [line for line in found["summary"] if line["status"] == "finished"]


def runs_at_best(found: Results, line: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs behind a line: its contender's at the best rate."""
    return [r for r in found["runs"] if r["contender"] == line["contender"] and r["rate"] == line["rate"]]


def spread_apart(heights: list[float], gap: float) -> list[float]:
    """Move sorted label heights apart to at least ``gap``, keeping their order and their mean."""
    placed: list[float] = []
    for height in heights:
        placed.append(height if not placed else max(height, placed[-1] + gap))
    shift = (sum(placed) - sum(heights)) / max(1, len(heights))
    return [height - shift for height in placed]


def canvas(width: float, height: float) -> Any:
    """An empty figure that knows nothing of pyplot's global state and needs no display."""
    figure = require("matplotlib.figure", "cli").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", "cli").FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The figure as PNG at 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def smooth(values: list[float], width: int) -> list[float]:
    """Trailing mean over ``width`` values."""
    total, out = 0.0, list[float]()
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


def draw_validation(axes: Any, found: Results) -> None:
    """Validation along training: mean over seeds, range over seeds shaded, named at the end of each line."""
    ends: list[tuple[float, str]] = []
    lowest: list[float] = []
    values: list[float] = []
    styles = style_of(found)
    for line in finished(found):
        runs = runs_at_best(found, line)
        steps = [point["step"] for point in runs[0]["validation"]]
        columns = [list(c) for c in zip(*([p["value"] for p in r["validation"]] for r in runs), strict=True)]
        means = [statistics.fmean(c) for c in columns]
        color, dash = styles[line["contender"]]
        axes.plot(steps, means, dash, color=color, linewidth=2)
        axes.plot(steps[-1], means[-1], "o", color=color, markersize=4, clip_on=False)
        if len(runs) > 1:
            axes.fill_between(
                steps, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, lw=0
            )
        ends.append((means[-1], line["contender"]))
        lowest.append(min(min(c) for c in columns))
        values += means[len(means) // 6 :]
    if not ends:
        return
    # The first validations are far above the rest; what tells contenders apart is below them.
    bottom, top = min(lowest), max(values)
    margin = 0.06 * (top - bottom) or 0.1 * abs(top) or 1.0
    axes.set_ylim(bottom - margin, top + margin)
    ends.sort()
    gap = 0.06 * (top - bottom + 2 * margin)
    last = max(p["step"] for line in finished(found) for r in runs_at_best(found, line) for p in r["validation"])
    for (end, name), height in zip(ends, spread_apart([end for end, _ in ends], gap), strict=True):
        axes.annotate(
            f"{name}  {end:.3g}",
            (last, end),
            xytext=(last * 1.03, height),
            textcoords="data",
            color=styles[name][0],
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": styles[name][0], "lw": 0.6, "alpha": 0.6},
        )
    if found["settings"]["target"] is not None:
        axes.axhline(found["settings"]["target"], color="#888888", lw=1, ls=(0, (2, 2)))
    axes.set_xlim(0, last)
    axes.set_xlabel("step")
    axes.set_title(found["task"]["metric"], loc="left", fontsize=11, color="#333333")


def draw_losses(axes: Any, found: Results) -> None:
    """Training loss, smoothed, first seed, on a logarithmic scale where it is positive."""
    styles = style_of(found)
    for line in finished(found):
        losses = runs_at_best(found, line)[0]["losses"]
        color, dash = styles[line["contender"]]
        axes.plot(range(1, len(losses) + 1), smooth(losses, max(1, len(losses) // 40)), dash, color=color, lw=1.4)
        if min(losses) > 0:
            axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title("training loss, smoothed (first seed)", loc="left", fontsize=11, color="#333333")
    axes.yaxis.set_major_formatter(require("matplotlib.ticker", "cli").FormatStrFormatter("%g"))
    axes.yaxis.set_major_locator(require("matplotlib.ticker", "cli").MaxNLocator(5))
    axes.yaxis.set_minor_locator(require("matplotlib.ticker", "cli").NullLocator())


def curves(found: Results) -> bytes:
    """Validation and training loss of every contender at its best rate, as PNG."""
    with require("matplotlib", "cli").rc_context(STYLE):
        figure = canvas(11.5, 4.6)
        training, validation = figure.subplots(1, 2, width_ratios=(2, 3))
        draw_losses(training, found)
        draw_validation(validation, found)
        return png(figure)


def frontier(found: Results) -> bytes:
    """Quality against state, one point per contender, those that nobody beats in both joined by a line; as PNG."""
    with require("matplotlib", "cli").rc_context(STYLE):
        figure = canvas(7.5, 4.6)
        axes = figure.subplots()
        styles = style_of(found)
        lines = finished(found)
        best = float("inf")
        front: list[tuple[float, float]] = []
        for line in sorted(lines, key=lambda line: (line["state"], line["mean"])):
            if line["mean"] < best:
                best = line["mean"]
                front.append((line["state"] / 2**20, best))
        axes.plot(*zip(*front, strict=True), color="#bbbbbb", lw=1.2, zorder=1) if front else None
        for line in lines:
            color = styles[line["contender"]][0]
            place = (line["state"] / 2**20, line["mean"])
            axes.errorbar(*place, yerr=line["deviation"] or 0, fmt="o", color=color, ms=7, capsize=3)
        label_points(axes, [(line["contender"], line["state"] / 2**20, line["mean"]) for line in lines], styles)
        axes.set_xlim(left=0)
        axes.margins(x=0.2, y=0.15)
        axes.set_xlabel("optimizer state, MiB")
        axes.set_title(f"{found['task']['metric']} (lower left is better)", loc="left", fontsize=11, color="#333333")
        return png(figure)


def updates(found: Results) -> bytes | None:
    """Update over weight of every role, the median along training with its range, as PNG; None if nobody measured."""
    measured: dict[str, dict[str, list[float]]] = {}
    for line in finished(found):
        for point in (point for run in runs_at_best(found, line) for point in run.get("updates", [])):
            for role, ratio in point.items():
                if role != "step" and ratio is not None and 0 < ratio < float("inf"):  # weights that were 0
                    measured.setdefault(line["contender"], {}).setdefault(role, []).append(ratio)
    if not measured:
        return None
    roles = list(dict.fromkeys(role for own in measured.values() for role in own))
    with require("matplotlib", "cli").rc_context(STYLE):
        figure = canvas(7.5, 4.0)
        axes = figure.subplots()
        styles = style_of(found)
        for i, (name, own) in enumerate(measured.items()):
            aside = (i - (len(measured) - 1) / 2) * min(0.12, 0.6 / len(measured))
            for role, ratios in own.items():
                middle, place = statistics.median(ratios), roles.index(role) + aside
                below, above = middle - min(ratios), max(ratios) - middle
                label = name if role == next(iter(own)) else None
                bars = [[below], [above]]
                axes.errorbar(place, middle, bars, fmt="o", color=styles[name][0], ms=5, capsize=2, lw=1, label=label)
        axes.set_yscale("log")
        axes.set_xticks(range(len(roles)), roles)
        axes.set_title("RMS of an update over that of the weights, by role", loc="left", fontsize=11, color="#333333")
        axes.legend(fontsize=8, frameon=False)
        return png(figure)


def label_points(axes: Any, points: list[tuple[str, float, float]], styles: dict[str, tuple[str, str]]) -> None:
    """Name each point beside it; names of points close to each other are moved apart."""
    if not points:
        return
    ordered = sorted(points, key=lambda point: point[2])
    low, high = ordered[0][2], ordered[-1][2]
    heights = spread_apart([y for _, _, y in ordered], 0.05 * ((high - low) or abs(high) or 1.0))
    right = max(x for _, x, _ in points)
    for (name, x, y), height in zip(ordered, heights, strict=True):
        left_side = x > 0.75 * right and len(points) > 1
        axes.annotate(
            name,
            (x, y),
            xytext=(x + (-0.02 if left_side else 0.02) * right, height),
            ha="right" if left_side else "left",
            va="center",
            color=styles[name][0],
        )
