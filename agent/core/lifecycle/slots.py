"""The slots of one instance: how many requests run inside it, and who waits in line.

Plain counters and an ordered line; no clock, no callbacks. The gate asks, gets an answer at once, and acts on it.
Mutable on purpose: this runs twice per request, and one event loop is the only writer.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Arrival(Enum):
    """What a new request is told at once."""

    GRANTED = "GRANTED"
    QUEUED = "QUEUED"
    FULL = "FULL"


class ConcurrencyLimiter(Generic[T]):
    """`limit` slots (instanceConcurrency) and a line of at most `max_waiting` tickets, first come first served.

    A ticket is in exactly one place: in the line, or counted in `in_flight`, or gone. While `open` is False nothing
    is granted and everybody waits.
    """

    __slots__ = ("_line", "in_flight", "limit", "max_waiting", "open")

    def __init__(self, limit: int, max_waiting: int) -> None:
        self.limit = limit
        self.max_waiting = max_waiting
        self.open = False
        self.in_flight = 0
        self._line: dict[T, None] = {}

    @property
    def waiting(self) -> int:
        """How many tickets stand in the line."""
        return len(self._line)

    def has_room(self) -> bool:
        """A new request would get a slot at once. A method, because the request path calls it: properties cost more."""
        return self.open and self.in_flight < self.limit and not self._line

    def try_acquire(self) -> bool:
        """Take a slot if one is free and no ticket waits."""
        if self.has_room():
            self.in_flight += 1
            return True
        return False

    def arrive(self, ticket: T) -> Arrival:
        """A request arrives: it gets a slot, a place in the line, or is turned away."""
        if self.try_acquire():
            return Arrival.GRANTED
        if len(self._line) >= self.max_waiting:
            return Arrival.FULL
        self._line[ticket] = None
        return Arrival.QUEUED

    def leave(self, ticket: T) -> bool:
        """A waiting request goes away (caller left, deadline). False if it was not in the line."""
        if ticket not in self._line:
            return False
        del self._line[ticket]
        return True

    def done(self) -> None:
        """A granted request has ended; call `grant_next` to hand its slot on."""
        if self.in_flight <= 0:
            raise ValueError("a slot was given back that nobody held")
        self.in_flight -= 1

    def grant_next(self) -> T | None:
        """Hand a free slot to the head of the line. None if closed, full, or nobody waits."""
        if not self._line or not self.open or self.in_flight >= self.limit:
            return None
        ticket = next(iter(self._line))
        del self._line[ticket]
        self.in_flight += 1
        return ticket

    def empty_line(self) -> list[T]:
        """Take everybody out of the line, in order (they are refused)."""
        tickets = list(self._line)
        self._line.clear()
        return tickets
