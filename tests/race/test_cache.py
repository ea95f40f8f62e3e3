"""Arrays kept on disk: made once for each specification and each state of the code."""

from dataclasses import dataclass

import numpy as np
import pytest

from comoving.race import cache


@dataclass(frozen=True)
class Spec:
    size: int = 3


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "source.py"
    path.write_text("a = 1")
    return path


def test_made_once_for_each_specification_and_code(source):
    made = []

    def load(size):
        def make():
            made.append(size)
            return {"x": np.arange(size), "y": np.full((size, 2), 0.5, np.float32)}

        return cache.load("name", Spec(size), source, make)

    first, again = load(3), load(3)
    assert made == [3] and set(again) == {"x", "y"}
    assert all((first[k] == again[k]).all() and first[k].dtype == again[k].dtype for k in first)
    load(4)
    source.write_text("a = 2")
    load(3)
    assert made == [3, 4, 3]
    assert len(list(cache.folder().glob("name-*.npz"))) == len(list(cache.folder().iterdir())) == 3


def test_interrupted_making_leaves_nothing(source):
    def make():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.load("name", Spec(), source, make)
    assert not cache.folder().exists()
