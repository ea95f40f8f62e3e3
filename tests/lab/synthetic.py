"""Results of studies that never ran, with effects that are known."""

import math
import random

METRIC = {"name": "accuracy in %", "goal": "max", "origin": 0.0, "tolerance": 0.2, "unit": "pt", "absolute": [90.0]}
BITS = {"name": "bits per byte", "goal": "min", "origin": 8.0, "tolerance": 0.02, "unit": "bits", "absolute": [3.0]}
STEPS = 400


def run(seed, *, speed=1.0, shift=0.0, final=96.0, noise=0.0, extras=None, steps=STEPS, rate=0.002, kind=0):
    """A held-out curve final * (1 - exp(-speed * step / 80)), which is ``speed`` times as fast as the baseline's.

    ``noise`` is the deviation of the log of the speed and of the final over seeds; deterministic in seed and ``kind``.
    """
    draw = random.Random(1000 * seed + kind)
    pace = speed * math.exp(noise * draw.gauss(0, 1))
    end = final + shift + noise * draw.gauss(0, 1)
    curve = []
    for step in range(0, steps + 1, 10):
        value = end * (1 - math.exp(-pace * step / 80)) + (0 if step < steps else end * math.exp(-pace * steps / 80))
        curve.append({"step": step, "seconds": 0.02 * step, "value": value, "loss": 2.4 * math.exp(-step / 80)})
    losses = [2.4 * math.exp(-step / 80) + 0.01 for step in range(steps)]
    record = {"seed": seed, "rate": rate, "status": "finished", "curve": curve, "losses": losses, "final": end}
    return {**record, "seconds": 0.02 * steps, "spectra": {}, "energy": [], "alignment": []} | (extras or {})


def broken(seed, at=60):
    """A run that diverged."""
    record = run(seed)
    record["curve"] = [point for point in record["curve"] if point["step"] <= at]
    losses = [*record["losses"][:at], None]
    return {**record, "status": "diverged", "error": f"loss nan at step {at + 1}", "losses": losses, "final": None}


def arm(name, role, runs, **fields):
    rest = {"summary": f"summary of {name}", "rank": None, "layers": "all", "backbone": None}
    rates = {"0.001": 95.1, "0.002": 96.0, "0.004": None}
    return {"name": name, "role": role, **rest, "rates": rates, "rate": 0.002, "runs": runs} | fields


def study(arms, seeds=3, metric=METRIC, **fields):
    record = {"study": "e4", "title": "Extraction", "question": "Does it help?", "command": "comoving lab run e4"}
    config = {"name": "vit-tiny-digits", "steps": STEPS, "ranks": [4, 8]}
    rest = {"followups": [], "machine": {"cpu": "some"}, "versions": {"torch": "2"}}
    return {**record, "config": config, "metric": metric, "seeds": seeds, "arms": arms, **rest} | fields


def baseline(seeds=3, noise=0.02, name="B0", **fields):
    return arm(name, "baseline", [run(seed, noise=noise) for seed in range(seeds)], **fields)


def against(seeds=3, noise=0.02, role="treatment", name="E4-r4", metric=METRIC, **effect):
    """A baseline and one arm with a known effect."""
    other = arm(name, role, [run(seed, noise=noise, kind=1, **effect) for seed in range(seeds)], rank=4)
    return study([baseline(seeds, noise), other], seeds, metric)


def turned(results):
    """The same in bits, where smaller is better: v -> 8 - v / 20."""
    for one in results["arms"]:
        for record in one["runs"]:
            for point in record["curve"]:
                point["value"] = 8 - point["value"] / 20
            record["final"] = None if record["final"] is None else 8 - record["final"] / 20
    return {**results, "metric": BITS}
