"""The concurrency limit of one instance: requests inside it and the queue of those that wait.

Counters and an ordered queue without clock or callbacks; the gate acts on the answers. Mutable for speed, as it runs
twice per request; one event loop is its only writer.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Arrival(Enum):
    """The answer to a new request."""

    GRANTED = "GRANTED"
    QUEUED = "QUEUED"
    FULL = "FULL"


class ConcurrencyLimiter(Generic[T]):
    """`limit` slots (instanceConcurrency) and a queue of at most `max_waiting` tickets, first come, first served.

    A ticket waits, or is counted in `in_flight`, or is gone. No slot is granted while `open` is False.
    """

    __slots__ = ("_queue", "in_flight", "limit", "max_waiting", "open")

    def __init__(self, limit: int, max_waiting: int) -> None:
        self.limit = limit
        self.max_waiting = max_waiting
        self.open = False
        self.in_flight = 0
        self._queue: dict[T, None] = {}

    @property
    def waiting(self) -> int:
        """Number of waiting tickets."""
        return len(self._queue)

    def has_room(self) -> bool:
        """A new request would get a slot at once. A method, because the request path calls it: properties cost more."""
        return self.open and self.in_flight < self.limit and not self._queue

    def try_acquire(self) -> bool:
        """Take a slot if `has_room()`. Returns whether it did."""
        if self.has_room():
            self.in_flight += 1
            return True
        return False

    def arrive(self, ticket: T) -> Arrival:
        """Grant the new request a slot, queue it, or refuse it."""
        if self.try_acquire():
            return Arrival.GRANTED
        if len(self._queue) >= self.max_waiting:
            return Arrival.FULL
        self._queue[ticket] = None
        return Arrival.QUEUED

    def leave(self, ticket: T) -> bool:
        """Remove a waiting request (client left, deadline passed). False if it was not waiting."""
        if ticket not in self._queue:
            return False
        del self._queue[ticket]
        return True

    def done(self) -> None:
        """End a granted request. Raises ValueError if none is granted. Call `grant_next` to reuse its slot."""
        if self.in_flight <= 0:
            raise ValueError("a slot was released that was not held")
        self.in_flight -= 1

    def grant_next(self) -> T | None:
        """Grant a free slot to the longest-waiting ticket. None if closed or full, or if no ticket waits."""
        if not self._queue or not self.open or self.in_flight >= self.limit:
            return None
        ticket = next(iter(self._queue))
        del self._queue[ticket]
        self.in_flight += 1
        return ticket

    def clear_queue(self) -> list[T]:
        """Remove all waiting tickets and return them in order."""
        tickets = list(self._queue)
        self._queue.clear()
        return tickets
