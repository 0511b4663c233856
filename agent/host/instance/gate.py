"""The gate of one instance: requests are granted a slot, wait in line, or are turned away.

The counting is `core.slots`; this adds the waiting and the metering. Only edges are reported to the life cycle
(first granted, last ended, somebody waits, nobody waits): see `core.lifecycle`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from agent.core.errors import DeadlineError, ExhaustedError, HibernodeError
from agent.core.lifecycle.slots import Arrival, ConcurrencyLimiter
from agent.host.line import FunctionQueue
from agent.ports import Clock


class RequestMeter(Protocol):
    """What the gate tells the meter: two calls per request, monotonic ns."""

    def request_began(self, at: int) -> None: ...

    def request_ended(self, at: int) -> None: ...


class GateListener(Protocol):
    """Who hears of the edges; called synchronously."""

    def gate_busy(self) -> None: ...

    def gate_quiet(self) -> None: ...

    def gate_wanted(self) -> None: ...

    def gate_unwanted(self) -> None: ...


class AdmissionGate:
    """See the module. `try_enter` and `leave` bracket a request; everything else is called by the actor.

    `line`: where requests wait that other instances of the function may serve as well; `shunned`: none of them come
    here.
    """

    __slots__ = ("_clock", "_listener", "_meter", "_slots", "line", "queue_timeout_ns", "shunned")

    def __init__(
        self,
        concurrency: int,
        max_waiting: int,
        queue_timeout_ns: int,
        clock: Clock,
        meter: RequestMeter,
        listener: GateListener,
    ) -> None:
        self._slots: ConcurrencyLimiter[asyncio.Future[None]] = ConcurrencyLimiter(concurrency, max_waiting)
        self._clock = clock
        self._meter = meter
        self._listener = listener
        self.queue_timeout_ns = queue_timeout_ns
        self.line: FunctionQueue | None = None
        self.shunned = False

    @property
    def in_flight(self) -> int:
        """Requests inside the instance."""
        return self._slots.in_flight

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return self._slots.waiting

    @property
    def is_open(self) -> bool:
        """It grants slots."""
        return self._slots.open

    @property
    def has_room(self) -> bool:
        """A request would be granted a slot at once."""
        slots = self._slots
        return slots.open and slots.in_flight < slots.limit and not slots.waiting

    @property
    def concurrency(self) -> int:
        """Slots in all (instanceConcurrency)."""
        return self._slots.limit

    def try_enter(self) -> asyncio.Future[None] | None:
        """The fast path. None: granted, call `leave` at the end. Else a future to hand to `wait`.

        Raises ExhaustedError QUEUE_FULL.
        """
        slots = self._slots
        if slots.open and slots.in_flight < slots.limit and not slots.waiting:
            slots.in_flight += 1
            self._meter.request_began(self._clock.monotonic_ns())
            if slots.in_flight == 1:
                self._listener.gate_busy()
            return None
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        first = not slots.waiting
        match slots.arrive(ticket):
            case Arrival.FULL:
                raise ExhaustedError(
                    "QUEUE_FULL", f"{slots.waiting} requests wait for this instance already; try again later"
                )
            case Arrival.QUEUED if first and not slots.open:
                self._listener.gate_wanted()
            case _:
                pass
        return ticket

    async def wait(self, ticket: asyncio.Future[None], timeout_s: float) -> None:
        """Wait in line until granted. Raises DeadlineError QUEUE_TIMEOUT, or what the gate was refused with.

        Whoever ends the ticket otherwise (the caller's client left) cancels or fails the future: the place is
        given up here.
        """
        handle = ticket.get_loop().call_later(max(timeout_s, 0.0), self._expire, ticket)
        try:
            await ticket
        except BaseException:
            self._abandon(ticket)
            raise
        finally:
            handle.cancel()

    def _expire(self, ticket: asyncio.Future[None]) -> None:
        if not ticket.done():
            ticket.set_exception(
                DeadlineError("QUEUE_TIMEOUT", "no instance became free before the request's queue timeout")
            )

    def _abandon(self, ticket: asyncio.Future[None]) -> None:
        granted = ticket.done() and not ticket.cancelled() and ticket.exception() is None
        if granted:  # the grant and the caller's end crossed
            self.leave()
        elif self._slots.leave(ticket) and not self._slots.waiting:
            self._listener.gate_unwanted()

    def leave(self) -> None:
        """A granted request has ended: its slot goes to the next in line."""
        self._slots.done()
        self._meter.request_ended(self._clock.monotonic_ns())
        self._grant(idle=False)
        if self._slots.in_flight == 0:
            self._listener.gate_quiet()

    def _grant(self, idle: bool) -> None:
        """All that can be granted. `idle`: nobody was inside, as the listener knows."""
        while (ticket := self._slots.grant_next()) is not None:
            if ticket.done():  # cancelled, its waiter has not run yet
                self._slots.done()
                continue
            idle = self._began(idle)
            ticket.set_result(None)
        line = self.line
        while line is not None and line.waiting and self.has_room and not self.shunned:
            start = line.next()
            if start is None:
                return
            self._slots.in_flight += 1
            idle = self._began(idle)
            start(line.actor(self))

    def _began(self, idle: bool) -> bool:
        self._meter.request_began(self._clock.monotonic_ns())
        if idle:
            self._listener.gate_busy()
        return False

    def offer(self) -> None:
        """Grant what can be granted now."""
        self._grant(idle=self._slots.in_flight == 0)

    def set_open(self, is_open: bool) -> None:
        """Follow the life cycle: open grants at once, in order; closed grants nothing."""
        slots = self._slots
        if slots.open == is_open:
            return
        slots.open = is_open
        if is_open:
            self.offer()
            self._listener.gate_unwanted()
        else:
            if self.line is not None:
                self.line.look()
            if slots.waiting:
                self._listener.gate_wanted()

    def refuse_all(self, error: Callable[[], HibernodeError]) -> None:
        """Turn away everybody in line."""
        tickets = self._slots.empty_line()
        for ticket in tickets:
            if not ticket.done():
                ticket.set_exception(error())
        if tickets:
            self._listener.gate_unwanted()
