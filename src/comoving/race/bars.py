"""Progress on stderr: bars on a terminal, one line per finished run elsewhere."""

from typing import Any

from comoving.race.extras import require

Record = dict[str, Any]


class Bars:
    """A bar for all runs and one for each that is under way, known by its name.

    Args:
        console: of rich, on stderr.
    """

    def __init__(self, console: Any) -> None:
        progress = require("rich.progress", "cli")
        self.console = console
        self.bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            progress.TextColumn("{task.fields[loss]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.whole = self.bars.add_task("all runs", total=0, loss="")
        self.tasks: dict[str, Any] = {}
        self.runs = self.done = 0

    def total(self, runs: int, reused: int) -> None:
        """Adjust the bar of all runs: ``runs`` are known of by now, ``reused`` of them were found finished."""
        self.runs = runs
        self.done = max(self.done, reused)
        self.bars.update(self.whole, total=runs, completed=self.done)
        if reused:
            self.say(f"{reused} of {runs} runs were finished earlier and are used again")

    def started(self, name: str, steps: int) -> None:
        """A bar of its own for the run."""
        self.tasks[name] = self.bars.add_task(name, total=steps, loss="")

    def progress(self, name: str, step: int, loss: float) -> None:
        """Move the run's bar."""
        self.bars.update(self.tasks[name], completed=step, loss=f"loss {loss:.4g}")

    def ended(self, name: str, record: Record) -> None:
        """Drop the run's bar and say what came out."""
        if name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name))
        self.done += 1
        self.bars.update(self.whole, completed=self.done)
        result = (
            f"{record['final']:.4g}" if record["status"] == "finished" else f"{record['status']}: {record['error']}"
        )
        seconds = f"  ({record['seconds']:.0f} s)" if "seconds" in record else ""
        self.say(f"[{self.done}/{self.runs}] {name}: {result}{seconds}")

    def say(self, line: str) -> None:
        """One line above the bars."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
