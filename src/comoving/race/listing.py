"""``comoving race --tasks``: what can be raced on, how large it is, and how long it takes."""

from typing import Any

from comoving.race.extras import require
from comoving.race.tasks import MEASURED_ON, TASKS

HEADINGS = ("task", "model", "parameters", "metric", "steps", "samples a step", "s a step", "minutes")


def rows() -> list[tuple[str, ...]]:
    """One row of cells for each task, under :data:`HEADINGS`."""
    return [
        (
            name,
            info.model,
            f"{info.parameters:,}",
            info.metric,
            str(info.steps),
            str(info.batch) if info.per_sample == 1 else f"{info.batch} x {info.per_sample} {info.counted}",
            f"{info.seconds:.2g}",
            f"{info.minutes:.1f}",
        )
        for name, info in TASKS.items()
    ]


def as_table() -> Any:
    """A table of rich, which the extra "cli" installs."""
    table = require("rich.table", "cli").Table(
        caption=f"seconds and minutes of a run by AdamW, validations aside, on one thread of {MEASURED_ON}"
    )
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i in (0, 1, 3) else "right", overflow="fold")
    for row in rows():
        table.add_row(*row)
    return table
