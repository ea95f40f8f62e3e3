"""``comoving lab`` as functions: the list, a run with progress bars, the report."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from comoving.files import check_folder
from comoving.lab import config as configs
from comoving.lab import report
from comoving.lab.campaign import Campaign, found
from comoving.lab.studies import STUDIES, find
from comoving.lab.verdicts import judge
from comoving.race.bars import Bars
from comoving.race.extras import require

INTERRUPTED = 130
ENOUGH = 3


def listing() -> tuple[Any, Any]:
    """Tables of the studies and of the configurations."""
    table = require("rich.table", "cli").Table
    studies = table("study", "title", "question", title="Studies")
    for study in STUDIES.values():
        studies.add_row(study.name, study.title, study.question)
    known = table("configuration", "title", "steps", "model", "ranks", title="Configurations")
    for name in configs.names():
        config = configs.load(name)
        model = f"{config.layers} layers of width {config.hidden_size}"
        known.add_row(name, config.title, str(config.steps), model, ", ".join(map(str, config.ranks)))
    return studies, known


def execute(
    study: str,
    name: str,
    seeds: int,
    out: Path,
    command: str,
    jobs: int,
    device: str = "cpu",
    changes: dict[str, Any] | None = None,
    log: dict[str, str] | None = None,
) -> int:
    """Run a study, print its verdicts, and write results and report.

    Returns:
        Exit status: 0, or 130 if interrupted.

    Raises:
        SettingsError: before anything has run, or where a run fails by a fault.
        ImportError: an extra is missing.
    """
    for module in ("rich.console", "matplotlib.figure"):
        require(module, "cli")
    require("scipy.stats", "lab")
    for sink, module in {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}.items():
        if log and sink in log:
            require(module, "log")
    console = require("rich.console", "cli").Console
    stderr = console(stderr=True)
    check_folder(out)
    config = configs.configure(configs.load(name), changes or {})
    bars = Bars(stderr)
    if log and "wandb" in log:
        bars.say(f"Weights & Biases keeps its runs in {out / 'wandb'}; wandb sync sends offline ones")
    campaign = Campaign(find(study), config, seeds, out, bars, jobs, device, log)
    if seeds < ENOUGH:
        bars.say(f"{seeds} seed{'s' if seeds > 1 else ''}: not enough evidence for any verdict, {ENOUGH} are needed")
    try:
        with bars.bars:
            results = campaign.run(command)
    except KeyboardInterrupt:
        stderr.print("interrupted; what is done is kept, the same command goes on from there")
        return INTERRUPTED
    shown = console(width=None if sys.stdout.isatty() else 200)
    shown.print(report.table(results, judge(results)))
    shown.print(f"report: {report.save_all([results], out)}", highlight=False)
    return 0


def write(folder: Path) -> int:
    """Write the report of all studies in a folder, and print their verdicts.

    Raises:
        SettingsError: no results there.
    """
    for module in ("rich.console", "matplotlib.figure"):
        require(module, "cli")
    require("scipy.stats", "lab")
    results = found(folder)
    check_folder(folder)
    console = require("rich.console", "cli").Console(width=None if sys.stdout.isatty() else 200)
    for study in results:
        console.print(report.table(study, judge(study)))
    console.print(f"report: {report.save_all(results, folder)}", highlight=False)
    return 0


def changes(**options: Any) -> dict[str, Any]:
    """Fields of a configuration that the command line changes: those that are not None."""
    known = {f.name for f in fields(configs.Config)}
    return {name: value for name, value in options.items() if value is not None and name in known}
