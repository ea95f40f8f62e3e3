"""Fewer cases of a test with many arguments: a selection in which each pair of their values still meets."""

from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest


def covering(cases):
    """Positions, in order, of some of these cases; each pair of values at two axes that occurs in any occurs in these.

    ``cases`` are tuples of hashable values, all of one length. Greedy: always the case with the most pairs that no
    chosen one has, the first of them where several have. With fewer than three axes all distinct cases are chosen.
    """
    axes = range(len(cases[0]))
    pairs = list(combinations(axes, 2)) or [(axis, axis) for axis in axes]
    number = {}
    has = np.array([[number.setdefault((a, b, case[a], case[b]), len(number)) for a, b in pairs] for case in cases])
    missing, chosen = np.ones(len(number), dtype=int), []
    while missing.any():
        chosen.append(int(missing[has].sum(axis=1).argmax()))
        missing[has[chosen[-1]]] = 0
    return sorted(chosen)


def axes_of(item):
    """What a test item's arguments vary over: its value of each ``parametrize`` and of each fixture that has several.

    Arguments that are given jointly are one axis: no listed combination of them is ever left out. Values need not be
    hashable: the items of a test share the objects, whose identity stands for them.
    """
    values, axes = {name: id(value) for name, value in item.callspec.params.items()}, []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        axes.append(tuple(values.pop(name) for name in names))
    return (*axes, *values.values())


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all combinations of three and more parametrized arguments")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Of each test with three or more axes, after ``-k`` and the like, a covering selection; and none marked "full"."""
    if config.getoption("full"):
        return
    tests, left_out = defaultdict(list), []
    for position, item in enumerate(items):
        if item.get_closest_marker("full") is not None:
            left_out.append(position)
        elif hasattr(item, "callspec"):
            tests[item.parent.nodeid, item.originalname].append((position, axes_of(item)))
    for cases in tests.values():
        if len(cases[0][1]) > 2:
            chosen = set(covering([axes for _, axes in cases]))
            left_out += [position for n, (position, _) in enumerate(cases) if n not in chosen]
    config.hook.pytest_deselected(items=[items[position] for position in left_out])
    for position in sorted(left_out, reverse=True):
        del items[position]
