"""Do stable directions exist: subspaces of successive readings, and energy in them, against random ones."""

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from comoving.lab.statistics import Paired, finite, paired
from comoving.lab.verdicts.base import (
    NO,
    UNKNOWN,
    YES,
    Results,
    Run,
    Verdict,
    arms,
    caution,
    missing,
    runs,
    seeds,
    sentence,
    undefined,
)

OBJECTS = {"weight": "", "gradient": "grad/", "momentum": "momentum/", "update": "update/"}
DRAWS = 32
HALF = 0.5
FACTOR = 2.0

RULE = (
    "Of the baseline's runs. Cosines: the mean principal cosine c of the top-k subspaces of successive readings (of U "
    "and V, over readings and layers) is set against r, what two random subspaces of the same k and size have (32 "
    "seeded draws): (c - r) / (1 - r) is 0 for random and 1 for unmoving ones. Yes: the 95% interval over seeds lies "
    "above 1/2; no: below. Energy: the mean p_t of a layer over k^2 / (m n), what fixed directions hold of a gradient "
    "without any. Yes: the interval of its geometric mean over layers lies above 2; no: below. Else, with fewer than "
    "3 seeds, or without the layers' shapes and k: not enough evidence."
)


@lru_cache(maxsize=256)
def random_cosine(size: int, k: int) -> float:
    """Mean principal cosine of two independent uniform k-dimensional subspaces of R^size, by 32 seeded draws.

    One may be fixed to the first k coordinates: the cosines are the singular values of the k x k top of a random frame.
    """
    if k >= size:
        return 1.0
    rng = np.random.default_rng(0)
    cosines = [
        np.linalg.svd(np.linalg.qr(rng.standard_normal((size, k)))[0][:k], compute_uv=False).mean()
        for _ in range(DRAWS)
    ]
    return float(np.mean(cosines))


def rank_of(results: Results, run: Run) -> int | None:
    """k of the readings: said in the results or the configuration, else counted in the keys sv1 .. svk."""
    config = results.get("config") or {}
    for value in (results.get("topk"), config.get("topk"), config.get("spec_topk")):
        if value is not None:
            return int(value)
    found = [re.search(r"/sv(\d+)$", key) for key in run.get("spectra") or {}]
    return max((int(match[1]) for match in found if match), default=None)


def series_mean(run: Run, key: str) -> float | None:
    """Mean of the readings that are numbers."""
    numbers = [finite(value) for _, value in (run.get("spectra") or {}).get(key, [])]
    sound = [value for value in numbers if value is not None]
    return math.fsum(sound) / len(sound) if sound else None


def layers(run: Run, shapes: dict[str, Any], ending: str) -> dict[str, float]:
    """Layer with a known shape -> mean of its readings of ``ending``."""
    found = {name: series_mean(run, f"spec/{name}/{ending}") for name in shapes}
    return {name: value for name, value in found.items() if value is not None}


def stability(run: Run, shapes: dict[str, Any], k: int, part: str) -> tuple[float, float, float] | None:
    """(c - r) / (1 - r), c and r of one object: means over the layers and both sides; None without readings."""
    scores: list[tuple[float, float]] = []
    for side, mode in (("u", 0), ("v", 1)):
        for name, cosine in layers(run, shapes, f"{part}cos_{side}_mean").items():
            chance = random_cosine(int(shapes[name][mode]), min(k, *map(int, shapes[name])))
            if chance < 1:
                scores.append((cosine, chance))
    if not scores:
        return None
    cosine, chance = (math.fsum(column) / len(scores) for column in zip(*scores, strict=True))
    return math.fsum((c - r) / (1 - r) for c, r in scores) / len(scores), cosine, chance


def energy(run: Run, shapes: dict[str, Any], k: int) -> tuple[float, float, float] | None:
    """log of p_t / (k^2 / (m n)), p_t and k^2 / (m n): means over layers, the latter two geometric."""
    logs: list[tuple[float, float]] = []
    for name, share in layers(run, shapes, "grad/p").items():
        m, n = map(int, shapes[name])
        if share > 0:
            logs.append((math.log(share), math.log(min(k, m, n) ** 2 / (m * n))))
    if not logs:
        return None
    found, chance = (math.fsum(column) / len(logs) for column in zip(*logs, strict=True))
    return found - chance, math.exp(found), math.exp(chance)


def answer_by(test: Paired, limit: float) -> str:
    """On which side of ``limit`` the interval lies."""
    if test.low is None or test.high is None or undefined(test) is not None:
        return UNKNOWN
    return YES if test.low > limit else NO if test.high < limit else UNKNOWN


def compare(
    results: Results, criterion: str, measure: Callable[[Run, dict[str, Any], int], tuple[float, float, float] | None]
) -> tuple[Paired, tuple[float, float] | None, str]:
    """The measure over the baseline's seeds, its second and third number on the mean, and what is missing."""
    baseline = arms(results, "baseline")[0]
    shapes = results.get("shapes") or {}
    found: list[tuple[float, float, float] | None] = []
    lacking = "" if shapes else "the layers' shapes are not in the results"
    own = runs(baseline)
    for seed in seeds(results, baseline):
        run = own.get(seed)
        k = None if run is None else rank_of(results, run)
        if run is not None and k is None and not lacking:
            lacking = "neither the results nor the keys say k"
        found.append(None if run is None or k is None else measure(run, shapes, k))
    known = [values for values in found if values is not None]
    if not known and not lacking:
        lacking = f"no readings of {criterion.partition(': ')[2]}"
    test = paired([None if values is None else values[0] for values in found], [0.0] * len(found))
    pair = None
    if known:
        pair = (math.fsum(v[1] for v in known) / len(known), math.fsum(v[2] for v in known) / len(known))
    return test, pair, sentence(lacking, *missing(results, baseline, None))


def directions(results: Results) -> list[Verdict]:
    """On study 3, or any other whose only arms are baselines."""
    if arms(results, "treatment", "control") or not arms(results, "baseline"):
        return []
    name = arms(results, "baseline")[0]["name"]
    found: list[Verdict] = []
    for thing, part in OBJECTS.items():
        criterion = f"directions: {thing}"

        def cosines(run: Run, shapes: dict[str, Any], k: int, part: str = part) -> tuple[float, float, float] | None:
            return stability(run, shapes, k, part)

        test, pair, lacking = compare(results, criterion, cosines)
        figures = {"stability": test.mean, "low": test.low, "high": test.high, "seeds": test.count}
        figures |= {"cosine": None, "random": None} if pair is None else {"cosine": pair[0], "random": pair[1]}
        said = "" if pair is None else f"mean principal cosine {pair[0]:.3f}, random subspaces {pair[1]:.3f}"
        interval = "" if test.low is None else f"stability {test.mean:.2f} (95% CI {test.low:.2f} to {test.high:.2f})"
        note = undefined(test) or caution(test)
        text = sentence(said, interval, lacking, note)
        found.append(Verdict(criterion, name, answer_by(test, HALF), figures, text))
    test, pair, lacking = compare(results, "directions: energy", energy)
    factor = None if test.mean is None else math.exp(test.mean)
    figures = {"p": None if pair is None else pair[0], "chance": None if pair is None else pair[1], "factor": factor}
    low, high = (None if end is None else math.exp(end) for end in (test.low, test.high))
    figures |= {"low": low, "high": high, "seeds": test.count}
    said = "" if pair is None else f"p_t {pair[0]:.3g}, chance {pair[1]:.3g}"
    interval = "" if low is None else f"{factor:.3g} times chance (95% CI {low:.3g} to {high:.3g})"
    text = sentence(said, interval, lacking, undefined(test) or caution(test))
    found.append(Verdict("directions: energy", name, answer_by(test, math.log(FACTOR)), figures, text))
    return found
