"""Studies over many contenders, each at its own best learning rate, found by a climb.

    python benchmarks/study.py ablation --task lm --out out/ablation-lm
    python benchmarks/study.py table --seeds 1 --out out/table
    python benchmarks/study.py frontier --task lm
    python benchmarks/study.py picture
    python benchmarks/study.py ranks --task lm --out out/ranks-lm
    python benchmarks/study.py seeds --task lm --at comoving-adamw@0.008 --out out/ablation-lm
    python benchmarks/study.py collect --task lm --from out/ranks-lm out/ranks-lm-2 --out benchmarks/results/study

"table" measures what `comoving.Optimizer` chooses from, and writes it into the package; "frontier" sets it at several
budgets against tuned rivals, and draws validation against the whole state; "picture" draws all committed frontiers, and
prints their tables.

"ablation" changes one choice of `comoving.AdamW`'s defaults at a time. "ranks" sets recipes and codecs against each
other at many ranks, "codecs" compares codecs alone; both draw validation against the state of the projected weights.

Rates are tried from the contender's own default by factors of two until the best one has a worse one on both sides (at
most --climb runs). The --finalists best, and the ones that are always named, then get --seeds seeds at their best rate.
"seeds" runs what it is given at the rates it is given. Every run is a process with one thread; finished runs are kept
under --out and used again. "collect" gathers finished runs, of several places and commits, into one table: the
fingerprint of its code stands beside each run.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import budgets
from comoving.race.contenders import parse
from comoving.race.host import machine
from comoving.race.settings import RaceSettings
from comoving.race.sweep import Entry, Race, versions
from comoving.race.tasks import TASKS

FACTOR = 2.0
COMMITTED = Path(__file__).parent / "results" / "study"
DOCS = Path(__file__).parents[1] / "docs"
BUDGETED = ("table", "frontier", "picture")

ABLATION = [
    "adamw",
    "comoving-adamw",
    "comoving-adamw:finder=power(inertia=0.9)",
    "comoving-adamw:finder=exact(inertia=0.9)",
    "comoving-adamw:finder=randomized(inertia=0.9)",
    "comoving-adamw:finder=power(inertia=0.5, exact_up_to=32)",
    "comoving-adamw:refresh_every=1",
    "comoving-adamw:refresh_every=8",
    "comoving-adamw:refresh_every=50",
    "comoving-adamw:transport=keep",
    "comoving-adamw:transport=reset",
    "comoving-adamw:transport=carry",
    "comoving-adamw:residual=discard",
    "comoving-adamw:residual=fira",
    "comoving-adamw:codec=full",
    "comoving-adamw:moments=int8",
    "comoving-adamw:scale=match",
    "comoving-adamw:scale=0.2-match",
    "comoving-adamw:rule=soap",
    "comoving-adamw:rule=muon",
    "comoving-adamw:rule=lion",
]
"""Finder, its inertia, refresh period, transport, residual, codecs, scale, rule; one at a time."""
RULES = [
    "comoving-adamw:rule=soap",
    "comoving-adamw:rule=soap;transport=rotate(statistics='keep')",
    "comoving-adamw:rule=soap;transport=rotate(statistics='reset')",
    "comoving-adamw:rule=muon",
    "comoving-adamw:rule=muon;residual=discard",
    "comoving-adamw:rule=lion",
    "comoving-adamw:rule=adafactor",
]
WHOLE = [
    *(f"muon:moments={codec}" for codec in ("full", "int8", "int4")),
    *(f"soap:moments={codec}" for codec in ("full", "int8", "int4")),
    "shampoo",
    "smmf",
]
"""Whole frames with a codec, the rivals of low rank at equal bytes."""
MATRICES = [
    *(f"comoving-adamw:rank={share};moments=int8;residual=fira" for share in (1 / 32, 1 / 8, 1 / 4)),
    *(f"dion:rank={share};codec=int8;scale=0.2-match" for share in (1 / 8, 1 / 2)),
    *(f"fira:rank={share};moments=int8" for share in (1 / 32, 1 / 8)),
    *(f"{name}:rank=0.25" for name in ("galore", "ldadam", "fira", "apollo", "dion", "online-subspace-descent")),
    *(f"online-subspace-descent:rank={s};moments=int8;residual=fira" for s in (1 / 64, 1 / 32, 1 / 8, 1 / 4, 1 / 2)),
    *(f"online-subspace-descent:rank={share};moments=int8" for share in (1 / 32, 1 / 8, 1 / 4, 1 / 2)),
    *(f"{name}:rank=0.25" for name in ("coap", "dct-adamw", "flora", "low-rank-soap", "frugal")),
    "apollo-mini:rank=1",
    *(f"comoving-adamw:rank={share}" for share in (1 / 8, 1 / 4, 1 / 2)),
    *(f"comoving-adamw:rank={share};moments=int8" for share in (1 / 32, 1 / 8, 1 / 4, 1 / 2)),
    *(f"comoving-adamw:rank={share};moments=int8;residual=discard" for share in (1 / 32, 1 / 8)),
    *(f"comoving-adamw:rank={share};scale=match" for share in (1 / 32, 1 / 8, 1 / 4, 1 / 2)),
    *(f"comoving-adamw:rank={share};scale=match;residual=discard" for share in (1 / 32, 1 / 8)),
    *(f"comoving-adamw:rank={share};rule=muon(bf16=True);scale=1.0" for share in (1 / 8, 1 / 2)),
    *(f"comoving-adamw:rank={share};rule=soap(one_sided=True)" for share in (1 / 8, 1 / 2)),
]
SPARSE = "frame=sparse(density=0.25);finder=block_selection"
TENSORS = [
    *(f"comoving-adamw:rank={share}" for share in (0.01, 0.1, 0.3)),
    "comoving-adamw:rank=0.3;moments=int8",
    *(f"comoving-adamw:rank={share};residual=discard" for share in (0.01, 0.1)),
    *(f"comoving-adamw:rank={share};residual=fira" for share in (0.01, 0.1)),
    *(f"comoving-adamw:rank={share};{SPARSE};residual=discard" for share in (0.01, 0.1)),
    *(f"comoving-adamw:rank={share};{SPARSE};residual=fira" for share in (0.01, 0.1)),
    f"comoving-adamw:rank=0.1;{SPARSE}",
    *(f"{name}:rank=0.1" for name in ("tensor-galore", "tensorgrad", "tucker-adam", "nystrom-tucker-adam")),
    *(f"{name}:rank=0.1" for name in ("low-rank-soap", "fira", "apollo", "online-subspace-descent", "ldadam")),
    *(f"{name}:rank=0.1" for name in ("tt-adam", "ht-adam")),
]


DYNAMIC = "int8(table='dynamic')"
CODECS = [
    "comoving-adamw:moments=full;codec=full",
    "comoving-adamw:moments=int8;codec=int8",
    f"comoving-adamw:moments={DYNAMIC};codec={DYNAMIC}",
    "comoving-adamw:moments=int4;codec=int4",
    "comoving-adamw:moments=int8;codec=int8;bases=int8",
    "comoving-adamw:moments=int4;codec=int4;bases=int4",
    *(f"muon:moments={codec}" for codec in ("full", "int8", DYNAMIC, "int4")),
]
"""Every number of the state in as many bits, for the default at its usual rank, and for Muon in the whole frame."""


def at_ranks(task: str) -> list[str]:
    """Recipes at several ranks, and Muon and SOAP in the whole frame under several codecs."""
    return ["adamw", *WHOLE, *(TENSORS if task == "fno" else MATRICES)]


class Study:
    """The climbs and the seeds of one study."""

    def __init__(self, labels: list[str], arguments: argparse.Namespace) -> None:
        info = TASKS[arguments.task]
        settings = RaceSettings(
            task=arguments.task,
            optimizers=tuple(labels),
            steps=arguments.steps or info.steps,
            seeds=1,
            rates=(),
            rank=info.rank,
            out=arguments.out,
            validations=4,
        )
        self.race, self.arguments = Race(settings), arguments

    def value(self, entry: Entry, rate: float, seed: int = 0) -> float:
        """Final validation of a run, infinite where it did not finish."""
        label = entry.contender.label
        run = self.race.settings.run(label, rate, seed, self.race.fingerprints[label])
        record = self.race.finished(run)
        if record is None:
            self.race.one(entry, run)
            record = entry.records[rate, seed]
        entry.records[rate, seed] = record
        value = record.get("final")
        sys.stderr.write(f"{label} lr {rate:g} seed {seed}: {record['status']} {value}\n")
        return float("inf") if value is None else value

    def climb(self, entry: Entry) -> None:
        """Rates by factors of two until the best is bracketed."""
        start = self.race.settings.info.rates.get(entry.contender.name, entry.rates[0])
        tried = {0: self.value(entry, start)}
        if entry.refusal() is not None:
            return
        for _ in range(self.arguments.climb - 1):
            best = min(tried, key=lambda k: tried[k])
            step = next((k for k in (best + 1, best - 1) if k not in tried), None)
            if step is None:
                break
            tried[step] = self.value(entry, float(f"{start * FACTOR**step:.4g}"))
        best = min(tried, key=lambda k: tried[k])
        entry.still_at_edge = best + 1 not in tried or best - 1 not in tried
        entry.rates = [float(f"{start * FACTOR**best:.4g}")]

    def run(self) -> dict[str, Any]:
        """All climbs, then the finalists' seeds."""
        entries = self.race.entries
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(self.climb, entries))
        alive = [e for e in entries if e.records.get((e.rates[0], 0), {}).get("final") is not None]
        alive.sort(key=lambda e: e.records[e.rates[0], 0]["final"])
        finalists = alive[: self.arguments.finalists]
        finalists += [e for e in alive if e.contender.label in self.arguments.named and e not in finalists]
        jobs = [(e, e.rates[0], seed) for e in finalists for seed in range(1, self.arguments.seeds)]
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(lambda job: self.value(*job), jobs))
        return self.results()

    def seeds(self, pairs: list[tuple[str, float]]) -> None:
        """Every contender at its own rates, on all seeds."""
        entries = {entry.contender.label: entry for entry in self.race.entries}
        jobs = [(entries[label], rate, s) for s in range(self.arguments.seeds) for label, rate in pairs]
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(lambda job: self.value(*job), jobs))

    def results(self) -> dict[str, Any]:
        """What is committed: no curves, every rate and every seed."""
        return {
            "command": "python benchmarks/study.py " + " ".join(sys.argv[1:]),
            "task": self.race.settings.task,
            "steps": self.race.settings.steps,
            "machine": machine(self.race.settings.device, self.arguments.jobs),
            "versions": versions(self.race.entries),
            "contenders": [self.line(entry) for entry in self.race.entries],
        }

    def line(self, entry: Entry) -> dict[str, Any]:
        """One contender."""
        line: dict[str, Any] = {"contender": entry.contender.label}
        if (reason := entry.refusal()) is not None:
            return line | {"refused": reason}
        best = entry.rates[0]
        seeds = [r["final"] for (rate, _), r in sorted(entry.records.items()) if rate == best and "final" in r]
        first = entry.records[best, 0]
        done = [value for value in seeds if value is not None]
        figures = ("state", "state_projected", "parameters", "parameters_projected", "optimizer_seconds")
        return line | {
            "rate": best,
            "at_edge": entry.still_at_edge,
            "rates": {f"{rate:g}": r.get("final") for (rate, seed), r in sorted(entry.records.items()) if seed == 0},
            "seeds": seeds,
            "mean": statistics.fmean(done) if done else None,
            "deviation": statistics.stdev(done) if len(done) > 1 else None,
            **{name: first.get(name) for name in figures},
        }


def collect(task: str, places: list[Path]) -> dict[str, Any]:
    """The finished and diverged runs of several studies as one."""
    records = [json.loads(file.read_text()) for place in places for file in sorted(place.glob("runs/*.json"))]
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("settings", {}).get("task") == task and record["status"] in {"finished", "diverged"}:
            runs.setdefault(record["settings"]["contender"], []).append(record)
    return {
        "command": "python benchmarks/study.py " + " ".join(sys.argv[1:]),
        "task": task,
        "steps": sorted({record["settings"]["steps"] for own in runs.values() for record in own}),
        "contenders": [collected(label, own) for label, own in runs.items()],
    }


def collected(label: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """One contender, at the best mean of the rates with most seeds."""
    first = {r["settings"]["rate"]: r for r in records if r["settings"]["seed"] == 0}
    rates = {rate: r["final"] for rate, r in sorted(first.items())}
    done = {rate: value for rate, value in rates.items() if value is not None}
    line: dict[str, Any] = {"contender": label, "rates": {f"{rate:g}": value for rate, value in rates.items()}}
    if not done:
        return line
    of = {
        rate: [r["final"] for r in records if r["settings"]["rate"] == rate and r["final"] is not None] for rate in done
    }
    most = max(len(values) for values in of.values())
    best = min((rate for rate in done if len(of[rate]) == most), key=lambda rate: statistics.fmean(of[rate]))
    chosen = [r for r in records if r["settings"]["rate"] == best and r["final"] is not None]
    seeds = {r["settings"]["seed"]: r["final"] for r in chosen}
    figures = ("state", "state_projected", "parameters", "parameters_projected", "optimizer_seconds")
    return line | {
        "rate": best,
        "at_edge": best in {min(rates), max(rates)},
        "seeds": [seeds[k] for k in sorted(seeds)],
        "mean": statistics.fmean(seeds.values()),
        "deviation": statistics.stdev(seeds.values()) if len(seeds) > 1 else None,
        **{name: first[best].get(name) for name in figures},
        "fingerprints": sorted({r["settings"]["fingerprint"] for r in records}),
    }


def of_adamw(found: dict[str, Any]) -> float:
    """Bytes of AdamW's state on the projected parameters: measured where it took part, else two moments each.

    Second moments of complex weights are real, as everywhere here; the FNOs' weights are complex.
    """
    moments = 1.5 if found["task"].startswith("fno") else 2
    lines = {line["contender"]: line for line in found["contenders"] if "state_projected" in line}
    some = next(iter(lines.values()))
    return lines["adamw"]["state_projected"] if "adamw" in lines else moments * some["parameters_projected"]


def draw(found: dict[str, Any], file: Path) -> None:
    """Validation against the state of the projected parameters, in shares of AdamW's."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 6))
    axes = figure.subplots()
    dense = of_adamw(found)
    families: dict[str, list[tuple[float, float, str]]] = {}
    for line in found["contenders"]:
        if line.get("mean") is None:
            continue
        label = line["contender"]
        name, _, rest = label.partition(":")
        options = [o for o in rest.split(";") if o and not o.startswith("rank=")]
        whole = label in WHOLE or label in CODECS
        family = name if whole else " ".join([name, *options])
        share = line["state_projected"] / dense
        if line["deviation"] is not None:
            axes.errorbar(share, line["mean"], line["deviation"], color="0.7", capsize=2, lw=1)
        families.setdefault(family, []).append((share, line["mean"], " ".join(options) if whole else ""))
    for i, (family, points) in enumerate(families.items()):
        points.sort()
        marker = "osD^"[i // 10 % 4]  # there are ten colours
        axes.plot([p[0] for p in points], [p[1] for p in points], f"{marker}-", ms=4, lw=1, label=family)
        for share, value, note in points:
            axes.annotate(note, (share, value), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("state of the projected parameters / AdamW's")
    axes.set_ylabel(TASKS[found["task"]].metric)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130, bbox_inches="tight")


def main() -> None:
    """Run a study, print its table, write its JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=(*BUDGETED, "ablation", "rules", "ranks", "codecs", "seeds", "collect"))
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--tasks", default=",".join(budgets.TABLE_TASKS), help="of table, by commas")
    parser.add_argument("--roles", default="", help="of table: these alone, by commas")
    parser.add_argument("--budgets", default=",".join(budgets.BUDGETS), help="of frontier, by commas")
    parser.add_argument("--tuned", default=",".join(budgets.TUNED), help="rivals in frontier, by commas, or 'kept'")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--climb", type=int, default=5, help="most runs in the search for a rate")
    parser.add_argument("--finalists", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--named", default="adamw,comoving-adamw", type=lambda text: text.split(","))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--from", dest="places", type=Path, nargs="+", default=[], help="where collect looks")
    parser.add_argument("--name", default="ranks", help="what collect writes")
    parser.add_argument("--only", default="", help="contenders, or choices of table, whose label contains this")
    parser.add_argument("--at", nargs="+", default=[], help="what seeds runs: contender@rate")
    arguments = parser.parse_args()
    if arguments.study in BUDGETED:
        budgeted(arguments)
        return
    if arguments.task is None:
        parser.error(f"{arguments.study} needs --task")
    if arguments.study == "collect":
        found = collect(arguments.task, arguments.places)
        report(found, arguments.out, arguments.name)
        return
    if arguments.study == "seeds":
        pairs = [(label, float(rate)) for label, rate in (pair.rsplit("@", 1) for pair in arguments.at)]
        Study(list(dict.fromkeys(label for label, _ in pairs)), arguments).seeds(pairs)
        return
    lists = {
        "ablation": ABLATION,
        "rules": ["comoving-adamw", *RULES],
        "codecs": CODECS,
        "ranks": at_ranks(arguments.task),
    }
    labels = [label for label in lists[arguments.study] if arguments.only in label]
    for label in labels:
        parse(label)
    report(Study(labels, arguments).run(), arguments.out, arguments.study)


def budgeted(arguments: argparse.Namespace) -> None:
    """The studies of the default optimizer: their JSON and pictures are what is committed."""
    if arguments.study == "table":
        arguments.known = COMMITTED / "table.json"
        found = budgets.table(arguments)
        (COMMITTED / "table.json").write_text(json.dumps(found, indent=1) + "\n")
        return
    if arguments.study == "frontier":
        arguments.known = COMMITTED / f"frontier_{arguments.task}.json"
        found = budgets.frontier(arguments)
        (COMMITTED / f"frontier_{arguments.task}.json").write_text(json.dumps(found, indent=1) + "\n")
        budgets.draw([found], COMMITTED / f"frontier_{arguments.task}.png")
        print(*budgets.lines(found), sep="\n")
    files = [COMMITTED / f"frontier_{task}.json" for task in TASKS]
    known = [json.loads(file.read_text()) for file in files if file.exists()]
    budgets.draw(known, DOCS / "frontier.png")
    if arguments.study == "picture":
        for found in known:
            print(f"\n### {found['task']}, {found['steps']} steps\n", *budgets.markdown(found), sep="\n")
        print("\n", *budgets.choices_markdown(json.loads((COMMITTED / "table.json").read_text())), sep="\n")


def report(found: dict[str, Any], out: Path, name: str) -> None:
    """JSON, picture and table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}_{found['task']}.json").write_text(json.dumps(found, indent=1) + "\n")
    if name in ("ranks", "codecs"):
        draw(found, out / f"{name}_{found['task']}.png")
    whole = of_adamw(found)
    for line in sorted(found["contenders"], key=lambda line: line.get("mean") or float("inf")):
        if line.get("mean") is None:
            print(f"{line['contender']:60s} {line.get('refused', 'diverged')}")
            continue
        share = line["state_projected"] / whole
        spread = f" +- {line['deviation']:.4f}" if line["deviation"] is not None else ""
        edge = " (rate at the edge)" if line["at_edge"] else ""
        print(f"{line['contender']:60s} {line['mean']:.4f}{spread}  state {share:.3f}x  lr {line['rate']:g}{edge}")


if __name__ == "__main__":
    main()
