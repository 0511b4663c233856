"""The only reader of clocks. Everything else is given a `Clock`, or the time inside an event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from agent.core.types import SECOND_NS


class SystemClock:
    """CLOCK_MONOTONIC, CLOCK_REALTIME and timers on the running loop. Implements `ports.Clock`."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.time_ns()

    def call_at(self, at_mono_ns: int, callback: Callable[[], None]) -> SystemTimer:
        """Call back on the running loop, never before `at_mono_ns`; a time in the past means the next iteration."""
        return SystemTimer(self, at_mono_ns, callback)


class SystemTimer:
    """One armed callback.

    Loops round a delay to whole milliseconds, uvloop also down. A timer that fires early would find its condition not
    yet true (an idle time, the end of a window), so it arms itself again.
    """

    __slots__ = ("_at_mono_ns", "_callback", "_clock", "_handle", "_loop")

    def __init__(self, clock: SystemClock, at_mono_ns: int, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._at_mono_ns = at_mono_ns
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._handle = self._arm()

    def cancel(self) -> None:
        """Idempotent, also after it fired."""
        self._handle.cancel()

    def _arm(self) -> asyncio.TimerHandle:
        delay_ns = max(0, self._at_mono_ns - self._clock.monotonic_ns())
        return self._loop.call_later(delay_ns / SECOND_NS, self._fire)

    def _fire(self) -> None:
        if self._clock.monotonic_ns() < self._at_mono_ns:
            self._handle = self._arm()
        else:
            self._callback()
