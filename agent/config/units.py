"""Durations and sizes as people write them: a number with its unit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

DURATION = "a duration with its unit, such as 500ms, 10s, 2m or 1h"
SIZE = "a size with its unit, such as 64KiB, 512MiB, 16GiB or 80GB"


class Duration(int):
    """Integer nanoseconds; written `10s`, `500ms`, `1m30s`, or a bare 0."""

    __slots__ = ()


class Size(int):
    """Integer bytes; written `16GiB`, `8KiB`, `500MB`, or a bare 0."""

    __slots__ = ()


_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86400 * 10**9}
_BYTES = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_PART = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]+)", re.ASCII)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|ms|s|m|h|d))+", re.ASCII)
_SIZE = re.compile(r"\d+(?:\.\d+)?(?:[KMGT]i?)?B", re.ASCII)
_LIMIT = 1 << 63


def parse_duration_ns(text: object) -> int:
    """`10s`, `500ms`, `2m`, `1m30s` or a zero, as integer nanoseconds. Raises ValueError with the fix."""
    return _parse(text, _DURATION, _NS, DURATION)


def parse_size_bytes(text: object) -> int:
    """`16GiB` (powers of 1024), `500MB` (powers of 1000), `64B` or a zero, as bytes. Raises ValueError."""
    return _parse(text, _SIZE, _BYTES, SIZE)


def _parse(text: object, form: re.Pattern[str], units: Mapping[str, int], expected: str) -> int:
    if not isinstance(text, bool) and text in (0, "0"):
        return 0
    shown = repr(text) if isinstance(text, str) else f"{text!r} ({type(text).__name__})"
    if not isinstance(text, str) or len(text) > 64 or not form.fullmatch(text):
        raise ValueError(f"expected {expected}, got {shown[:80]}")
    total = sum((Decimal(number) * units[unit] for number, unit in _PART.findall(text)), start=Decimal(0))
    if total != int(total) or total >= _LIMIT:
        raise ValueError(f"expected {expected}; {shown} is not a whole number of the smallest unit, or too large")
    return int(total)
