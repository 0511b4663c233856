"""One timer for many deadlines.

A loop timer per request costs more than parsing the request. Here each member keeps its deadline as a plain number, and
one timer wakes for the earliest. Most deadlines move or vanish before they pass, so it rarely finds anything to do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from typing import Protocol

NEVER = math.inf


class Timed(Protocol):
    """A member of a `DeadlineTimer`. `deadline` in loop time, NEVER if there is none."""

    deadline: float

    def expire(self, now: float) -> None:
        """The deadline has passed. Sets another one, or NEVER."""


class DeadlineTimer:
    """Calls `expire` of members whose deadline has passed, at most `resolution_s` late."""

    def __init__(self, loop: asyncio.AbstractEventLoop, members: Collection[Timed], resolution_s: float) -> None:
        self._loop = loop
        self._members = members
        self._resolution_s = resolution_s
        self._armed_at = NEVER
        self._timer: asyncio.TimerHandle | None = None

    def schedule(self, deadline: float) -> None:
        """Wakes by `deadline`, which a member has just set. A deadline that only moves later needs no call."""
        if deadline < self._armed_at:
            self._arm(deadline)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._armed_at = NEVER

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_at = at
        self._timer = self._loop.call_at(at, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._armed_at = NEVER
        now = self._loop.time()
        earliest = NEVER
        for member in tuple(self._members):
            if member.deadline <= now:
                member.expire(now)
            earliest = min(earliest, member.deadline)
        if earliest < NEVER:
            # At most once per resolution: members with deadlines close together expire together.
            self.schedule(max(earliest, now + self._resolution_s))
