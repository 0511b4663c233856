"""All changes of clocks in the time zone database, read from its files (TZif, RFC 9636)."""

from __future__ import annotations

import struct
from importlib import resources
from itertools import pairwise


def zone_names() -> list[str]:
    return (resources.files("tzdata") / "zones").read_text().split()


def changes(zone: str) -> list[tuple[int, int, int]]:
    """(second, offset before, offset after) of each change of the offset; a file's rule for later years is left out."""
    data = resources.files("tzdata.zoneinfo").joinpath(zone).read_bytes()
    isut, isstd, leaps, times, types, letters = struct.unpack_from(">6I", data, 20)
    start = 44 + times * 5 + types * 6 + letters + leaps * 8 + isstd + isut  # the second block has 64-bit times
    isut, isstd, leaps, times, types, letters = struct.unpack_from(">6I", data, start + 20)
    at = start + 44
    seconds = struct.unpack_from(f">{times}q", data, at)
    indexes = struct.unpack_from(f">{times}B", data, at + times * 8)
    offsets = [struct.unpack_from(">i", data, at + times * 9 + 6 * index)[0] for index in range(types)]
    walk = [(None, offsets[0]), *((second, offsets[index]) for second, index in zip(seconds, indexes, strict=True))]
    return [(second, old, new) for (_, old), (second, new) in pairwise(walk) if second is not None and old != new]
