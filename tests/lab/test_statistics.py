import math

import numpy as np
import pytest
import scipy.stats

from comoving.lab.statistics import complete, paired, quantile, spearman

QUANTILE = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # 4.30


def test_a_t_test_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, error 1/sqrt(3), t = 2 sqrt(3), 2 degrees of freedom, for which Student's
    # distribution is elementary: P(|T| > t) = 1 - t / sqrt(2 + t^2), which is 5% at the quantile below.
    test = paired([1.0, 4.0, 9.0], [0.0, 2.0, 6.0])
    assert (test.count, test.missing, test.freedom) == (3, 0, 2)
    assert test.mean == pytest.approx(2.0, rel=1e-14) and test.error == pytest.approx(1 / math.sqrt(3), rel=1e-14)
    t = 2 * math.sqrt(3)
    assert test.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-10)
    assert test.low == pytest.approx(2 - QUANTILE / math.sqrt(3), rel=1e-10)
    assert test.high == pytest.approx(2 + QUANTILE / math.sqrt(3), rel=1e-10)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_against_scipy(count, level):
    rng = np.random.default_rng(count)
    a, b = rng.standard_normal((2, count))
    expected = scipy.stats.ttest_rel(a, b)
    ends = expected.confidence_interval(level)
    test = paired(a.tolist(), b.tolist(), level)
    assert [test.p, test.low, test.high] == pytest.approx([expected.pvalue, ends.low, ends.high], rel=1e-9)


def test_what_is_missing_does_not_count_and_is_counted():
    test = paired([1.0, None, 3.0, math.nan, 5.0, 9.0], [0.0, 1.0, None, 2.0, 3.0, math.inf])
    assert (test.count, test.missing) == (2, 4)
    assert test.mean == pytest.approx(1.5)
    with pytest.raises(ValueError, match="one length"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"level = 1 is not in \(0, 1\)"):
        paired([1.0], [1.0], 1)
    assert complete([True, 2], [1.0, 2.0]) == [(2.0, 2.0)]


def test_no_pair_one_pair_no_variance():
    assert paired([], []).mean is None and paired([None], [1.0]).missing == 1
    one = paired([3.0], [1.0])
    assert (one.count, one.mean, one.error, one.p, one.low, one.high) == (1, 2.0, None, None, None, None)
    same = paired([0.3, 1.3, 2.3], [0.1, 1.1, 2.1])  # 0.2 but for rounding
    assert same.mean == pytest.approx(0.2) and same.error == 0 and same.p is None and same.low is None
    zero = paired([0.3, 1.3, 2.3], [0.3, 1.3, 2.3])
    assert (zero.mean, zero.p, zero.low, zero.high) == (0.0, 1.0, 0.0, 0.0)


def test_quantile_of_two_degrees():
    assert quantile(2) == pytest.approx(QUANTILE)


def test_spearman_against_scipy():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 8, 15).astype(float)  # with ties
    y = x + 3 * rng.standard_normal(15)
    expected = scipy.stats.spearmanr(x, y)
    test = spearman(x.tolist(), y.tolist())
    assert test.value == pytest.approx(expected.statistic, abs=1e-12) and test.p == pytest.approx(expected.pvalue)
    assert test.low is not None and test.high is not None and test.low < expected.statistic < test.high


def test_spearman_of_few_points_counts_orders():
    # Only the order itself and its reverse are as extreme, of 4! = 24.
    test = spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 25.0, 99.0])
    assert test.value == pytest.approx(1.0) and test.p == pytest.approx(2 / 24)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]).p == pytest.approx(2 / 6)


def test_spearman_that_does_not_exist():
    assert spearman([1.0, 2.0], [1.0, 2.0]).value is None
    constant = spearman([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0])
    assert constant.value is None and constant.p is None and constant.count == 4
    assert spearman([1.0, None, 3.0, 4.0], [1.0, 2.0, math.nan, 4.0]).missing == 2
