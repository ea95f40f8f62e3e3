"""``comoving race`` as a function: settings from strings, a race with progress bars, the table, the report."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from comoving.files import check_folder
from comoving.race import contenders, report, sweep, team
from comoving.race.bars import Bars
from comoving.race.extras import require
from comoving.race.settings import RaceSettings, RunSettings, SettingsError, parse_names, parse_rank, parse_rates
from comoving.race.table import DASH, columns, remarks
from comoving.race.tasks import TASKS

BAD_INPUT, INTERRUPTED = 2, 130
LOG = logging.getLogger(__name__)


def settings_from(
    task: str,
    optimizers: str | None,
    steps: int | None,
    lr: str,
    rank: str | None,
    out: Path | None,
    codec: str = "",
    budget: str = "",
    **others: Any,
) -> RaceSettings:
    """Settings from what was typed; what was not typed is the task's default.

    Raises:
        SettingsError: for anything that cannot be run.
    """
    if task not in TASKS:
        raise SettingsError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    info = TASKS[task]
    names = contenders.named(parse_names(info.optimizers if optimizers is None else optimizers))
    return RaceSettings(
        task=task,
        optimizers=contenders.stored(
            contenders.budgeted(names, parse_names(budget) if budget else ()), parse_names(codec) if codec else ()
        ),
        steps=info.steps if steps is None else steps,
        rates=parse_rates(lr),
        rank=info.rank if rank is None else parse_rank(rank),
        out=Path("out") / f"race-{task}" if out is None else out,
        **others,
    )


def label(run: RunSettings) -> str:
    """A run in a few words."""
    tuned = "" if run.ratio == 1 else f" ratio {run.ratio:g}"
    return f"{run.contender} lr {run.rate:g}{tuned} seed {run.seed}{f' to {run.until}' if run.until else ''}"


class Watching:
    """Tells the bars how the race goes."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.total, self.say = bars.total, bars.say

    def started(self, run: RunSettings) -> None:
        """A run begins."""
        self.bars.started(label(run), run.length)

    def progress(self, run: RunSettings, step: int, loss: float) -> None:
        """A run has finished ``step`` steps."""
        self.bars.progress(label(run), step, loss)

    def ended(self, run: RunSettings, record: sweep.Record) -> None:
        """A run is over."""
        self.bars.ended(label(run), record)


def blocks(widths: list[int], room: int) -> list[list[int]]:
    """Column numbers of as many tables as it takes to fit into ``room``; each begins with column 0."""
    found: list[list[int]] = [[0]]
    used = widths[0]
    for i, width in enumerate(widths[1:], start=1):
        if used + width > room and len(found[-1]) > 1:
            found.append([0])
            used = widths[0]
        found[-1].append(i)
        used += width
    return found


def show(found: sweep.Record, console: Any) -> None:
    """Print the table, in several parts where the terminal is narrow, and the remarks."""
    rich_table, text = require("rich.table", "cli"), require("rich.text", "cli").Text
    chosen = columns(found)
    lines = [
        [c.show(line) for c in chosen]
        if line["status"] == "finished"
        else [line["contender"], line["status"], *[DASH] * (len(chosen) - 2)]
        for line in found["summary"]
    ]
    # A heading may break between words, a cell may not.
    needed = [
        max(*(len(word) for word in c.heading.split()), *(len(line[i]) for line in lines)) for i, c in enumerate(chosen)
    ]
    frame = 3
    console.print(found["task"]["title"], highlight=False)
    for block in blocks([width + frame for width in needed], console.width - 1):
        drawn = rich_table.Table()
        for i in block:
            drawn.add_column(text(chosen[i].heading), justify="left" if i == 0 else "right", width=needed[i])
        for line in lines:
            drawn.add_row(*(text(line[i]) for i in block))
        console.print(drawn)
    for remark in remarks(found):
        console.print(f"• {remark}", markup=False, highlight=False, soft_wrap=True)


def execute(settings: RaceSettings, command: str) -> int:
    """Run the race and write table, ``results.json`` and report; of several processes the first one does.

    Returns:
        Exit status: 0, 1 if no contender finished, 130 if interrupted.

    Raises:
        SettingsError: before anything has run.
    """
    # Missed here rather than after an hour of training.
    for module in ("rich.console", "matplotlib.figure"):
        require(module, "cli")
    check_folder(settings.out)
    if not settings.wrapping:
        return tell(sweep.Race(settings), command)
    with team.joined(settings.device) as processes:
        data = processes.load(settings)
        if not processes.leads:
            return processes.follow()
        try:
            status = tell(sweep.Race(settings, runner=processes.run, data=data), command)
        except (SettingsError, OSError):  # between two runs; what is raised in one, this process cannot tell of
            processes.dismiss(BAD_INPUT)
            raise
        if status != INTERRUPTED:  # as the others are then
            processes.dismiss(status)
        return status


def tell(race: sweep.Race, command: str) -> int:
    """Run the race, tell of its course, and write what came out; the exit status."""
    settings = race.settings
    rich_console = require("rich.console", "cli")
    console = rich_console.Console(stderr=True)
    bars = Bars(console)
    race.watcher = Watching(bars)
    started = time.monotonic()
    try:
        with bars.bars:
            race.run()
    except KeyboardInterrupt:
        console.print("interrupted; finished runs are kept, the same command goes on from there")
        return INTERRUPTED
    LOG.info("race took %.0f s", time.monotonic() - started)
    found = sweep.results(race, command)
    sweep.save(found, settings.out)
    written = report.save(found, settings.out)
    # Piped output gets as many columns as the table needs, a terminal what it has.
    show(found, rich_console.Console(width=None if sys.stdout.isatty() else 230))
    console.print(f"report: {written}", highlight=False)
    return 0 if any(line["status"] == "finished" for line in found["summary"]) else 1
