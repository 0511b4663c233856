"""The order in which people read names: m1, m2, m10."""

from __future__ import annotations

import re
from functools import lru_cache

_NUMBER = re.compile(r"([0-9]+)", re.ASCII)


@lru_cache(maxsize=16_384)  # every list of functions or nodes is sorted with it
def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """The sort key of a name: digits compare as numbers. Names that differ in zeros only (m1, m01) keep an order."""
    parts = _NUMBER.split(name)  # text at even places, digits at odd ones
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), name
