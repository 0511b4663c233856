"""The requests of one function that wait at the dispatcher, first in, first out.

A request that was dispatched and came back untouched is older than everything that still waits, so it is put in order
among those that came back, ahead of the rest. Pure; every operation is O(1) but the return of a refused request, which
is O(log n) in the requests that came back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from agent.core.leases import Slot

_BY_ORDER = attrgetter("order")


@dataclass(slots=True, eq=False)
class Request:
    """One request from arrival to answer: waiting while `slot` is None, else holding a lease there."""

    request: int
    function: str
    order: int
    arrived_ns: int
    deadline_ns: int
    attempts: int = 0
    slot: Slot | None = None
    leased_ns: int = 0


class Backlog:
    """The queue. `len()` is what `queueLength` bounds."""

    def __init__(self) -> None:
        self._fresh: OrderedDict[int, Request] = OrderedDict()
        self._returned: list[Request] = []

    def __len__(self) -> int:
        return len(self._fresh) + len(self._returned)

    def __iter__(self) -> Iterator[Request]:
        yield from self._returned
        yield from self._fresh.values()

    def append(self, request: Request) -> None:
        """A new request, younger than all."""
        self._fresh[request.request] = request

    def give_back(self, request: Request) -> None:
        """A request whose lease came to nothing."""
        insort(self._returned, request, key=_BY_ORDER)

    def pop(self) -> Request:
        """The oldest."""
        if self._returned:
            return self._returned.pop(0)
        return self._fresh.popitem(last=False)[1]

    def discard(self, request: Request) -> None:
        """Its client left or its deadline passed."""
        if self._fresh.pop(request.request, None) is None:
            at = bisect_left(self._returned, request.order, key=_BY_ORDER)
            del self._returned[at]
