"""A recipe's state for an m x n matrix as a formula, read off the layout of the state instead of written by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import floor, prod

import torch

from .codecs import Spec

MONOMIALS = {
    "mn": (1, 1, 0), "mr": (1, 0, 1), "nr": (0, 1, 1), "r²": (0, 0, 2), "m²": (2, 0, 0), "n²": (0, 2, 0),
    "m": (1, 0, 0), "n": (0, 1, 0), "r": (0, 0, 1), "1": (0, 0, 0),
}  # fmt: skip
"""Name -> exponents of m, n and r, in the order of printing."""
_UNIT = 256  # so that no block of a codec is cut short
# Enough to tell all polynomials of degree two apart, and more. No mode is longer than those that Shampoo and SOAP keep
# a matrix for, no rank so high that projecting would save nothing.
_POINTS = [*product((4, 5, 6), (6, 7, 8), (1, 2)), (6, 7, 3), (6, 8, 3), (7, 7, 3), (7, 8, 3)]

Coefficients = dict[str, Fraction]


@dataclass(frozen=True)
class StateFormula:
    """The state of one m x n matrix, m <= n, at rank r, as coefficients of :data:`MONOMIALS`.

    Args:
        numbers: of what is stored in float32, in numbers.
        coded: of everything else (codes, indices, half precision), in bytes.
    """

    numbers: Mapping[str, Fraction]
    coded: Mapping[str, Fraction]

    def total(self, m: int, n: int, r: int) -> Fraction:
        """Bytes, single numbers such as step counts among them; exact at multiples of 256, where blocks are full."""
        return 4 * _value(self.numbers, (m, n, r)) + _value(self.coded, (m, n, r))

    def __str__(self) -> str:
        """Such as "mr + 2 nr + 1.016 B mn", without single numbers.

        What is less than one number for each entry, such as the steps of a codec's blocks, counts in bytes.
        """
        names = [name for name in MONOMIALS if name != "1"]
        whole = {name: floor(self.numbers.get(name, Fraction())) for name in names}
        rest = {name: 4 * (self.numbers.get(name, Fraction()) - whole[name]) for name in names}
        coded = {name: self.coded.get(name, Fraction()) + rest[name] for name in names}
        terms = [name if count == 1 else f"{count} {name}" for name, count in whole.items() if count]
        terms += [f"{float(count):.4g} B {name}" for name, count in coded.items() if count]
        return " + ".join(terms).replace("+ -", "- ") or "0"


def formula_of(layout: Callable[[int, int, int], Mapping[str, Spec]]) -> StateFormula | None:
    """The formula of a layout, a function of (m, n, r); None where no polynomial of degree two is exactly it."""
    points = [(m * _UNIT, n * _UNIT, r * _UNIT) for m, n, r in _POINTS]
    laid = [layout(*point).values() for point in points]
    numbers = _solve(points, [sum(prod(x.shape) for x in specs if x.dtype == torch.float32) for specs in laid])
    coded = _solve(
        points, [sum(prod(x.shape) * x.dtype.itemsize for x in specs if x.dtype != torch.float32) for specs in laid]
    )
    return None if numbers is None or coded is None else StateFormula(numbers, coded)


def _solve(points: list[tuple[int, int, int]], values: list[int]) -> Coefficients | None:
    """The coefficients, without zeros, by least squares in exact arithmetic; None unless they fit every point."""
    rows = [[Fraction(_power(point, exponents)) for exponents in MONOMIALS.values()] for point in points]
    size = len(MONOMIALS)
    # The normal equations, with their right side as a last column, then Gauss-Jordan: they are positive definite.
    table = [
        [*(sum((row[i] * row[j] for row in rows), Fraction()) for j in range(size)),
         sum((row[i] * value for row, value in zip(rows, values, strict=True)), Fraction())]
        for i in range(size)
    ]  # fmt: skip
    for i in range(size):
        pivot = [x / table[i][i] for x in table[i]]
        table = [[x - row[i] * y for x, y in zip(row, pivot, strict=True)] for row in table]
        table[i] = pivot
    found = {name: row[-1] for name, row in zip(MONOMIALS, table, strict=True)}
    exact = all(_value(found, point) == value for point, value in zip(points, values, strict=True))
    return {name: c for name, c in found.items() if c} if exact else None


def _power(point: tuple[int, int, int], exponents: tuple[int, int, int]) -> int:
    return prod(x**e for x, e in zip(point, exponents, strict=True))


def _value(coefficients: Mapping[str, Fraction], point: tuple[int, int, int]) -> Fraction:
    return sum((c * _power(point, MONOMIALS[name]) for name, c in coefficients.items()), Fraction())
