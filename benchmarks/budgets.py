"""The default optimizer's table of choices, and the frontier of validation against bytes of the whole state.

:func:`table` measures what each choice of each role costs, all else at its best; :func:`frontier` sets the default at
several budgets against AdamW and Muon, which are tuned. Both are called by ``benchmarks/study.py``.
"""

import argparse
import hashlib
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from math import ceil, log2
from operator import itemgetter
from pathlib import Path
from typing import Any

from comoving.composition.table import FILE
from comoving.race.host import machine
from comoving.race.settings import RaceSettings
from comoving.race.sweep import Race, versions
from comoving.race.tasks import TASKS
from comoving.roles import PROJECTABLE, roles_of

BUDGETS = ("1/2", "1/4", "1/8", "1/16", "1/32", "1/64", "0")
RATIOS = (1, 4, 16)
"""Of the rate of all but hidden weights to theirs: the second value that AdamW and Muon are tuned in."""
TUNED = ("adamw", "muon", "muon:moments=int8")
NONE = "comoving, 0"
KEPT = "kept"
"""In place of names of rivals: those of the committed figures, as they were."""
NEAR = (1 / 1.5, 1.5)
"""Factors of the default's rate that are tried at one budget, to see whether AdamW's carries over."""
TABLE_TASKS = ("lm", "lm-bpe", "vit", "fno")

MUON, ADAM = "muon(bf16=True)", "adam()"
BARE = {"name": "orthogonalized gradient", "options": {"rule": "muon(decay=0.0, nesterov=False, bf16=True)"}}
BALANCED = {"name": "balanced gradient", "options": {"rule": "normalized()"}}
FACTORED = {"name": "factored second moments", "options": {"rule": "adafactor(average=None)"}}
ADAM_8 = {"name": "AdamW, 8 bits", "options": {"rule": ADAM, "moments": "int8"}}
ADAM_32 = {"name": "AdamW", "options": {"rule": ADAM}}
SQRT = {"width": 0.5}


EMBEDDED = {
    "name": "orthogonalized momentum, 8 bits, in the weights",
    "options": {"rule": MUON, "moments": "in_weights()"},
}
LEAST = {EMBEDDED["name"]: 0.001}
"""What a choice costs at least: at equal losses nothing shall be kept in weights that has room in the state."""


def _matrices(rate: float, bare: float) -> list[dict[str, Any]]:
    momentum = "orthogonalized momentum"
    return [
        BARE | {"rate": bare},
        EMBEDDED | {"rate": rate},
        {"name": f"{momentum}, 4 bits", "options": {"rule": MUON, "moments": "int4"}, "rate": rate},
        {"name": f"{momentum}, 8 bits", "options": {"rule": MUON, "moments": "int8"}, "rate": rate},
    ]


CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "hidden": _matrices(4.0, 10.0),
    "spectral": _matrices(4.0, 16.0),
    "convolution": [BALANCED | {"rate": 0.25}, ADAM_32 | {"rate": 1.0}, *_matrices(2.0, 5.0)],
    "table": [ADAM_8 | {"rate": 8.0, **SQRT}, BALANCED | {"rate": 2.0, **SQRT}],
    "head": [BARE | {"rate": 10.0}, EMBEDDED | {"rate": 4.0}, ADAM_8 | {"rate": 4.0}, FACTORED | {"rate": 4.0}],
    "position": [BALANCED | {"rate": 1.0, **SQRT}, ADAM_32 | {"rate": 4.0, **SQRT}],
    "norm": [BALANCED | {"rate": 0.5, **SQRT}, ADAM_32 | {"rate": 2.0, **SQRT}],
    "bias": [BALANCED | {"rate": 0.0625, **SQRT}, ADAM_32 | {"rate": 0.25, **SQRT}],
    "scalar": [BALANCED | {"rate": 0.25}, ADAM_32 | {"rate": 1.0}],
}
"""Role -> what there is to choose, the best last. Rates are principle, not fits: see docs/choosing.md."""


class Runs:
    """Runs of one task, resumable, at most ``jobs`` at once."""

    def __init__(self, task: str, labels: list[str], arguments: argparse.Namespace) -> None:
        info = TASKS[task]
        self.race = Race(
            RaceSettings(
                task=task, optimizers=tuple(labels), steps=arguments.steps or info.steps, seeds=1, rates=(),
                rank=info.rank, out=arguments.out / task, batch=arguments.batch, validations=4,
            )
        )  # fmt: skip
        self.entries = {entry.contender.label: entry for entry in self.race.entries}
        self.jobs = arguments.jobs

    def one(self, label: str, rate: float, seed: int) -> float:
        """Final validation; infinite where the run diverged."""
        entry = self.entries[label]
        run = self.race.settings.run(label, rate, seed, self.race.fingerprints[label])
        record = self.race.finished(run)
        if record is None:
            self.race.one(entry, run)
            record = entry.records[rate, seed]
        entry.records[rate, seed] = record
        value = record.get("final")
        sys.stderr.write(f"{self.race.settings.task} {label[:100]} lr {rate:g} seed {seed}: {value}\n")
        return float("inf") if value is None else value

    def all(self, runs: list[tuple[str, float, int]]) -> list[float]:
        """Their values, in order."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(lambda run: self.one(*run), runs))

    def facts(self) -> dict[str, Any]:
        """What is committed with every result."""
        settings = self.race.settings
        return {
            "command": "python benchmarks/study.py " + " ".join(sys.argv[1:]),
            "task": settings.task,
            "steps": settings.steps,
            "batch": settings.batch or settings.info.batch,
            "machine": machine(settings.device, self.jobs),
            "versions": versions(self.race.entries),
        }

    def state(self, label: str, rate: float) -> dict[str, Any]:
        """Bytes and seconds of a contender's first run."""
        record = next(r for (own, _), r in self.entries[label].records.items() if own == rate)
        return {name: record.get(name) for name in ("state", "parameters", "optimizer_seconds", "step_seconds")}


# ---------------------------------------------------------------------------------------------------------- the table


def written(folder: Path, choices: dict[str, dict[str, Any]]) -> str:
    """The label of the default with one choice a role, and the role's best for those that have no room for it."""
    roles = {
        role: [one, *([CANDIDATES[role][-1] | {"loss": 1.0}] if one["name"] in LEAST else [])]
        for role, one in choices.items()
    }
    text = json.dumps({"command": "one choice a role", "roles": roles})
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return f"comoving:table={file}"


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    """What each choice costs, as a share of the validation of the best composition, the mean over tasks; written.

    Negative losses, by which noise or a better choice shows, are taken for 0, and said in the figures. With ``--only``
    choices whose names contain it are measured, with ``--roles`` those of these roles; the others cost what they did.
    """
    some = arguments.only or arguments.roles
    before = json.loads(arguments.known.read_text()) if some else {"losses": {}, "runs": []}
    best = {role: choices[-1] for role, choices in CANDIDATES.items()}
    figures: dict[str, dict[str, dict[str, float]]] = before["losses"]
    facts = list[dict[str, Any]]()
    for task in arguments.tasks.split(","):
        present = {found.role for found in roles_of(TASKS[task].load().model()).values()}
        here = {role: best[role] for role in sorted(present)}
        labels = {("", ""): written(arguments.out / "tables", here)}
        for role in sorted(present):
            if arguments.roles and role not in arguments.roles.split(","):
                continue
            for choice in (c for c in CANDIDATES[role][:-1] if arguments.only in c["name"]):
                labels[role, choice["name"]] = written(arguments.out / "tables", here | {role: choice})
        runs = Runs(task, [*dict.fromkeys(labels.values())], arguments)
        seeds = range(arguments.seeds)
        wanted = [(label, TASKS[task].rate, seed) for label in labels.values() for seed in seeds]
        values = dict(zip(wanted, runs.all(wanted), strict=True))
        means = {
            key: statistics.fmean(values[label, TASKS[task].rate, s] for s in seeds) for key, label in labels.items()
        }
        for (role, name), mean in means.items():
            if role:
                figures.setdefault(role, {}).setdefault(name, {})[task] = mean / means["", ""] - 1
        facts.append(runs.facts() | {"best": means["", ""]})
    roles = {
        role: [
            choice | {"loss": _loss(choice["name"], figures.get(role, {}).get(choice["name"], {}))}
            for choice in choices
        ]
        for role, choices in CANDIDATES.items()
    }
    found = {
        "command": "python benchmarks/study.py " + " ".join(sys.argv[1:]),
        "runs": [*before["runs"], *facts],
        "losses": figures,
    }
    FILE.write_text(json.dumps({"command": found["command"], "roles": roles}, indent=1) + "\n")
    return found


def _loss(name: str, by_task: dict[str, float]) -> float:
    return round(max(LEAST.get(name, 0.0), statistics.fmean(by_task.values())), 5) if by_task else 0.0


# ------------------------------------------------------------------------------------------------------- the frontier


def frontier(arguments: argparse.Namespace) -> dict[str, Any]:
    """AdamW and Muon at their best of rates and ratios, and the default at every budget at one rate."""
    task = arguments.task
    present = {found.role for found in roles_of(TASKS[task].load().model()).values()}
    others = sorted(present - {*PROJECTABLE} | present & {"scalar"})

    def rated(name: str, ratio: int) -> str:
        rates = ",".join(f"'{role}':{ratio}" for role in others)
        return name if ratio == 1 else f"{name}{';' if ':' in name else ':'}rates={{{rates}}}"

    ours = {budget: f"comoving:budget={budget}" for budget in arguments.budgets.split(",")}
    keeps = arguments.tuned == KEPT
    tuned = {} if keeps else {n: [rated(n, ratio) for ratio in RATIOS] for n in arguments.tuned.split(",") if n}
    runs = Runs(task, [*ours.values(), *(label for labels in tuned.values() for label in labels)], arguments)
    before = json.loads(arguments.known.read_text()) if keeps else {"contenders": []}
    lines = _rivals(before)
    for name, labels in tuned.items():
        lines.append(_tuned(runs, name, labels, arguments.seeds))
    rate = TASKS[task].rate
    wanted = [(label, rate, seed) for seed in range(arguments.seeds) for label in ours.values()]
    values = dict(zip(wanted, runs.all(wanted), strict=True))
    for budget, label in ours.items():
        seeds = [values[label, rate, s] for s in range(arguments.seeds)]
        lines.append({"contender": f"comoving, {budget}", "label": label, "rate": rate, **_spread(seeds)})
        lines[-1] |= runs.state(label, rate)
    near = ours.get("1/8", next(iter(ours.values())))
    rates = [float(f"{rate * factor:.4g}") for factor in NEAR]
    tried = dict(zip(rates, runs.all([(near, r, 0) for r in rates]), strict=True))
    return (
        runs.facts()
        | ({"rivals": before.get("rivals", before["command"])} if keeps else {})
        | {
            "contenders": lines,
            "near": {"label": near, "rates": {f"{r:g}": v for r, v in tried.items()}},
        }
    )


def _tuned(runs: Runs, name: str, labels: list[str], seeds: int) -> dict[str, Any]:
    """A contender at its best: the ratio at the usual rate first, then the rate by factors of two."""
    start = runs.entries[labels[0]].rates[0]
    tried = {(label, start): v for label, v in zip(labels, runs.all([(x, start, 0) for x in labels]), strict=True)}
    label = min(labels, key=lambda x: tried[x, start])
    for direction in (2.0, 0.5):
        rate = start
        while tried[label, rate] <= min(tried.values()):
            rate = float(f"{rate * direction:.4g}")
            tried[label, rate] = runs.one(label, rate, 0)
    best = min(tried, key=lambda key: tried[key])
    values = runs.all([(*best, seed) for seed in range(seeds)])
    line = {"contender": name, "label": best[0], "rate": best[1], **_spread(values), **runs.state(*best)}
    return line | {"tried": {f"{x} @ {r:g}": v for (x, r), v in tried.items()}}


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "seeds": values,
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def shares(found: dict[str, Any]) -> dict[str, float]:
    """Contender -> its whole state over AdamW's."""
    adamw = next((x["state"] for x in found["contenders"] if x["contender"] == "adamw"), None)
    whole = adamw or 2 * found["contenders"][0]["parameters"]
    return {line["contender"]: line["state"] / whole for line in found["contenders"]}


def draw(studies: list[dict[str, Any]], file: Path) -> None:
    """Validation against the whole state over AdamW's, a panel for every task."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(3, len(studies))
    rows = ceil(len(studies) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.7 * rows), layout="constrained")
    for i, found in enumerate(studies):
        axes = figure.add_subplot(rows, columns, i + 1)
        share = shares(found)
        counts = NONE if NONE in share else ""  # whose counts are all it has
        least = min((s for name, s in share.items() if name != counts), default=1.0)
        zero = log2(least) - 1.5
        place = {name: zero if name == counts else log2(s) for name, s in share.items()}
        ours = [x for x in found["contenders"] if x["contender"].startswith("comoving")]
        curve = sorted(((place[x["contender"]], x) for x in ours), key=itemgetter(0))
        axes.errorbar(
            [x for x, _ in curve], [x["mean"] for _, x in curve], [x["deviation"] or 0 for _, x in curve],
            fmt="o-", color="#D55E00", lw=2, ms=5, capsize=2, label="comoving.Optimizer",
        )  # fmt: skip
        for color, line in zip(("#0072B2", "#009E73", "#CC79A7", "#E69F00"), _rivals(found), strict=False):
            axes.errorbar(
                place[line["contender"]], line["mean"], line["deviation"] or 0, fmt="s", color=color, capsize=2,
                label=f"{line['contender'].replace(':moments=int8', ', 8 bits')}, tuned",
            )  # fmt: skip
        lowest = ceil(log2(least))
        ticks = range(0, lowest - 1, -max(1, -(lowest // 6)))
        axes.set_xticks([zero, *ticks], ["none", *(f"1/{2**-t}" if t else "1" for t in ticks)], fontsize=8)
        axes.set_title(TASKS[found["task"]].title, fontsize=10)
        axes.set_ylabel(TASKS[found["task"]].metric, fontsize=8)
        axes.grid(alpha=0.3)
        if i == 0:
            axes.legend(fontsize=7)
    figure.supxlabel("state of all parameters / AdamW's", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def _rivals(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [line for line in found["contenders"] if not line["contender"].startswith("comoving")]


def lines(found: dict[str, Any]) -> list[str]:
    """The table in words."""
    share = shares(found)
    return [
        f"{x['contender']:24s} {x['mean']:.4f}"
        + (f" +- {x['deviation']:.4f}" if x["deviation"] is not None else "")
        + f"  state {share[x['contender']]:.4f}x  lr {x['rate']:g}"
        for x in sorted(found["contenders"], key=lambda x: x["mean"])
    ]


def markdown(found: dict[str, Any]) -> list[str]:
    """The table as docs/frontier.md has it, by falling state."""
    share, best = shares(found), min(line["mean"] for line in _rivals(found) or found["contenders"])
    rows = ["| | validation | state | beside the best rival |", "|---|---|---|---|"]
    for x in sorted(found["contenders"], key=lambda x: (-x["state"], x["mean"])):
        spread = f" ± {x['deviation']:.2g}" if x["deviation"] is not None else ""
        rate = "" if x["contender"].startswith("comoving") else f", rate {x['rate']:g}{_ratio(x['label'])}"
        name = x["contender"].replace(":moments=int8", ", 8 bits").replace("comoving, ", "`comoving.Optimizer`, ")
        least = "0" if x["contender"] == NONE else f"{share[x['contender']]:.2g}x"
        rows.append(f"| {name}{rate} | {x['mean']:.4g}{spread} | {least} | {x['mean'] / best - 1:+.1%} |")
    return rows


def _ratio(label: str) -> str:
    """The rate of all other roles over that of the weights, in a rival's label."""
    given = label.partition("rates={")[2].partition("}")[0]
    return f", all others {given.partition(':')[2].partition(',')[0]} times that" if given else ""


def choices_markdown(found: dict[str, Any]) -> list[str]:
    """What each choice of the table costs on each task, in percent of the best composition's validation."""
    tasks = [run["task"] for run in found["runs"]]
    tasks = [*dict.fromkeys(tasks)]
    rows = [f"| role | choice | {' | '.join(tasks)} |", "|---|---|" + "---|" * len(tasks)]
    for role, choices in CANDIDATES.items():
        for choice in choices[:-1]:
            by_task = found["losses"].get(role, {}).get(choice["name"], {})
            cells = [f"{by_task[task]:+.1%}" if task in by_task else "" for task in tasks]
            rows.append(f"| {role} | {choice['name']} | {' | '.join(cells)} |")
        measured = {task for by_task in found["losses"].get(role, {}).values() for task in by_task}
        cells = ["0" if task in measured else "" for task in tasks]
        rows.append(f"| {role} | **{choices[-1]['name']}** | {' | '.join(cells)} |")
    return rows
