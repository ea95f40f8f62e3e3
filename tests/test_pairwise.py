"""The selection of cases by pairs of their values, and of the tests that run."""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pairwise
from pairwise import covering

SIZES = [(4, 3, 5), (16, 7, 2, 4, 4, 2), (2,) * 8, (9, 1, 3), (57, 8, 2, 3)]
CASES = st.integers(3, 5).flatmap(lambda n: st.lists(st.tuples(*[st.integers(0, 3)] * n), min_size=1, max_size=60))
SUITE = """
import pytest

LETTERS = pytest.mark.parametrize("letter", "uvw")

@pytest.fixture(params=[1, 2])
def sign(request):
    return request.param

@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize("c, d", [(1, 1), (2, 2), (3, 3), (4, 4)])
@LETTERS
def test_of_three(a, b, c, d, letter):
    pass

class TestClass:
    @pytest.mark.parametrize("c", [1, 2, 3])
    @LETTERS
    def test_of_three(self, c, letter, sign):
        pass

@pytest.mark.parametrize(("a", "b", "c"), [(a, b, c) for a in (1, 2) for b in (3, 4) for c in (5, 6)])
@LETTERS
def test_of_two(a, b, c, letter):
    pass

def test_of_none():
    pass

@pytest.mark.parametrize("a", [1, pytest.param(2, marks=pytest.mark.full)])
def test_of_one(a):
    pass
"""


def pairs(cases):
    return {(a, b, case[a], case[b]) for case in cases for a, b in combinations(range(len(case)), 2)}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_pair_of_values_meets_in_few_cases(sizes):
    cases = list(product(*map(range, sizes)))
    chosen = covering(cases)
    assert pairs(cases[n] for n in chosen) == pairs(cases)
    *_, second, first = sorted(sizes)
    assert first * second <= len(chosen) <= 1.4 * first * second + 8
    assert chosen == sorted(set(chosen)) == covering(cases)


@given(CASES)
def test_pairs_that_occur_are_kept_where_not_all_combinations_do(cases):
    chosen = covering(cases)
    assert pairs(cases[n] for n in chosen) == pairs(cases)
    assert len({cases[n] for n in chosen}) == len(chosen)


@pytest.mark.parametrize("sizes", [(7,), (4, 5), (1, 1)])
def test_one_or_two_axes_keep_every_case_once(sizes):
    cases = list(product(*map(range, sizes)))
    assert covering(cases * 2) == list(range(len(cases)))


def collected(folder, *options):
    """name -> the arguments of every item that pytest would run of the file above."""
    cases = {}

    class Reader:
        def pytest_collection_finish(self, session):
            for item in session.items:
                name, callspec = item.nodeid.partition("::")[2].partition("[")[0], getattr(item, "callspec", None)
                cases.setdefault(name, []).append(tuple(callspec.params.values()) if callspec else ())

    (folder / "test_it.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = full\n")
    given = ["-c", f"{folder}/pytest.ini", f"{folder}/test_it.py", "--collect-only", "-p", "no:cacheprovider", *options]
    assert pytest.main(given, plugins=[pairwise, Reader()]) == 0
    return cases


def test_tests_of_three_axes_run_in_pairs_and_in_full_when_asked(tmp_path):
    some, every = collected(tmp_path), collected(tmp_path, "--full")
    names = {"test_of_three", "TestClass::test_of_three", "test_of_two", "test_of_none", "test_of_one"}
    assert some.keys() == every.keys() == names
    assert (some.pop("test_of_one"), every["test_of_one"]) == ([(1,)], [(1,), (2,)])
    assert some["test_of_two"] == every["test_of_two"]
    assert some["test_of_none"] == every["test_of_none"]
    assert (len(every["test_of_three"]), len(every["TestClass::test_of_three"])) == (60, 18)
    assert len(some["test_of_three"]) == 20
    assert 9 <= len(some["TestClass::test_of_three"]) <= 11
    for name, cases in some.items():
        assert pairs(cases) == pairs(every[name])
