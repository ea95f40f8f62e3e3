import math

import numpy as np
import pytest

from comoving.lab.verdicts import ANSWERS, NO, RULES, UNKNOWN, YES, Verdict, judge, rule
from comoving.lab.verdicts.mechanism import points
from comoving.lab.verdicts.speed import times
from comoving.lab.verdicts.stable import random_cosine
from lab.synthetic import BITS, against, arm, baseline, broken, run, study, turned


def find(results, criterion, name=None):
    (one,) = [v for v in judge(results) if v.criterion == criterion and name in (None, v.arm)]
    return one


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize(("speed", "answer"), [(1.3, YES), (1.0, NO), (0.7, NO), (1.03, NO)])
def test_speed_of_known_effects(speed, answer, bits):
    results = against(5, 0.01, speed=speed)
    verdict = find(turned(results) if bits else results, "speed")
    assert verdict.answer == answer and verdict.figures["pairs"] == 5
    # t = -80 log(1 - share) / speed at equal finals, so that the ratio of times is 1 / speed.
    assert verdict.figures["saving"] == pytest.approx(1 - 1 / speed, abs=0.03)
    assert verdict.figures["low"] < verdict.figures["saving"] < verdict.figures["high"]


def test_the_interval_of_speed_by_hand():
    arms = [baseline(3, 0.0), arm("E4-r4", "treatment", [run(s, speed=p) for s, p in enumerate((1.2, 1.25, 1.3))])]
    logs = np.log([1 / 1.2, 1 / 1.25, 1 / 1.3])
    found = times(study(arms), arms[1])
    # Linear interpolation between evaluations is the only thing in the way of equality.
    assert list(found.ratios.values()) == pytest.approx(np.exp(logs), rel=1e-2)
    exact = np.log(list(found.ratios.values()))
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * exact.std(ddof=1) / math.sqrt(3)
    figures = find(study(arms), "speed").figures
    assert figures["low"] == pytest.approx(1 - math.exp(exact.mean() + half), rel=1e-9)
    assert figures["high"] == pytest.approx(1 - math.exp(exact.mean() - half), rel=1e-9)


def test_noise_leaves_speed_open():
    assert find(against(3, 0.15, speed=1.12), "speed").answer == UNKNOWN
    assert "neither" in find(against(3, 0.15, speed=1.12), "speed").text


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_answer_nothing(seeds):
    results = against(seeds, 0.01, speed=2.0)
    assert {v.answer for v in judge(results)} == {UNKNOWN}
    assert f"{seeds} complete pair" in find(results, "speed").text
    assert not any("nan" in v.text for v in judge(results))


def test_three_seeds_are_called_few():
    assert "4.30" in find(against(3, 0.01, speed=1.5), "speed").text
    assert "4.30" not in find(against(5, 0.01, speed=1.5), "speed").text


def test_never_reaching_is_no_and_sometimes_is_open():
    results = against(3, 0.01, shift=-30)
    assert find(results, "speed").answer == NO and "none of 3 seeds" in find(results, "speed").text
    results["arms"][1]["runs"][1] = run(1, noise=0.01, kind=1, speed=1.5)
    assert find(results, "speed").answer == UNKNOWN and "does not reach 90% in seed 0, 2" in find(results, "speed").text


def test_an_absolute_target_that_the_baseline_never_reaches():
    results = against(3, 0.01, speed=1.5)
    results["metric"] = {**results["metric"], "absolute": [99.0]}
    verdict = find(results, "speed: 99 accuracy in % in steps")
    assert verdict.answer == UNKNOWN and "the baseline does not reach" in verdict.text


def test_a_target_before_the_directions_are_used():
    results = against(3, 0.01, speed=1.5)
    results["arms"][1]["begin"] = 100
    early = find(results, "speed: 80% in steps")
    assert early.answer == UNKNOWN and "before the directions are used" in early.text
    assert find(results, "speed").answer == YES


def test_a_diverged_seed_bars_yes_and_is_said():
    results = against(4, 0.01, speed=1.5)
    assert find(results, "speed").answer == find(results, "final").answer == YES
    results["arms"][1]["runs"][3] = broken(3, 390)
    for criterion in ("speed", "final"):
        verdict = find(results, criterion)
        assert verdict.answer == UNKNOWN and "diverged in 1 of 4 seeds (3)" in verdict.text
    assert find(results, "stability").answer == NO


def test_diverged_everywhere_is_no():
    results = against(3, 0.01)
    results["arms"][1]["runs"] = [broken(seed) for seed in range(3)]
    assert [find(results, c).answer for c in ("speed", "final", "stability")] == [NO] * 3


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize(("shift", "answer"), [(0.0, YES), (1.0, YES), (-1.0, NO), (-0.2, UNKNOWN)])
def test_final(shift, answer, bits):
    results = against(5, 0.03, shift=shift)
    if bits:  # 0.2 pt are 0.01 bits there
        results = turned(results) | {"metric": {**BITS, "tolerance": 0.01}}
    assert find(results, "final").answer == answer


def test_finals_that_are_equal_in_every_seed():
    same = against(3, 0.0)
    assert find(same, "final").answer == YES
    worse = against(3, 0.0, shift=-0.3)
    assert find(worse, "final").answer == UNKNOWN and "same in all 3 seeds" in find(worse, "final").text


def sigma(*values):
    return {"spectra": {"spec/a/sigma_max": [[100 * i, v] for i, v in enumerate(values)], "spec/a/grad/p": [[0, 0.1]]}}


def with_sigma(first, second, seeds=3):
    shake = [1 + 0.01 * seed for seed in range(seeds)]
    bases = [run(s, extras=sigma(*first)) for s in range(seeds)]
    others = [run(s, extras=sigma(*(v * shake[s] for v in second))) for s in range(seeds)]
    return study([arm("B0", "baseline", bases), arm("E4-r4", "treatment", others)], seeds)


@pytest.mark.parametrize(
    ("path", "answer"), [((1, 1.5, 2), YES), ((1, 3, 5), NO), ((1, 5, 2), NO), ((1, 1.1, 1.2), YES), ((), YES)]
)
def test_stability_by_sigma_max(path, answer):
    verdict = find(with_sigma((1, 1.5, 2), path), "stability")
    assert verdict.answer == answer
    assert ("not read" in verdict.text) == (not path)


def test_stability_by_spikes():
    results = against(3)
    results["arms"][1]["runs"][0]["losses"][200] += 10
    assert find(results, "stability").answer == UNKNOWN
    for record, count in zip(results["arms"][1]["runs"], (4, 5, 4), strict=True):
        for i in range(count):
            record["losses"][100 + 40 * i] += 10
    verdict = find(results, "stability")
    assert verdict.answer == NO and verdict.figures["spikes"] == 14
    gone = against(3)
    gone["arms"][1]["runs"][2]["losses"][-30:] = [9.0] * 30
    assert find(gone, "stability").answer == NO and "leaves in seed 2" in find(gone, "stability").text


def mechanism(quantity_of, seeds=3):
    paces = (1.0, 1.1, 1.2, 1.3, 1.4)
    arms = [baseline(seeds, 0.01)]
    for i, pace in enumerate(paces):
        runs = [run(s, speed=pace, noise=0.01, kind=i + 1) for s in range(seeds)]
        for record in runs:
            record["energy"] = [[0, quantity_of(i, record["seed"])], [50, None]]
        arms.append(arm(f"3B-{i}", "treatment", runs, rank=4))
    return study(arms, seeds)


def test_mechanism():
    assert find(mechanism(lambda i, s: 0.1 * i + 0.01 * s), "mechanism: p_t").answer == YES
    assert find(mechanism(lambda i, s: 1 - 0.1 * i), "mechanism: p_t").answer == NO
    assert find(mechanism(lambda i, s: [3, 1, 4, 0, 2][i] + 0.1 * s), "mechanism: p_t").answer in (NO, UNKNOWN)
    constant = find(mechanism(lambda i, s: 0.5), "mechanism: p_t")
    assert constant.answer == UNKNOWN and "the same in all" in constant.text
    assert "at least 6" in find(mechanism(lambda i, s: 0.1 * i), "mechanism: alignment").text
    few = find(mechanism(lambda i, s: 0.1 * i, seeds=2), "mechanism: p_t")
    assert few.answer == UNKNOWN and "2 seeds" in few.text


def test_random_subspaces():
    # In the plane the cosine of two random lines is |cos| of a uniform angle: 2 / pi on the mean.
    rng = np.random.default_rng(1)
    assert abs(random_cosine(2, 1) - 2 / math.pi) < 0.15
    a, b = (np.linalg.qr(rng.standard_normal((400, 96, 8)))[0] for _ in range(2))
    expected = np.linalg.svd(a.transpose(0, 2, 1) @ b, compute_uv=False).mean()
    assert random_cosine(96, 8) == pytest.approx(expected, abs=0.01)
    assert random_cosine(8, 8) == random_cosine(4, 8) == 1.0


def stable(cosine, share, seeds=3):
    runs = []
    for seed in range(seeds):
        spectra = {f"spec/a/{part}cos_{side}_mean": [[0, None], [50, cosine + 0.002 * seed]]
                   for part in ("", "grad/", "momentum/", "update/") for side in "uv"}  # fmt: skip
        spectra["spec/a/grad/p"] = [[50, share * (1 + 0.01 * seed)]]
        spectra["spec/a/sv8"] = [[50, 1.0]]
        runs.append(run(seed, extras={"spectra": spectra}))
    return study([arm("B0", "baseline", runs)], seeds, study="3", shapes={"a": [96, 64]})


def test_stable_directions():
    # k^2 / (m n) = 64 / 6144 = 0.0104.
    results = stable(0.95, 0.3)
    assert {v.answer for v in judge(results)} == {YES} and len(judge(results)) == 5
    energy = find(results, "directions: energy").figures
    assert energy["factor"] == pytest.approx(0.3 * 1.01 * 96, rel=1e-3)
    chance = (random_cosine(96, 8) + random_cosine(64, 8)) / 2
    assert find(results, "directions: gradient").figures["random"] == pytest.approx(chance)
    assert {v.answer for v in judge(stable(chance, 64 / 6144))} == {NO}
    assert {v.answer for v in judge(stable(0.95, 0.3, seeds=2))} == {UNKNOWN}
    results.pop("shapes")
    assert {v.answer for v in judge(results)} == {UNKNOWN}
    assert all("shapes" in v.text for v in judge(results))


def controlled(b1=1.0, b3=0.0, e4=1.4, noise=0.01):
    def make(name, role, kind, **effect):
        return arm(name, role, [run(s, noise=noise, kind=kind, **effect) for s in range(3)], rank=4)

    arms = [make("E4-r4", "treatment", 1, speed=e4), make("B1", "control", 2, speed=b1)]
    arms += [make("B2-r4", "control", 3), make("B3-r4", "control", 4, speed=1.4 if not b3 else 0.9, shift=b3)]
    return study([baseline(3, noise), *arms])


def test_controls():
    name = "controls: do not help"
    assert find(controlled(), name).answer == YES
    assert find(controlled(b1=1.4), name).answer == NO
    assert find(controlled(b1=1.2, e4=1.8), name).answer == YES  # it helps, but less than every treatment
    assert find(controlled(noise=0.2, e4=1.0), name).answer == UNKNOWN
    channel = "controls: full-rank channel needed"
    assert find(controlled(), channel).answer == NO
    assert find(controlled(b3=-5.0), channel).answer == YES


def test_wrong_input():
    with pytest.raises(ValueError, match="arms and a metric"):
        judge({"study": "e4", "arms": []})
    with pytest.raises(ValueError, match="maybe"):
        Verdict("speed", "B1", "maybe", {}, "")
    results = against()
    with pytest.raises(ValueError, match="55%"):
        times(results, results["arms"][1], "55%")


def test_every_verdict_has_a_rule():
    found = judge(controlled()) + judge(stable(0.9, 0.1))
    assert {v.answer for v in found} <= set(ANSWERS)
    assert {rule(v) for v in found} <= set(RULES.values())


@pytest.mark.parametrize("gone", ["runs", "seed", "curve", "everything", "baseline"])
def test_partial_results(gone):
    results = controlled()
    treatment = results["arms"][1]
    if gone == "runs":
        treatment |= {"runs": [], "rate": None, "error": "k = 99 exceeds the rank"}
    elif gone == "seed":
        treatment["runs"] = [treatment["runs"][0], None, treatment["runs"][2]]
    elif gone == "curve":
        treatment["runs"][1] = {"seed": 1, "status": "refused", "error": "no"}
    elif gone == "everything":
        for one in results["arms"]:
            one["runs"] = []
    else:
        results["arms"] = results["arms"][1:]
    verdicts = [v for v in judge(results) if v.arm == "E4-r4"]
    assert {v.answer for v in verdicts} == {UNKNOWN} and all(v.text for v in verdicts)
    if gone == "runs":
        assert "E4-r4 has no run (k = 99 exceeds the rank)" in verdicts[0].text
    if gone == "curve":
        assert "E4-r4 lacks seed 1 (no)" in verdicts[0].text
    if gone == "seed":
        assert "E4-r4 lacks seed 1" in verdicts[0].text


def test_a_target_that_only_the_arm_reaches_before_it_begins():
    results = against(3, 0.01, speed=3.0)
    results["arms"][1]["begin"] = 100
    verdict = find(results, "speed")
    assert verdict.answer == UNKNOWN and "before the directions are used" in verdict.text


def test_a_target_that_the_baseline_reaches_in_some_seeds_only():
    results = against(5, 0.01, speed=1.5)
    results["metric"] = {**results["metric"], "absolute": [95.9]}
    for record in results["arms"][0]["runs"][:2]:
        for point in record["curve"]:
            point["value"] = min(point["value"], 95.0)
    verdict = find(results, "speed: 95.9 accuracy in % in steps")
    assert verdict.answer == UNKNOWN and "others would be chosen" in verdict.text


def test_mechanism_looks_at_directions_in_use_only():
    results = against(3, 0.01, speed=1.5)
    treatment = results["arms"][1]
    treatment["begin"] = 100
    for record in treatment["runs"]:
        record["energy"] = [[0, 0.9], [50, 0.9], [100, 0.2], [200, 0.4]]
    control = {**treatment, "name": "B1", "role": "control", "action": "global"}
    results["arms"].append(control)
    found = points(results, "energy")
    assert [(p.arm, round(p.quantity, 6)) for p in found] == [(treatment["name"], 0.3)] * 3
