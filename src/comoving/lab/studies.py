"""The studies: which question each asks, and the arms that answer it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from comoving.directions.branches import Backbone
from comoving.lab.config import Config
from comoving.race.settings import SettingsError

BASELINE, TREATMENT, CONTROL = "baseline", "treatment", "control"


@dataclass(frozen=True)
class Arm:
    """One way to train the model.

    Args:
        name: short, as in the reports.
        role: "baseline", "treatment" or "control".
        action: "none"; "global" (the rate of the whole target layers grows by ``factor`` at the split); "branches"
            (from the start); "gain" (the gradient in ``source`` directions grows by ``factor`` after the split);
            "extract" (the core in ``source`` directions is split off, its rate grows by ``factor``).
        summary: one line.
        rank: number of directions.
        source: of directions: "change", "weight", "momentum", "stable" or "random".
        factor: on a learning rate, or on a gradient.
        backbone: "frozen" or "zero" under branches.
        layers: "all" targets have branches, or those of every other block ("half").
        only: after an extraction the rest of the layer stands still.
        task: None for the configuration's own, or "harder".
    """

    name: str
    role: str
    action: str
    summary: str
    rank: int | None = None
    source: str = ""
    factor: float = 1.0
    backbone: Backbone | None = None
    layers: str = "all"
    only: bool = False
    task: str | None = None

    def plain(self) -> dict[str, Any]:
        """All fields, as JSON holds them."""
        return asdict(self)


@dataclass(frozen=True)
class Study:
    """A question, and the arms that answer it.

    Args:
        name: as on the command line.
        title, question: one line each.
        arms: of a configuration; the baseline comes first.
        followups: what is run in addition where studies 1 and 2 coincide: (what it is, arms).
    """

    name: str
    title: str
    question: str
    arms: Callable[[Config], list[Arm]]
    followups: Callable[[Config], list[tuple[str, list[Arm]]]] = lambda config: []


def baseline(task: str | None = None) -> Arm:
    """B0: AdamW on everything."""
    suffix = f"-{task}" if task else ""
    return Arm("B0" + suffix, BASELINE, "none", "AdamW on every weight, nothing extracted", task=task)


def branch(backbone: Backbone, rank: int, layers: str = "all", task: str | None = None) -> Arm:
    """Branches only, beside a backbone that is frozen at random or zero."""
    what = "as initialized" if backbone == "frozen" else "zero"
    where = "every target layer" if layers == "all" else "the target layers of every other block"
    name = "-".join([backbone, f"r{rank}", *([layers] if layers != "all" else []), *([task] if task else [])])
    summary = f"branches of rank {rank} on {where}; the weights of all target layers stay {what}"
    return Arm(
        name, TREATMENT, "branches", summary, rank=rank, backbone=backbone, layers=layers, task=task
    )  # fmt: skip


def frozen(config: Config) -> list[Arm]:
    """Study 1."""
    return [baseline(), *(branch("frozen", rank) for rank in config.ranks)]


def zero(config: Config) -> list[Arm]:
    """Study 2."""
    return [baseline(), *(branch("zero", rank) for rank in config.ranks)]


def both(config: Config) -> list[Arm]:
    """Study 1 against study 2."""
    return [baseline(), *(branch(kind, rank) for kind in ("frozen", "zero") for rank in config.ranks)]


def coinciding(config: Config) -> list[tuple[str, list[Arm]]]:
    """What to do where a frozen random backbone makes no difference: lower rank, fewer layers, a harder task."""
    low = min(config.ranks)
    kinds = ("frozen", "zero")
    found = [
        (f"fewer layers: branches of rank {low} in every other block", [branch(k, low, "half") for k in kinds]),
        (f"harder task: {config.harder}", [baseline("harder"), *(branch(k, low, task="harder") for k in kinds)]),
    ]
    if low > 1:
        found.insert(0, (f"lower rank: {low // 2}", [branch(kind, low // 2) for kind in kinds]))
    return found if config.harder else found[:-1]


def watching(config: Config) -> list[Arm]:
    """Study 3."""
    return [baseline()]


def gaining(config: Config) -> list[Arm]:
    """Study 3B."""
    a = config.alpha

    def arm(prefix: str, role: str, source: str, rank: int, which: str) -> Arm:
        summary = f"the gradient in {which} times {a:g}"
        return Arm(f"{prefix}-r{rank}", role, "gain", summary, rank=rank, source=source, factor=a)

    return [
        baseline(),
        *(
            arm("3B", TREATMENT, "stable", rank, f"up to {rank} stable directions of the momentum")
            for rank in config.ranks
        ),
        Arm("B1", CONTROL, "global", f"the learning rate of the whole target layers times {a:g}", factor=a),
        *(arm("B2", CONTROL, "random", rank, f"{rank} random directions") for rank in config.ranks),
    ]


def extracting(config: Config) -> list[Arm]:
    """Study E4."""
    b, source = config.boost, config.extract_from

    def arm(prefix: str, role: str, source: str, rank: int, summary: str, only: bool = False) -> Arm:
        return Arm(f"{prefix}-r{rank}", role, "extract", summary, rank=rank, source=source, factor=b, only=only)

    ranks = config.ranks
    which = {"change": "of the change of the weight", "weight": "of the weight", "momentum": "of the momentum"}[source]
    return [
        baseline(),
        *(arm("E4", TREATMENT, source, r, f"{r} leading directions {which} learn {b:g} times as fast") for r in ranks),
        Arm("B1", CONTROL, "global", f"the learning rate of the whole target layers times {b:g}", factor=b),
        *(arm("B2", CONTROL, "random", r, f"{r} random directions learn {b:g} times as fast") for r in ranks),
        *(arm("B3", CONTROL, source, r, f"as E4-r{r}, but the rest of these layers stands still", True) for r in ranks),
    ]  # fmt: skip


STUDIES = {
    study.name: study
    for study in (
        Study(
            "1", "frozen random backbone, branches only", "Can low-rank branches train beside random weights?", frozen
        ),
        Study("2", "branches only, backbone zero", "Can low-rank branches train alone?", zero),
        Study(
            "12",
            "study 1 against study 2",
            "Does a frozen random backbone carry anything that low-rank branches alone do not?",
            both,
            coinciding,
        ),
        Study("3", "stable directions", "Do weights, gradients and momentum keep a few directions?", watching),
        Study(
            "3b",
            "gain in stable directions",
            "Does a larger gradient in the stable directions reach a target sooner, without losing the end result?",
            gaining,
        ),
        Study(
            "e4",
            "extraction",
            "Does learning faster along extracted directions reach a target sooner, without losing the end result?",
            extracting,
        ),
    )
}


def find(name: str) -> Study:
    """A study by its name, in small or capital letters.

    Raises:
        SettingsError: for another name.
    """
    if name.lower() not in STUDIES:
        raise SettingsError(f"unknown study {name!r}; known: {', '.join(STUDIES)}")
    return STUDIES[name.lower()]
