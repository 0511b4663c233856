"""The clock of the emulated hardware (CLOCK_MONOTONIC); the only one in this package."""

from __future__ import annotations

import time


def now_ns() -> int:
    return time.monotonic_ns()
