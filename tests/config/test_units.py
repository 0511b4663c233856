"""Durations and sizes: texts that are read, and texts that are refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import parse_duration_ns, parse_size_bytes


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        (0, 0),
        ("0s", 0),
        ("1ns", 1),
        ("5us", 5_000),
        ("500ms", 500_000_000),
        ("10s", 10_000_000_000),
        ("1.5s", 1_500_000_000),
        ("0.000000001s", 1),
        ("2m", 120_000_000_000),
        ("1m30s", 90_000_000_000),
        ("1h", 3_600_000_000_000),
        ("15d", 15 * 86_400_000_000_000),
    ],
)
def test_a_duration_is_read(text: object, nanoseconds: int) -> None:
    assert parse_duration_ns(text) == nanoseconds


@pytest.mark.parametrize(
    "text",
    ["", "10", 10, 1.5, "s", "-1s", "10 s", " 10s", "10s\n", "10sec", "10S", "1e3s", "0.1ns", "٣s"]
    + [True, False, None, [], "9" * 60 + "s", "9" * 18 + "h"],
)
def test_what_is_not_a_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration with its unit"):
        parse_duration_ns(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        (0, 0),
        ("64B", 64),
        ("8KiB", 8192),
        ("1KB", 1000),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("80GB", 80_000_000_000),
        ("2TiB", 2 << 40),
    ],
)
def test_a_size_is_read(text: object, size: int) -> None:
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "16", 16, "GiB", "16iB", "16G", "16gib", "16 GiB", "-1B", "0.5B", "1GiB1MiB"]
    + [True, None, {}, "9" * 30 + "TiB"],
)
def test_what_is_not_a_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size with its unit"):
        parse_size_bytes(text)


@given(st.integers(min_value=0, max_value=1 << 62))
def test_every_nanosecond_and_byte_can_be_written_exactly(number: int) -> None:
    assert parse_duration_ns(f"{number}ns") == number
    assert parse_size_bytes(f"{number}B") == number


@given(st.text(max_size=80) | st.from_regex(r"[0-9]{1,30}(\.[0-9]{1,20})?(ns|us|ms|s|m|h|d|B|KiB|GB)", fullmatch=True))
def test_no_text_breaks_the_parsers(text: str) -> None:
    for parse in (parse_duration_ns, parse_size_bytes):
        with contextlib.suppress(ValueError):
            assert 0 <= parse(text) < 1 << 63
