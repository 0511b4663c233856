"""Admits requests to instances: `AdmissionGate` guards one instance, `FunctionQueue` all instances of a function.

`core.lifecycle.slots` counts; this module adds waiting and metering. The owner of a gate hears only of edges (first
request started, last ended, waiters appeared, waiters gone): see `core.lifecycle.machine`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from agent.core.errors import DeadlineError, ExhaustedError, HibernodeError, UnavailableError
from agent.core.lifecycle.slots import Arrival, ConcurrencyLimiter
from agent.ports import Clock, RequestMeter


class GateOwner(Protocol):
    """The instance behind a gate; called synchronously at each edge."""

    def first_request_started(self) -> None: ...

    def last_request_ended(self) -> None: ...

    def waiters_appeared(self) -> None: ...

    def waiters_gone(self) -> None: ...


OwnerT = TypeVar("OwnerT", bound=GateOwner)

Start = Callable[[OwnerT], None]
"""Called with the instance that granted a slot, in the loop iteration of the grant; the slot is metered by then."""


class AdmissionGate(Generic[OwnerT]):
    """The gate of one instance. Requests use `try_enter`, `wait` and `leave`; the rest is for its actor and the queue.

    - `queue`: the queue that all instances of the function share.
    - `unhealthy`: while True, the gate takes no request from the shared queue.
    """

    __slots__ = ("_clock", "_meter", "_slots", "owner", "queue", "unhealthy")

    def __init__(self, concurrency: int, max_waiting: int, clock: Clock, meter: RequestMeter, owner: OwnerT) -> None:
        self._slots: ConcurrencyLimiter[asyncio.Future[None]] = ConcurrencyLimiter(concurrency, max_waiting)
        self._clock = clock
        self._meter = meter
        self.owner = owner
        self.queue: FunctionQueue[OwnerT] | None = None
        self.unhealthy = False

    @property
    def in_flight(self) -> int:
        """Requests inside the instance."""
        return self._slots.in_flight

    @property
    def waiting(self) -> int:
        """Requests that wait for this instance; those in `queue` are not counted."""
        return self._slots.waiting

    @property
    def is_open(self) -> bool:
        """It grants slots."""
        return self._slots.open

    @property
    def has_room(self) -> bool:
        """A request would be granted a slot at once."""
        return self._slots.has_room()

    @property
    def concurrency(self) -> int:
        """Slots in all (instanceConcurrency)."""
        return self._slots.limit

    def try_enter(self) -> asyncio.Future[None] | None:
        """Enter if a slot is free, else queue. None: granted, call `leave` at the end. Else a ticket to pass to `wait`.

        Raises ExhaustedError QUEUE_FULL.
        """
        slots = self._slots
        if slots.try_acquire():
            self._meter.request_began(self._clock.monotonic_ns())
            if slots.in_flight == 1:
                self.owner.first_request_started()
            return None
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        first = not slots.waiting
        if slots.arrive(ticket) is Arrival.FULL:
            text = f"{slots.waiting} requests already wait for this instance; try again later"
            raise ExhaustedError("QUEUE_FULL", text)
        if first and not slots.open:
            self.owner.waiters_appeared()
        return ticket

    async def wait(self, ticket: asyncio.Future[None], timeout_s: float) -> None:
        """Wait until a slot is granted. Raises DeadlineError QUEUE_TIMEOUT, or the error of `refuse_all`.

        A caller whose client has left cancels the ticket or sets an exception on it; `wait` then removes it.
        """
        try:
            await _within(ticket, timeout_s)
        except BaseException:
            self._abandon(ticket)
            raise

    def _abandon(self, ticket: asyncio.Future[None]) -> None:
        granted = ticket.done() and not ticket.cancelled() and ticket.exception() is None
        if granted:  # the grant and the caller's end crossed
            self.leave()
        elif self._slots.leave(ticket) and not self._slots.waiting:
            self.owner.waiters_gone()

    def leave(self) -> None:
        """A granted request has ended: its slot goes to the next that waits, here or in the shared queue."""
        slots = self._slots
        slots.done()
        self._meter.request_ended(self._clock.monotonic_ns())
        self._grant(idle=False)
        if slots.in_flight == 0:
            self.owner.last_request_ended()

    def _grant(self, idle: bool) -> None:
        """Grant every free slot. `idle`: no request is inside, and the owner knows it."""
        slots = self._slots
        while (ticket := slots.grant_next()) is not None:
            if ticket.done():  # cancelled, its waiter has not run yet
                slots.done()
                continue
            idle = self._began(idle)
            ticket.set_result(None)
        queue = self.queue
        while queue is not None and queue.waiting and not self.unhealthy and slots.try_acquire():
            start = queue.next()
            if start is None:
                slots.done()
                return
            idle = self._began(idle)
            start(self.owner)

    def _began(self, idle: bool) -> bool:
        self._meter.request_began(self._clock.monotonic_ns())
        if idle:
            self.owner.first_request_started()
        return False

    def set_healthy(self, healthy: bool) -> None:
        """Take requests from the shared queue, or stop taking them."""
        self.unhealthy = not healthy
        self._grant(idle=self._slots.in_flight == 0)
        if self.queue is not None:
            self.queue.check()

    def set_open(self, is_open: bool) -> None:
        """Follow the life cycle: open grants at once, in order; closed grants nothing."""
        slots = self._slots
        if slots.open == is_open:
            return
        slots.open = is_open
        if is_open:
            self._grant(idle=slots.in_flight == 0)
            self.owner.waiters_gone()
        else:
            if self.queue is not None:
                self.queue.check()
            if slots.waiting:
                self.owner.waiters_appeared()

    def refuse_all(self, error: Callable[[], HibernodeError]) -> None:
        tickets = self._slots.clear_queue()
        for ticket in tickets:
            if not ticket.done():
                ticket.set_exception(error())
        if tickets:
            self.owner.waiters_gone()


class FunctionQueue(Generic[OwnerT]):
    """Requests that any instance of one function on this node may serve: the first with a free slot takes the oldest.

    The gateway dispatches a few requests early (`x-hibernode-any-instance`), so that a slot that becomes free is used
    at once. Requests at an instance's own gate go first: they named that instance. While no
    healthy instance of the function is open, requests are refused and the gateway queues them again.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._gates: dict[AdmissionGate[OwnerT], None] = {}
        self._tickets: dict[asyncio.Future[None], Start[OwnerT]] = {}

    @property
    def waiting(self) -> int:
        return len(self._tickets)

    def add(self, gate: AdmissionGate[OwnerT]) -> None:
        """An instance of the function has been made."""
        self._gates[gate] = None
        gate.queue = self

    def remove(self, gate: AdmissionGate[OwnerT]) -> bool:
        """The instance has ended. True if it was the last."""
        self._gates.pop(gate, None)
        gate.queue = None
        self.check()
        return not self._gates

    def with_room(self) -> OwnerT | None:
        """An instance that takes a request now; the caller enters its gate at once."""
        for gate in self._gates:
            if gate.has_room and not gate.unhealthy:
                return gate.owner
        return None

    async def wait(self, ticket: asyncio.Future[None], timeout_s: float) -> None:
        """Wait until an instance has granted a slot (`start` has been called). Raises DeadlineError QUEUE_TIMEOUT, or
        the exception that was set on the ticket."""
        try:
            await _within(ticket, timeout_s)
        except BaseException:
            self._tickets.pop(ticket, None)
            raise

    def ticket(self, start: Start[OwnerT]) -> asyncio.Future[None]:
        """Queue a request. `start` is called with the instance that grants a slot, in the loop iteration of the grant;
        the caller must then `leave` that instance's gate at the end. Raises ExhaustedError QUEUE_FULL."""
        if len(self._tickets) >= self._max_waiting:
            raise ExhaustedError(
                "QUEUE_FULL", f"{len(self._tickets)} requests already wait for this function on this node"
            )
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = start
        self.check()
        return ticket

    def next(self) -> Start[OwnerT] | None:
        """Take out the oldest request that still waits; the gate calls the result with its owner. None if empty."""
        while self._tickets:
            ticket = next(iter(self._tickets))
            start = self._tickets.pop(ticket)
            if not ticket.done():  # else it was cancelled, and its waiter has not run yet
                ticket.set_result(None)
                return start
        return None

    def check(self) -> None:
        """Refuse all requests if no gate can grant any more: each is closed, removed or unhealthy."""
        if self._tickets and not any(gate.is_open and not gate.unhealthy for gate in self._gates):
            self.refuse_all(UnavailableError("NO_INSTANCE_AWAKE", "no instance of the function is awake on this node"))

    def refuse_all(self, error: HibernodeError) -> None:
        tickets = list(self._tickets)
        self._tickets.clear()
        for ticket in tickets:
            if not ticket.done():
                ticket.set_exception(error)


async def _within(ticket: asyncio.Future[None], timeout_s: float) -> None:
    handle = ticket.get_loop().call_later(max(timeout_s, 0.0), _expire, ticket)
    try:
        await ticket
    finally:
        handle.cancel()


def _expire(ticket: asyncio.Future[None]) -> None:
    if not ticket.done():
        ticket.set_exception(
            DeadlineError("QUEUE_TIMEOUT", "no instance became free before the request's queue timeout")
        )
