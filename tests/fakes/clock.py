"""A clock that moves only when a test moves it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class FakeTimer:
    """Armed until it fires or is cancelled."""

    def __init__(self, at_mono_ns: int, callback: Callable[[], None]) -> None:
        self.at_mono_ns = at_mono_ns
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    """Implements `ports.Clock`. `advance` fires due timers in order of their time, then of their arming, each at its
    own time; a timer armed by a callback fires within the same advance if it is due."""

    def __init__(self, mono_ns: int = 1_000_000_000, wall_ns: int = 1_700_000_000_000_000_000) -> None:
        self._mono_ns = mono_ns
        self._wall_offset_ns = wall_ns - mono_ns
        self._order = itertools.count()
        self._timers: list[tuple[int, int, FakeTimer]] = []

    def monotonic_ns(self) -> int:
        return self._mono_ns

    def wall_ns(self) -> int:
        return self._mono_ns + self._wall_offset_ns

    def call_at(self, at_mono_ns: int, callback: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer(at_mono_ns, callback)
        heapq.heappush(self._timers, (at_mono_ns, next(self._order), timer))
        return timer

    def advance(self, by_ns: int) -> None:
        self.advance_to(self._mono_ns + by_ns)

    def advance_to(self, mono_ns: int) -> None:
        """Move to this time, which is not in the past, firing due timers on the way."""
        assert mono_ns >= self._mono_ns, "CLOCK_MONOTONIC never goes back"
        while self._timers and self._timers[0][0] <= mono_ns:
            at_mono_ns, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                self._mono_ns = max(self._mono_ns, at_mono_ns)
                timer.callback()
        self._mono_ns = mono_ns

    def step_wall(self, by_ns: int) -> None:
        """NTP or an operator sets the wall clock; the monotonic one does not notice."""
        self._wall_offset_ns += by_ns

    @property
    def next_timer_ns(self) -> int | None:
        """When the next armed timer is due; None when none is."""
        return min((timer.at_mono_ns for _, _, timer in self._timers if not timer.cancelled), default=None)
