"""The highest value of the running minute and the one before, so that a scrape every minute misses none."""

from __future__ import annotations

from agent.core.types import SECOND_NS

PERIOD_NS = 60 * SECOND_NS


class Peak:
    """`note` records a value, `read` returns the highest; 0 without values. Times are monotonic ns."""

    __slots__ = ("_before", "_highest", "_until")

    def __init__(self) -> None:
        self._highest = 0
        self._before = 0
        self._until = 0

    def note(self, value: int, at: int) -> None:
        """Record `value` at `at`."""
        if at >= self._until:
            self._turn(at)
        if value > self._highest:
            self._highest = value

    def read(self, at: int) -> int:
        """The highest value of the last one to two minutes."""
        if at >= self._until:
            self._turn(at)
        return max(self._highest, self._before)

    def _turn(self, at: int) -> None:
        self._before = self._highest if at < self._until + PERIOD_NS else 0
        self._highest = 0
        self._until = at + PERIOD_NS
