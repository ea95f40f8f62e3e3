"""Arrays kept on disk: made once for each specification and code, and again where the file is damaged."""

import logging
import os
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


class Loading:
    """Loads two arrays and counts how often they were made."""

    def __init__(self, source):
        self.source, self.made = source, []

    def __call__(self, size=300):
        def make():
            self.made.append(size)
            return np.arange(size), np.full((size, 2), 0.5, np.float32)

        return cache.load("name", Spec(size), self.source, ("x", "y"), make)


def test_made_once_for_each_specification_and_code(source):
    load = Loading(source)
    first, again = load(3), load(3)
    assert load.made == [3]
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(first, again, strict=True))
    load(4)
    source.write_text("a = 2")
    load(3)
    assert load.made == [3, 4, 3]
    assert len(list(cache.folder().glob("name-*.npz"))) == len(list(cache.folder().iterdir())) == 3


def test_interrupted_making_leaves_nothing(source):
    def make():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.load("name", Spec(), source, ("x",), make)
    assert not cache.folder().exists()


def zipped(path, **arrays):
    np.savez_compressed(path, **arrays)


def turned(path):
    raw = bytearray(path.read_bytes())
    raw[100] ^= 0xFF
    path.write_bytes(raw)


DAMAGES = {
    **{f"cut at {share:g}": lambda path, s=share: os.truncate(path, int(s * path.stat().st_size))
       for share in (0, 0.001, 0.03, 0.5, 0.9, 0.999)},
    "last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "text": lambda path: path.write_bytes(b"garbage\n" * 9),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "pickle": lambda path: path.write_bytes(b"\x80\x04."),
    "head of an array": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x20\x00({'descr'" + bytes(30)),
    "one byte": turned,
    "other arrays": lambda path: zipped(path, z=np.zeros(3)),
    "objects": lambda path: zipped(path, x=np.array([{}]), y=np.zeros(3)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_made_anew_and_replaced(damage, source, caplog):
    load = Loading(source)
    whole = load()
    (path,) = cache.folder().iterdir()
    DAMAGES[damage](path)
    for times in (2, 2):
        found = load()
        assert all((a == b).all() for a, b in zip(whole, found, strict=True)) and len(load.made) == times
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert said.getMessage().startswith(f"{path} is damaged (") and said.getMessage().endswith("; it is made anew")
    assert "\n" not in said.getMessage() and list(cache.folder().iterdir()) == [path]


def test_a_folder_in_its_place_is_named_before_anything_is_made(source):
    load = Loading(source)
    load()
    (path,) = cache.folder().iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="remove the folder; COMOVING_CACHE=FOLDER moves the cache.*npz"):
        load()
    assert load.made == [300]


def test_a_cache_that_cannot_be_written_is_named_before_anything_is_made(source, monkeypatch):
    load = Loading(source)
    cache.folder().write_bytes(b"")
    with pytest.raises(OSError, match="a file where a folder is needed.*COMOVING_CACHE"):
        load()
    cache.folder().unlink()
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(OSError, match="may be written to; COMOVING_CACHE"):
        load()
    assert load.made == []
