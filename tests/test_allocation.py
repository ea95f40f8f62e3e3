"""Bytes shared out over things with options of their own."""

from itertools import product
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoving.allocation import Short, allocate, frontier


class Option(NamedTuple):
    bytes: int
    loss: float


OPTIONS = st.builds(Option, st.integers(0, 40), st.integers(0, 60).map(float))
THINGS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=4)


@given(st.lists(OPTIONS, min_size=1, max_size=9))
def test_a_frontier_has_what_no_other_betters(options):
    best = frontier(options)
    for option in options:
        assert any(b.bytes <= option.bytes and b.loss <= option.loss for b in best)
    for a, b in zip(best, best[1:], strict=False):
        assert a.bytes < b.bytes and a.loss > b.loss


@given(THINGS, st.integers(0, 160))
def test_the_loss_exceeds_the_least_by_no_more_than_one_step(things, limit):
    frontiers = [frontier(options) for options in things]
    fitting = [c for c in product(*things) if sum(o.bytes for o in c) <= limit]
    if not fitting:
        with pytest.raises(Short) as caught:
            allocate(frontiers, limit)
        assert caught.value.least == sum(min(o.bytes for o in options) for options in things)
        return
    chosen = allocate(frontiers, limit)
    assert sum(o.bytes for o in chosen) <= limit
    assert all(option in options for option, options in zip(chosen, things, strict=True))
    least = min(sum(o.loss for o in c) for c in fitting)
    step = max(f[0].loss - f[-1].loss for f in frontiers)
    assert least <= sum(o.loss for o in chosen) <= least + step


def test_everything_where_there_is_room():
    things = [[Option(0, 3.0), Option(5, 0.0)], [Option(1, 2.0), Option(9, 1.0)]]
    assert allocate([frontier(t) for t in things], 14) == [Option(5, 0.0), Option(9, 1.0)]
    assert allocate([frontier(t) for t in things], 13) == [Option(5, 0.0), Option(1, 2.0)]
    assert allocate([frontier(t) for t in things], 1) == [Option(0, 3.0), Option(1, 2.0)]
