"""Sizes of memory as text."""

import pytest

from comoving.units import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24_000_000_000),
        ("400 MB", 400_000_000),
        ("1.5KiB", 1536),
        ("2gib", 2_147_483_648),
        (".5kb", 500),
        ("7B", 7),
        ("1TiB", 1_099_511_627_776),
        (123, 123),
    ],
)
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["24", "", "GB", "-3GB", "1e3MB", "24 GB free", "nanMB", "infGB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="as a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["400M", "3 Go", "2bits", "5PB"])
def test_unknown_units_are_named_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown unit .* use one of B, KB, MB, GB, TB, KiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0GB", "0.1B", 0, -5])
def test_nothing_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"at least one byte|positive number of bytes"):
        parse_bytes(text)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="not float"):
        parse_bytes(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not bool"):
        parse_bytes(True)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (22_000_000_000, "22.00 GB"),
        (1_234_567, "1.23 MB"),
        (-1500, "-1.50 KB"),
        (3.2e12, "3.20 TB"),
    ],
)
def test_counts_are_shown(count: float, text: str) -> None:
    assert show_bytes(count) == text


def test_infinite_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        show_bytes(float("inf"))


def test_digits() -> None:
    assert show_bytes(22_040_000_000, digits=1) == "22.0 GB"
