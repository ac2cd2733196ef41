"""Sizes and durations in the form that people read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvm_worker.units import GiB, KiB, MiB, TiB, human_duration, human_size, parse_duration


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (KiB, "1 KiB"),
        (1536, "1.5 KiB"),
        (999.7 * KiB, "0.976 MiB"),
        (1023 * KiB, "0.999 MiB"),
        (MiB, "1 MiB"),
        (52_690_000, "50.2 MiB"),
        (10 * GiB, "10 GiB"),
        (TiB, "1 TiB"),
        (62.5 * TiB, "62.5 TiB"),
        (1 << 62, "4194304 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_human_size(size: float, text: str) -> None:
    """A size has a binary unit and three digits."""
    assert human_size(size) == text


@given(st.integers(0, 999 * TiB))
def test_human_size_is_close(size: int) -> None:
    """The text differs by at most half a percent, and has no exponent."""
    number, unit = human_size(size).split()
    assert re.fullmatch(r"\d{1,3}|\d+\.\d{1,3}", number)
    assert float(number) * {"B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": TiB}[unit] == pytest.approx(
        size, rel=5e-3
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.85, "850 ms"),
        (1, "1 s"),
        (42.4, "42 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_human_duration(seconds: float, text: str) -> None:
    """A duration shows its two largest units."""
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("0s", 0), ("90s", 90), ("1.5m", 90), ("24 h", 86400), ("24h", 86400), ("7d", 604800), ("2w", 1209600)],
)
def test_parse_duration(text: str, seconds: float) -> None:
    """A duration is a number with a unit, so 5 seconds cannot be mistaken for 5 hours."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "5", "90", "1y", "1h30m", "inf", "1e3", "٣h", "9" * 400 + "h"])
def test_parse_duration_refuses(text: str) -> None:
    """The error of an invalid duration shows a valid one."""
    with pytest.raises(ValueError, match="24h"):
        parse_duration(text)
