"""What a run found: tables for the terminal and for Markdown, targets, pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from comoving.bench.contenders import EXACT
from comoving.bench.subspace import TENSORLY
from comoving.race.extras import require
from comoving.race.pictures import COLORS, STYLE, canvas, png

Found = dict[str, Any]
Row = dict[str, Any]
MARKS = ("o", "s", "^", "D", "v")
WITHIN_TUCKER, WITHIN_INCREMENTS = 0.98, 0.95
SHARES = ("slices ", "uniform ", "Nystroem, slices", "Nystroem, uniform")  # how the names of those contenders begin


@dataclass(frozen=True)
class Table:
    """Headings and cells, all text."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As a Markdown section."""
        lines = [self.headings, tuple("---" for _ in self.headings), *self.rows]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _ms(value: float) -> str:
    return f"{1e3 * value:.3g}"


def _faster(value: float) -> str:
    return f"{value:.2f}x"


def tables(found: Found) -> list[Table]:
    """All tables of a run."""
    return [*_streams(found), _rates(found), _orders(found), _trains(found), _increments(found), _targets(found)]


def _streams(found: Found) -> list[Table]:
    return [
        Table(
            f"{name}: against Exact, a refresh every {every} gradients",
            ("finder", "frame", "time of Exact's", "if every 1", "ms", "find", "energy of Exact's", "energy",
             "in frame", "core", "memory"),
            [
                (
                    row["finder"], row["frame"], _faster(row["time_of_exact"]),
                    _faster(row["time_of_exact_every_step"]), _ms(row["refresh_seconds"]),
                    _ms(row["find_seconds"]), f"{row['energy_of_exact']:.3f}", f"{row['energy']:.3f}",
                    str(row["frame_numbers"]), str(row["core_numbers"]), str(row["memory_numbers"]),
                )
                for row in rows
            ],
        )
        for (name, every), rows in grouped(found["streams"], lambda row: (row["tensor"], row["every"])).items()
    ]  # fmt: skip


def _rates(found: Found) -> Table:
    return Table(
        "Nystroem by share of the columns that are read",
        ("tensor", "every", "columns and share", "time of Exact's", "energy of Exact's"),
        [
            (r["tensor"], str(r["every"]), r["finder"], _faster(r["time_of_exact"]), f"{r['energy_of_exact']:.3f}")
            for r in found["rates"]
            if r["finder"] != EXACT
        ],
    )


def _orders(found: Found) -> Table:
    return Table(
        "Cost against the order of the tensor",
        ("frame", "finder", "state's exponent", "at far orders", "step per entry: last/first", "last/least",
         "refresh per entry: last/first", "last/least"),
        [
            (
                r["kind"], r["finder"], f"{r['exponent']:.2f}", f"{r['far_exponent']:.2f}",
                *(f"{r[f'{what}_last_of_{of}']:.3f}" for what in ("step", "refresh") for of in ("first", "least")),
            )
            for r in found["orders"]["summary"]
        ],
    )  # fmt: skip


def _trains(found: Found) -> Table:
    rows: list[tuple[str, ...]] = []
    for r in found["trains"]:
        if r["status"] != "measured":
            rows.append((r["tensor"], r["method"], r["status"], "", "", ""))
            continue
        gain = r["faster_than_tensorly"]
        rows.append(
            (r["tensor"], r["method"], _ms(r["seconds"]), f"{r['reads']:.1f}",
             "unknown" if gain is None else _faster(gain), f"{r['error']:.2e}")
        )  # fmt: skip
    return Table(
        "Tensor-train decompositions", ("tensor", "method", "ms", "x.sum()", "faster than tensorly", "error"), rows
    )


def _increments(found: Found) -> Table:
    names = [r["method"] for r in found["increments"] if not r["method"].endswith("Increment")]
    rows = [r for r in found["increments"] if r["method"].endswith("Increment")]
    return Table(
        "Increments against decomposing anew",
        ("finder", "instead of", "faster", "energy of the other's"),
        [
            (r["method"], name, _faster(r["faster_than"][name]), f"{r['energy_of'][name]:.4f}")
            for r in rows
            for name in names
        ],
    )


def _targets(found: Found) -> Table:
    return Table(
        "Targets",
        ("what", "target", "reached", "met"),
        [(t["what"], t["target"], t["reached"], "yes" if t["met"] else "no") for t in found["targets"]],
    )


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The rows by their key, in order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def targets(found: Found) -> list[Row]:
    """Each target, what was reached, and whether that is enough."""
    return [
        *_tucker_targets(found),
        *_order_targets(found["orders"]["summary"]),
        *_train_targets(found["trains"]),
        *_increment_targets(found["increments"]),
    ]


def _target(what: str, target: str, reached: str, met: bool) -> Row:
    return {"what": what, "target": target, "reached": reached, "met": met}


def _tucker_targets(found: Found) -> Iterator[Row]:
    """Of the share that is the fastest with enough energy, or else comes nearest to it."""
    tensors = [row for row in (*found["streams"], *found["rates"]) if len(row["ranks"]) > 2]
    for (name, every), rows in grouped(tensors, lambda row: (row["tensor"], row["every"])).items():
        curve = [r for r in rows if r["finder"].startswith(SHARES)]
        streaming = [r for r in rows if r["finder"] == "StreamingTucker"]
        for who, own in (("Nystroem, best share", curve), ("streaming Tucker", streaming)):
            for period, field in ((every, "time_of_exact"), (1, "time_of_exact_every_step")):
                good = [r for r in own if r["energy_of_exact"] >= WITHIN_TUCKER]
                best = min(good or own, key=lambda r: r[field] if good else -r["energy_of_exact"], default=None)
                if best is not None:
                    yield _target(
                        f"{who}, {name}, every {period}",
                        f">= 3x faster than Exact, energy >= {WITHIN_TUCKER}",
                        f"{1 / best[field]:.2f}x at {best['energy_of_exact']:.3f} ({best['finder']})",
                        1 / best[field] >= 3 and bool(good),
                    )


def _order_targets(summary: Sequence[Row]) -> Iterator[Row]:
    for row in summary:
        if row["kind"] == "Tucker":
            continue
        name, value = row["finder"], row["exponent"]
        yield _target(f"{name}: exponent of the state", "<= 1.1", f"{value:.2f}", value <= 1.1)
        for what in ("step", "refresh"):
            value = row[f"{what}_last_of_first"]
            yield _target(f"{name}: {what} per entry, last order to first", "<= 1.5", f"{value:.3f}", value <= 1.5)


def _train_targets(rows: Sequence[Row]) -> Iterator[Row]:
    for name, own in grouped(rows, lambda row: row["tensor"]).items():
        theirs = next(r for r in own if r["method"] == TENSORLY)
        for r in own:
            if r is theirs or theirs["status"] != "measured":
                continue
            equal = r["error"] <= max(1.01 * theirs["error"], 1e-5)  # without noise all errors are roundoff
            gain = r["faster_than_tensorly"]
            yield _target(
                f"{r['method']}, {name}",
                ">= 3x faster than tensorly at equal error",
                f"{gain:.1f}x, error {r['error']:.2e} to {theirs['error']:.2e}",
                gain >= 3 and equal,
            )


def _increment_targets(rows: Sequence[Row]) -> Iterator[Row]:
    """Against all decompositions, but trains against no trees."""
    for row in rows:
        if not row["method"].endswith("Increment"):
            continue
        kind = row["method"].removesuffix("Increment")
        for other, gain in row["faster_than"].items():
            if not other.endswith("Increment") and not (kind == "Train" and other.startswith("Tree")):
                energy = row["energy_of"][other]
                yield _target(
                    f"{row['method']} against {other}",
                    f">= 5x faster, energy >= {WITHIN_INCREMENTS}",
                    f"{gain:.1f}x at {energy:.3f}",
                    gain >= 5 and energy >= WITHIN_INCREMENTS,
                )


def markdown(found: Found) -> str:
    """All tables in one Markdown text."""
    head = f"# comoving bench subspace\n\n    {found['command']}\n\n{found['note']}\n"
    return "\n".join([head, *(table.markdown() for table in tables(found))])


def show(found: Found, console: Any) -> None:
    """Print all tables."""
    rich_table, text = require("rich.table", "cli"), require("rich.text", "cli").Text
    for table in tables(found):
        drawn = rich_table.Table(title=text(table.title), title_justify="left")
        for i, heading in enumerate(table.headings):
            drawn.add_column(text(heading), justify="left" if i < 2 else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(text(cell) for cell in row))
        console.print(drawn)
    console.print(found["note"], highlight=False, soft_wrap=True)


def accuracy(found: Found) -> bytes:
    """Energy that is missed against time, a panel for each stream, with the curve of the sampling shares; as PNG."""
    panels = grouped(found["streams"], lambda row: row["tensor"])
    with require("matplotlib", "cli").rc_context(STYLE | {"font.size": 8}):
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure = canvas(4.2 * columns + 2.4, 2.9 * lines)
        panes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes in panes[len(panels) :]:
            axes.remove()
        for axes, (name, rows) in zip(panes, panels.items(), strict=False):
            for i, row in enumerate(rows):
                mark = MARKS[i // len(COLORS) % len(MARKS)]
                place = row["time_of_exact"], missed(row)
                axes.plot(*place, mark, color=COLORS[i % len(COLORS)], ms=6, alpha=0.85, label=row["finder"])
            for columns, dash in (("slices", "-"), ("uniform", ":")):
                own = [r for r in found["rates"] if r["tensor"] == name and r["finder"].startswith(f"{columns} ")]
                times, values = [r["time_of_exact"] for r in own], [missed(r) for r in own]
                if own:
                    axes.plot(times, values, dash, color="#999999", lw=1.2, label=f"Nystroem, {columns}, 1 to 25%")
            axes.set_xscale("log")
            axes.set_yscale("log")
            ticker = require("matplotlib.ticker", "cli")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.axvline(1, color="#cccccc", lw=1)
            axes.set_xlabel("time of Exact's")
            axes.set_title(f"{name}: share of energy missed", loc="left", fontsize=8)
        labels: dict[str, Any] = {}
        for axes in panes[: len(panels)]:
            handles, names = axes.get_legend_handles_labels()
            labels |= dict(zip(names, handles, strict=True))
        figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize=7)
        return png(figure)


def missed(row: Row) -> float:
    """1 - energy, no less than what float32 can tell from 0."""
    return max(1e-6, 1 - row["energy"])


def order(found: Found) -> bytes:
    """State and times per entry against the order; as PNG."""
    rows = found["orders"]["rows"]
    with require("matplotlib", "cli").rc_context(STYLE | {"font.size": 9}):
        figure = canvas(13, 4)
        panels = (
            ("state", "numbers in frame and moments", 1.0),
            ("step_seconds_per_entry", "project and lift, ns per entry", 1e9),
            ("refresh_seconds_per_entry", "refresh, ns per entry", 1e9),
        )
        for axes, (field, title, unit) in zip(figure.subplots(1, 3), panels, strict=True):
            for i, (name, own) in enumerate(grouped(rows, lambda row: row["finder"]).items()):
                if field != "refresh_seconds_per_entry" and name.endswith("Increment"):
                    continue  # the same frame as TrainSVD's or TreeSVD's
                label = own[0]["kind"] + (f", {name}" if field.startswith("refresh") else "")
                values = [unit * row[field] for row in own]
                axes.plot([r["order"] for r in own], values, "o-", color=COLORS[i], ms=4, label=label)
            axes.set_yscale("log")
            axes.set_xticks(sorted({row["order"] for row in rows}))
            axes.set_xlabel("order of the tensor")
            axes.set_title(title, loc="left", fontsize=9)
            axes.legend(fontsize=7)
        return png(figure)
