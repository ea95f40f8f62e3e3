"""Successive halving without any training."""

import math

import pytest

from comoving.race.halving import WIDTH, Candidate, Rung, allowance, candidates, ladder, survivors


def test_ladder():
    assert ladder(8, 400, 3) == [Rung(8, 100), Rung(4, 200), Rung(2, 400)]
    assert ladder(5, 300, 3) == [Rung(5, 75), Rung(2, 150), Rung(1, 300)]
    assert ladder(2, 7, 3) == [Rung(2, 1), Rung(1, 3), Rung(1, 7)]
    assert ladder(4, 10, 1) == [Rung(4, 10)]
    for trials, steps, rungs, word in ((0, 9, 1, "at least 1"), (1, 9, 0, "at least 1"), (4, 3, 3, "fewer rungs")):
        with pytest.raises(ValueError, match=word):
            ladder(trials, steps, rungs)


def test_steps_that_a_contender_may_train():
    rungs = ladder(8, 400, 3)
    assert allowance(rungs, 1) == 8 * 100 + 4 * 100 + 2 * 200
    assert allowance(rungs, 3) == 8 * 100 + 4 * 100 + 2 * 200 + 2 * 2 * 400
    assert allowance(rungs, 1, resumed=False) == 8 * 100 + 4 * 200 + 2 * 400
    assert allowance(rungs, 3) < 8 * 3 * 400 / 2  # of the grid


def test_candidates_are_the_same_factors_of_every_default():
    found = candidates(1e-3, 9)
    assert found[0] == Candidate(1e-3, 1.0) and len(set(found)) == len({c.rate for c in found}) == 9
    assert all(1 / WIDTH <= c.rate / 1e-3 <= WIDTH and 1 / WIDTH <= c.ratio <= WIDTH for c in found)
    other = candidates(4e-2, 9)
    for a, b in zip(found, other, strict=True):
        assert b.rate / a.rate == pytest.approx(40, rel=1e-3) and a.ratio == b.ratio
    assert candidates(1e-3, 4) == found[:4]


def test_candidates_fill_the_square():
    """Each quarter of it gets its share of those that are not the default."""
    found = candidates(1.0, 33)[1:]
    quarters = [sum((c.rate > 1) == up and (c.ratio > 1) == right for c in found) for up in (0, 1) for right in (0, 1)]
    assert all(6 <= count <= 10 for count in quarters)


A, B, C, D = (Candidate(rate) for rate in (1.0, 2.0, 3.0, 4.0))


def test_the_better_half_goes_on_best_first():
    assert survivors({A: 1.1, B: 1.0, C: 1.2, D: 1.05}, 2) == ([B, D], [A, C])
    assert survivors({A: 1.0, B: 1.0, C: 1.0}, 2) == ([A, B], [C])


def test_who_diverged_or_is_too_far_behind_is_given_up():
    assert survivors({A: None, B: 1.0, C: math.nan, D: math.inf}, 3) == ([B], [A, C, D])
    assert survivors({A: 1.0, B: 1.2, C: 1.3}, 3, margin=0.25) == ([A, B], [C])
    assert survivors({A: -1.0, B: -0.8, C: -0.7}, 3, margin=0.25) == ([A, B], [C])
    assert survivors({A: None, B: None}, 1) == ([], [A, B])
    assert survivors({}, 1) == ([], [])
