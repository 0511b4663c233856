"""The dispatch loop: the only code that calls `Dispatcher.step` and executes the effects.

A request is a `Ticket`. If a slot is free, `arrive` dispatches it at once, without a future, a timer or an iteration of
the event loop; else the ticket waits. One timer serves all deadlines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.events import (
    DeadlinePassed,
    Dispatch,
    Event,
    LeaseAnswered,
    LeaseEnded,
    LeaseRefused,
    RefusalReason,
    Refuse,
    RequestArrived,
    RequestGone,
    Wake,
)
from agent.core.types import MILLISECOND_NS
from agent.http.errors import ClientGoneError
from agent.ports import Clock, Timer

RESOLUTION_NS = 10 * MILLISECOND_NS
"""Deadlines this close together are checked together, so a refusal may be late by this much."""
NEVER_NS = 1 << 63


class Ticket:
    """A request. `outcome`: where it was last dispatched to, or why it was refused; None while it waits. `served_by`:
    the instance that answered it, once that is known."""

    __slots__ = ("deadline_ns", "number", "outcome", "served_by", "waiter")

    def __init__(self, number: int, deadline_ns: int) -> None:
        self.number = number
        self.deadline_ns = deadline_ns
        self.outcome: Dispatch | Refuse | None = None
        self.served_by = ""
        self.waiter: asyncio.Future[Dispatch | Refuse] | None = None


class DispatchLoop:
    """Requests in, dispatches out. `wake` starts a wake call, whose end is an event for `apply`."""

    def __init__(self, clock: Clock, dispatcher: Dispatcher, wake: Callable[[Wake], None]) -> None:
        self._clock = clock
        self._dispatcher = dispatcher
        self._wake = wake
        self._tickets: dict[int, Ticket] = {}
        self._waiting: set[Ticket] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: Timer | None = None
        self._next_check_ns = NEVER_NS
        self._numbers = 0
        self._closed = False

    @property
    def open_requests(self) -> int:
        return len(self._tickets)

    def apply(self, event: Event) -> None:
        """Step the dispatcher and execute the effects."""
        for effect in self._dispatcher.step(event, self._clock.monotonic_ns()):
            if isinstance(effect, Wake):
                self._wake(effect)
            else:
                self._answer(effect)

    def arrive(self, function: str, deadline_ns: int) -> Ticket:
        """Take in a request for `function`. If the ticket's `outcome` is None, the caller has to `wait` for it."""
        self._numbers += 1
        ticket = Ticket(self._numbers, deadline_ns)
        self._tickets[ticket.number] = ticket
        self.apply(RequestArrived(ticket.number, function, deadline_ns))
        if self._closed and ticket.outcome is None:
            self._refuse_stopping(ticket)
        return ticket

    async def wait(self, ticket: Ticket) -> Dispatch | Refuse:
        """Wait for the outcome, until the ticket's deadline at most. Unless it is a Refuse, the caller has to
        call `ended`, `gone` or `refused` later; after a cancellation, `gone`."""
        if ticket.outcome is None:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            ticket.waiter = self._loop.create_future()
            self._waiting.add(ticket)
            self._check_by(ticket.deadline_ns)
            try:
                return await ticket.waiter
            finally:
                self._waiting.discard(ticket)
                ticket.waiter = None
        return ticket.outcome

    def _check_by(self, at_ns: int) -> None:
        if at_ns < self._next_check_ns:
            if self._timer is not None:
                self._timer.cancel()
            self._next_check_ns = at_ns
            self._timer = self._clock.call_at(at_ns, self._check_deadlines)

    def _check_deadlines(self) -> None:
        """Refuse the waiting tickets whose deadline has passed."""
        self._timer, self._next_check_ns = None, NEVER_NS
        now = self._clock.monotonic_ns()
        for ticket in [one for one in self._waiting if one.deadline_ns <= now]:
            self.apply(DeadlinePassed(ticket.number))
        left = [one.deadline_ns for one in self._waiting if one.deadline_ns > now]
        if left:
            self._check_by(max(min(left), now + RESOLUTION_NS))

    def answered(self, ticket: Ticket, waited_ns: int) -> None:
        """The instance of a direct wake begins to answer; the request waited there for `waited_ns`."""
        self.apply(LeaseAnswered(ticket.number, waited_ns))

    def ended(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.number, None) is not None:
            self.apply(LeaseEnded(ticket.number, ticket.served_by))

    def gone(self, ticket: Ticket) -> None:
        """The client has left, or the request failed without an answer."""
        if self._tickets.pop(ticket.number, None) is not None:
            self.apply(RequestGone(ticket.number))

    def abandon(self, ticket: Ticket) -> None:
        """The client has left while the request waits: `wait` raises ClientGoneError at once."""
        self.gone(ticket)
        if ticket.waiter is not None and not ticket.waiter.done():
            ticket.waiter.set_exception(ClientGoneError())

    def refused(self, ticket: Ticket) -> None:
        """The agent did not take the request: it waits again, before younger ones, or has a new `outcome` at once."""
        ticket.outcome = None
        self.apply(LeaseRefused(ticket.number))
        if self._closed and ticket.outcome is None:
            self._refuse_stopping(ticket)

    def close(self) -> int:
        """Refuse with STOPPING all requests that wait, and later ones that would have to. Returns how many waited."""
        self._closed = True
        waiting = [ticket for ticket in self._tickets.values() if ticket.outcome is None]
        for ticket in waiting:
            self._refuse_stopping(ticket)
        return len(waiting)

    def _refuse_stopping(self, ticket: Ticket) -> None:
        self.apply(RequestGone(ticket.number))
        self._answer(Refuse(ticket.number, RefusalReason.STOPPING))

    def _answer(self, effect: Dispatch | Refuse) -> None:
        ticket = self._tickets.get(effect.request)
        if ticket is None:
            return
        if isinstance(effect, Refuse):
            del self._tickets[effect.request]
        ticket.outcome = effect
        if ticket.waiter is not None and not ticket.waiter.done():
            ticket.waiter.set_result(effect)
