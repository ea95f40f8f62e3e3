"""Paired comparisons and rank correlations, and what they give where they are not defined: None, never NaN."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comoving.race.extras import require

EXACT = 7
"""Up to so many points the p of a rank correlation counts all orders (7! = 5040)."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Paired:
    """Differences d_1 .. d_n of pairs, their mean, and Student's t of it.

    error = s / sqrt(n) with s^2 = sum (d_i - mean)^2 / (n - 1); t = mean / error with ``freedom`` = n - 1 degrees of
    freedom; ``p`` is two-sided, for a mean of zero; the interval is mean -+ t_quantile * error.

    Attributes:
        count: n, the complete pairs.
        missing: pairs of which one half or both are missing or not finite; they do not count.
        mean: None without a pair.
        error: None with fewer than two pairs.
        freedom: n - 1; 0 with fewer than two pairs.
        p: None with fewer than two pairs, and where all differences are one number other than zero: then no deviation
            was measured (values in coarse steps give that), and nothing says how far to trust it. Where all differences
            are zero it is 1.
        low: lower end of the confidence interval; None where ``p`` is.
        high: upper end.
    """

    count: int
    missing: int
    mean: float | None
    error: float | None
    freedom: int
    p: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Correlation:
    """Spearman's correlation of ranks.

    Attributes:
        count: complete pairs.
        missing: pairs of which one half or both are missing or not finite.
        value: in [-1, 1]; None with fewer than three pairs or where one side is constant.
        p: two-sided, for no correlation: the share of all orders with as large a correlation up to 7 points, by
            Student's t with n - 2 degrees of freedom above; None where ``value`` is.
        low: lower end of the 95% interval by Fisher's transform, atanh(value) -+ 1.96 sqrt(1.06 / (n - 3)) (Fieller,
            Hartley and Pearson, 1957); None with fewer than four pairs.
        high: upper end.
    """

    count: int
    missing: int
    value: float | None
    p: float | None
    low: float | None
    high: float | None


def finite(value: Any) -> float | None:
    """The number, or None for what is none: missing, NaN, infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def complete(first: Values, second: Values) -> list[tuple[float, float]]:
    """The pairs both halves of which are finite numbers.

    Raises:
        ValueError: the two are not equally long.
    """
    if len(first) != len(second):
        raise ValueError(f"pairs need two lists of one length, not {len(first)} and {len(second)} values")
    both = [(finite(a), finite(b)) for a, b in zip(first, second, strict=True)]
    return [(a, b) for a, b in both if a is not None and b is not None]


def quantile(freedom: int, level: float = 0.95) -> float:
    """How many standard errors the interval reaches to each side: 4.30 with 2 degrees of freedom at 95%."""
    return float(require("scipy.stats", "lab").t.ppf(0.5 + level / 2, freedom))


def paired(first: Values, second: Values, level: float = 0.95) -> Paired:
    """Student's paired t test of ``first`` - ``second``.

    Args:
        first: one value per pair; None or a number that is not finite makes the pair missing.
        second: the same.
        level: of the confidence interval.

    Raises:
        ValueError: lists of different length, or a level outside of (0, 1).
        ImportError: scipy is missing (extra ``lab``).
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level} is not in (0, 1)")
    pairs = complete(first, second)
    count, missing = len(pairs), len(first) - len(pairs)
    if count == 0:
        return Paired(0, missing, None, None, 0, None, None, None)
    differences = [a - b for a, b in pairs]
    mean = math.fsum(differences) / count
    if count == 1:
        return Paired(1, missing, mean, None, 0, None, None, None)
    freedom = count - 1
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / freedom / count)
    # Differences that are equal but for rounding: no deviation was measured.
    rounding = 1e-13 * max(max(abs(a), abs(b)) for a, b in pairs)
    if error <= rounding:
        if abs(mean) <= rounding:
            return Paired(count, missing, 0.0, 0.0, freedom, 1.0, 0.0, 0.0)
        return Paired(count, missing, mean, 0.0, freedom, None, None, None)
    p = 2 * float(require("scipy.stats", "lab").t.sf(abs(mean) / error, freedom))
    half = quantile(freedom, level) * error
    return Paired(count, missing, mean, error, freedom, p, mean - half, mean + half)


def spearman(first: Values, second: Values) -> Correlation:
    """Spearman's correlation, ties at their mean rank.

    Raises:
        ValueError: lists of different length.
        ImportError: scipy is missing (extra ``lab``).
    """
    pairs = complete(first, second)
    count, missing = len(pairs), len(first) - len(pairs)
    if count < 3 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return Correlation(count, missing, None, None, None, None)
    stats = require("scipy.stats", "lab")
    x, y = (_centred(stats.rankdata(side)) for side in zip(*pairs, strict=True))
    value = float(np.clip(x @ y, -1, 1))
    if count <= EXACT:
        orders = y[np.array(list(itertools.permutations(range(count))))] @ x
        p = float(np.mean(np.abs(orders) >= abs(value) - 1e-9))
    else:
        left = 1 - value * value
        p = 2 * float(stats.t.sf(abs(value) * math.sqrt((count - 2) / left), count - 2)) if left > 0 else 0.0
    if count < 4:
        return Correlation(count, missing, value, p, None, None)
    middle = math.atanh(math.copysign(min(abs(value), 1 - 1e-12), value))
    half = 1.96 * math.sqrt(1.06 / (count - 3))
    return Correlation(count, missing, value, p, math.tanh(middle - half), math.tanh(middle + half))


def _centred(ranks: Any) -> Any:
    """Of mean 0 and length 1, so that a correlation is an inner product."""
    centred = ranks - ranks.mean()
    return centred / np.linalg.norm(centred)
