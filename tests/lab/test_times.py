import math

import pytest

from comoving.lab.times import Crossing, crossing, explosions, labels, share_target, targets
from lab.synthetic import BITS, METRIC, broken, run


def curve(*values):
    return [{"step": 10 * i, "seconds": 2.0 * i, "value": value} for i, value in enumerate(values)]


def test_between_evaluations():
    assert crossing(curve(10, 50, 90), 70, "max") == Crossing(15, 3.0)
    assert crossing(curve(8.0, 4.0, 3.0), 3.25, "min") == Crossing(17.5, 3.5)


def test_first_of_several_crossings_and_exact_ones():
    assert crossing(curve(0, 60, 40, 80), 50, "max") == Crossing(pytest.approx(50 / 6), pytest.approx(10 / 6))
    assert crossing(curve(0, 50, 60), 50, "max") == Crossing(10, 2.0)
    assert crossing(curve(55, 60), 50, "max") == Crossing(0, 0.0)


def test_never_reached():
    assert crossing(curve(0, 50), 51, "max") is None
    assert crossing([], 1, "max") is None
    assert crossing(curve(0, None, 60), 50, "max") is None
    assert crossing(curve(0, math.nan, 60), 50, "max") is None


def test_without_times():
    points = [{"step": 0, "value": 0.0}, {"step": 10, "value": 1.0}]
    assert crossing(points, 0.5, "max") == Crossing(5, None)


def test_bad_goals_and_targets():
    with pytest.raises(ValueError, match="best"):
        crossing([], 1, "best")
    with pytest.raises(ValueError, match="not finite"):
        crossing([], math.nan, "max")
    with pytest.raises(ValueError, match=r"share = 1.5"):
        share_target(METRIC, 90, 1.5)


def test_targets_are_shares_of_what_was_gained():
    assert targets(METRIC, 50.0) == {
        "80%": 40.0, "90%": 45.0, "95%": pytest.approx(47.5), "90 accuracy in %": 90.0
    }  # fmt: skip
    assert targets(BITS, 3.0) == {"80%": 4.0, "90%": 3.5, "95%": 3.25, "3 bits per byte": 3.0}
    assert list(targets(BITS, 3.0)) == labels(BITS)


@pytest.mark.parametrize(("metric", "final"), [(METRIC, None), (BITS, 8.5), (METRIC, 0.0)])
def test_no_share_of_nothing(metric, final):
    found = targets(metric, final)
    assert [found[share] for share in ("80%", "90%", "95%")] == [None] * 3
    assert found[labels(metric)[-1]] is not None


def test_explosions():
    assert explosions(run(0)).spikes == []
    calm = explosions(run(0))
    assert not calm.diverged and not calm.left
    assert explosions(broken(0)).diverged
    assert explosions({"status": "finished", "losses": [1.0, math.inf], "curve": []}).diverged
    assert explosions({"status": "finished", "losses": [1.0], "curve": [{"step": 1, "value": None}]}).diverged
    jump = run(0)
    jump["losses"][200] += 10
    assert explosions(jump).spikes == [200]
    assert explosions({"losses": [1.0] * 30 + [3.0] * 30}).left
    assert not explosions({"losses": [3.0] * 30 + [1.0] * 30}).left
    assert not explosions({}).diverged
