import pytest

from comoving.lab.verdicts import NO, UNKNOWN, YES, coincide, follow_up, judge
from lab.synthetic import arm, baseline, run, study


def halves(gaps, seeds=3, noise=0.02, **fields):
    """Studies 1 and 2 with a known gap per (rank, layers): the frozen arm's final above the zero arm's."""
    arms = [baseline(seeds, noise)]
    for i, ((rank, layers), gap) in enumerate(gaps.items()):
        suffix = f"-r{rank}" + ("-half" if layers == "half" else "")
        for j, (backbone, shift) in enumerate((("frozen", gap - 10), ("zero", -10.0))):
            runs = [run(s, shift=shift, noise=noise, kind=2 * i + j + 1) for s in range(seeds)]
            arms.append(
                arm(backbone + suffix, "treatment", runs, rank=rank, layers=layers, backbone=backbone, **fields)
            )
    return study(arms, seeds, study="12")


def answers(results):
    return {(v.criterion, v.arm): v.answer for v in judge(results) if v.criterion.startswith("ablation")}


WIDER = ("ablation: lower rank widens", "(frozen-r4 - zero-r4) - (frozen-r8 - zero-r8)")
FEWER = ("ablation: fewer layers widens", "(frozen-r4-half - zero-r4-half) - (frozen-r4 - zero-r4)")


@pytest.mark.parametrize(("low", "high", "answer"), [(3, 1, YES), (1, 1, NO), (1, 3, NO), (1.2, 1, UNKNOWN)])
def test_lower_rank(low, high, answer):
    found = answers(halves({(8, "all"): high, (4, "all"): low}, noise=0.02 if answer != UNKNOWN else 0.2))
    assert found[WIDER] == answer and FEWER not in found


def test_fewer_layers():
    assert answers(halves({(4, "all"): 1, (4, "half"): 3}))[FEWER] == YES
    assert answers(halves({(4, "all"): 3, (4, "half"): 1}))[FEWER] == NO
    assert answers(halves({(4, "all"): 1, (4, "half"): 3}, seeds=2))[FEWER] == UNKNOWN


def test_a_gap_is_paired_with_the_same_seed():
    results = halves({(8, "all"): 1, (4, "all"): 3})
    for one in results["arms"][1:]:
        for record in one["runs"]:
            record["final"] += 20 * record["seed"]  # an effect of the seed on all arms changes nothing
    assert answers(results)[WIDER] == YES


def test_coinciding():
    same, apart = {(8, "all"): 0, (4, "all"): 0}, {(8, "all"): 0, (4, "all"): 2}
    assert coincide(halves(same)) is True and follow_up(halves(same))
    assert coincide(halves(apart)) is False and not follow_up(halves(apart))
    assert set(answers(halves(same)).values()) == {NO}
    noisy = halves(same, noise=0.2)
    assert coincide(noisy) is None
    assert coincide(halves(same, seeds=2)) is None and follow_up(halves(same, seeds=2))
    assert not follow_up(halves(apart, seeds=1))


def test_follow_ups_do_not_change_whether_they_were_due():
    assert coincide(halves({(8, "all"): 0, (4, "all"): 0, (2, "all"): 5, (4, "half"): 5})) is True
    assert coincide(halves({(4, "all"): 5}, task="harder")) is None


def test_one_half_of_the_study_alone():
    results = halves({(4, "all"): 0})
    results["arms"] = results["arms"][:2]
    assert answers(results) == {} and coincide(results) is None and not follow_up(results)


def test_a_harder_task_has_its_own_baseline():
    results = halves({(4, "all"): 1})
    hard = [run(s, final=50, noise=0.02) for s in range(3)]
    other = [run(s, final=50, noise=0.02, kind=7) for s in range(3)]
    results["arms"].append(arm("B0-harder", "baseline", hard, task="harder"))
    results["arms"].append(arm("frozen-r4-harder", "treatment", other, rank=4, backbone="frozen", task="harder"))
    (found,) = [v for v in judge(results) if v.criterion == "final" and v.arm == "frozen-r4-harder"]
    assert found.answer == YES and abs(found.figures["difference"]) < 0.2
