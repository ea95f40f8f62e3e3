"""Fair and cheap tuning: for every contender as many candidates of (rate, ratio), halved rung by rung, as many steps.

A candidate is a peak rate of hidden weights and the ratio of every other parameter's rate to it
(:mod:`comoving.race.ratios`). All rungs but the last one are trained with seed 0, on the schedule of the whole run, and
each goes on from where the one before it ended (:mod:`comoving.race.resuming`) where that could be kept. The
candidates of the last rung, the finalists, are trained with every seed; the one with the best mean is the contender's.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comoving.race.halving import Candidate, allowance, candidates, ladder, survivors
from comoving.race.settings import RunSettings, SettingsError

if TYPE_CHECKING:
    from comoving.race.sweep import Entry, Race

Record = dict[str, Any]


def value(record: Record | None) -> float | None:
    """Final validation of a run that has one."""
    return record["final"] if record is not None and record["status"] == "finished" else None


class Tuning:
    """The rungs of a race.

    Args:
        race: with ``settings.tune`` candidates for each of its contenders.

    Raises:
        SettingsError: too few steps for so many rungs.
    """

    def __init__(self, race: Race) -> None:
        self.race, self.settings = race, race.settings
        try:
            self.rungs = ladder(self.settings.tune, self.settings.steps, self.settings.rungs)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self.alive = {id(entry): candidates(entry.rates[0], self.settings.tune) for entry in race.entries}

    def runs(self, entry: Entry, steps: int, seeds: int) -> list[tuple[Candidate, RunSettings]]:
        """Those of an entry's living candidates, up to ``steps``."""
        label = entry.contender.label
        fingerprint = self.race.fingerprints[label]
        until = 0 if steps == self.settings.steps else steps
        return [
            (chosen, replace(self.settings.run(label, chosen.rate, seed, fingerprint), ratio=chosen.ratio, until=until))
            for seed in range(seeds)
            for chosen in self.alive[id(entry)]
        ]

    def run(self) -> list[Entry]:
        """Train rung by rung; each entry is left with its best candidate's runs, and with ``trials`` and ``ratio``."""
        for i, rung in enumerate(self.rungs):
            last = i + 1 == len(self.rungs)
            due = {
                id(entry): self.runs(entry, rung.steps, self.settings.seeds if last else 1) for entry in self.entries
            }
            for entry in self.entries:
                entry.records = {}
            self.race.run_all([(entry, run) for entry in self.entries for _, run in due[id(entry)]])
            for entry in self.entries:
                self._note(entry, i, due[id(entry)])
                if last:
                    self._choose(entry)
                else:
                    self._halve(entry, self.rungs[i + 1].candidates)
        return self.race.entries

    @property
    def entries(self) -> list[Entry]:
        """Those that have a candidate left."""
        return [entry for entry in self.race.entries if self.alive[id(entry)]]

    def _note(self, entry: Entry, rung: int, due: list[tuple[Candidate, RunSettings]]) -> None:
        """Keep what came out of a rung."""
        for chosen, run in due:
            record = entry.records[run.rate, run.seed]
            entry.trials.append(
                {
                    "rung": rung,
                    "steps": run.length,
                    "rate": chosen.rate,
                    "ratio": chosen.ratio,
                    "seed": run.seed,
                    "status": record["status"],
                    "value": value(record),
                }
            )

    def _halve(self, entry: Entry, count: int) -> None:
        """Let the better ones go on; what the others kept for it is removed."""
        values = {chosen: value(entry.records.get((chosen.rate, 0))) for chosen in self.alive[id(entry)]}
        going, gone = survivors(values, count)
        for _, run in self.runs(entry, self.settings.steps, 1):
            if Candidate(run.rate, run.ratio) in gone:
                self.race.forget(run)
        if not going:
            entry.rates = [chosen.rate for chosen in values]
        self.alive[id(entry)] = going

    def _choose(self, entry: Entry) -> None:
        """Leave the finalist with the best mean over seeds."""
        finals = {
            chosen: [value(record) for (rate, _), record in entry.records.items() if rate == chosen.rate]
            for chosen in self.alive[id(entry)]
        }
        means = {
            chosen: statistics.fmean(v for v in values if v is not None)
            for chosen, values in finals.items()
            if values and None not in values
        }
        entry.rates = [chosen.rate for chosen in finals]
        if means:
            best = min(means, key=lambda chosen: means[chosen])
            entry.rates, entry.ratio = [best.rate], best.ratio
            entry.records = {key: record for key, record in entry.records.items() if key[0] == best.rate}

    def facts(self) -> Record:
        """For ``results.json``: the rungs, what every contender was allowed, and what it has used."""
        return {
            "rungs": [{"candidates": rung.candidates, "steps": rung.steps} for rung in self.rungs],
            "allowance": allowance(self.rungs, self.settings.seeds),
            "trials": {entry.contender.label: entry.trials for entry in self.race.entries},
        }
