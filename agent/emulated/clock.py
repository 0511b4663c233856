"""The emulated hardware's own clock (CLOCK_MONOTONIC); nothing else in this package reads one."""

from __future__ import annotations

import time


def now_ns() -> int:
    return time.monotonic_ns()
