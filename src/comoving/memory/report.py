"""A plan as a table of rich and as a picture of stacked bars."""

import io
from collections.abc import Sequence
from typing import Any

from ..race.extras import require
from ..race.pictures import STYLE, canvas
from ..units import UNITS, show_bytes
from .plan import STATE, Plan

COLORS = {
    "weights": "#4D4D4D",
    "gradients": "#999999",
    "moments": "#0072B2",
    "frames": "#56B4E9",
    "feedback": "#009E73",
    "finder": "#8FD3B6",
    "preconditioner": "#CC79A7",
    "scalars": "#F0E442",
    "temporaries": "#E69F00",
    "communication": "#D55E00",
    "activations": "#E8D8C3",
}


def table(plan: Plan) -> Any:
    """The parts of a plan, their bytes and shares of the peak."""
    rich_table = require("rich.table", "cli")
    rank = "full rank" if plan.rank is None else f"rank {plan.rank}"
    sends = f" that send cores in {plan.compress!r}" if plan.compress else ""
    shared = (
        f", one of {plan.ddp} DDP ranks{sends}" if plan.ddp else f", one of {plan.fsdp} FSDP ranks" if plan.fsdp else ""
    )
    drawn = rich_table.Table(
        title=f"{plan.model}, {plan.recipe}, {rank}, {plan.dtype}{shared}{', layerwise' if plan.layerwise else ''}",
        caption=f"activations: {plan.activations_formula}",
    )
    drawn.add_column("part")
    drawn.add_column("bytes", justify="right")
    drawn.add_column("of the peak", justify="right")
    drawn.add_column("what it is")
    for name, size in plan.parts().items():
        if size:
            kind = f"  {name}" if name in STATE else name
            drawn.add_row(kind, show_bytes(size), f"{size / plan.peak_bytes:.1%}", _remark(plan, name))
    drawn.add_section()
    drawn.add_row("state", show_bytes(plan.state_bytes), f"{plan.state_bytes / plan.peak_bytes:.1%}", "exact")
    drawn.add_row("peak", show_bytes(plan.peak_bytes), "", _not_counted(plan))
    drawn.add_section()
    drawn.add_row("step", _operations(plan.step_flops), "", "operations of the optimizer between refreshes")
    drawn.add_row("refresh", _operations(plan.refresh_flops), "", "what refreshing every frame once adds")
    if plan.wire:
        kinds = ", ".join(f"{name} {show_bytes(size)}" for name, size in plan.wire.items() if size)
        drawn.add_row("wire", show_bytes(plan.wire_bytes), "", f"sent by a rank in a step: {kinds}")
    return drawn


def _remark(plan: Plan, name: str) -> str:
    if name == "gradients":
        return "of the largest parameter, the others are freed" if plan.layerwise else "of all parameters"
    if name == "temporaries":
        return f"{show_bytes(plan.step_temporaries)} in a step, {show_bytes(plan.refresh_temporaries)} in a refresh"
    if name == "communication":
        return "DDP's buckets" if plan.ddp else "units that are gathered and scattered"
    remarks = {
        "weights": f"{plan.parameters:,} parameters, {plan.projected:,} of them projected",
        "moments": "of rule and transport",
        "frames": "the directions that are kept",
        "finder": "what it remembers of past gradients",
        "scalars": "step counts, seeds, diagnostics, the cadence's",
        "feedback": "what the frame could not hold",
        "preconditioner": "statistics of single modes",
        "activations": "an estimate",
    }
    return remarks.get(name, "")


def _not_counted(plan: Plan) -> str:
    if plan.activations is None:
        return "without activations"
    if plan.activations > 0 and not plan.layerwise and plan.temporaries < plan.activations:
        return f"in the backward pass; a step's temporaries, {show_bytes(plan.temporaries)}, come later"
    if not plan.layerwise and plan.activations:
        return f"in the step; activations, about {show_bytes(plan.activations)}, are gone then"
    return ""


def _operations(count: int) -> str:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} FLOP"


def picture(bars: Sequence[tuple[str, Plan]], limit: int | None = None) -> bytes:
    """A PNG of one stacked bar for each plan, with a line at ``limit`` bytes."""
    matplotlib = require("matplotlib", "cli")
    with matplotlib.rc_context(STYLE):
        figure = canvas(9, 1.6 + 0.5 * len(bars))
        axes = figure.add_subplot()
        largest = max([plan.peak_bytes for _, plan in bars] + [limit or 0])
        unit = next((name for name in ("GB", "MB", "KB") if largest >= UNITS[name]), "B")
        left = [0.0] * len(bars)
        for part, color in COLORS.items():
            widths = [plan.parts()[part] / UNITS[unit] for _, plan in bars]
            if any(w * UNITS[unit] > largest / 500 for w in widths):
                axes.barh(
                    range(len(bars)), widths, left=left, color=color, label=part, edgecolor="white", linewidth=0.5
                )
            left = [a + w for a, w in zip(left, widths, strict=True)]
        for i, total in enumerate(left):
            axes.text(total + largest / UNITS[unit] * 0.01, i, f"{total:.1f}", va="center", fontsize=9, color="#333333")
        if limit is not None:
            axes.axvline(limit / UNITS[unit], color="#D55E00", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, largest / UNITS[unit] * 1.1)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{unit} at the peak of a step")
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130)
    return file.getvalue()
