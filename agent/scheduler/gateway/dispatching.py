"""The dispatcher's desk: the one caller of `Dispatcher.step`, and the hands that do what it says.

A waiting request is a `Ticket`. `arrive` answers at once where a slot is free, so that the usual request costs no
future, no timer and no turn of the loop; else the ticket waits. One timer serves all deadlines: most of them are over
before it looks.
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

GRAIN_NS = 10 * MILLISECOND_NS
"""Deadlines that lie so close together are looked at together: a refusal may be late by so much."""
NEVER_NS = 1 << 63


class Ticket:
    """One request at the desk. `outcome` is what it was last told: where to go, or why not; None while it waits.
    `served_by`: the instance that answered it, once it is known."""

    __slots__ = ("deadline_ns", "number", "outcome", "served_by", "waiter")

    def __init__(self, number: int, deadline_ns: int) -> None:
        self.number = number
        self.deadline_ns = deadline_ns
        self.outcome: Dispatch | Refuse | None = None
        self.served_by = ""
        self.waiter: asyncio.Future[Dispatch | Refuse] | None = None


class DispatchLoop:
    """Requests in, dispatches out. `wake` starts a Wake call, which reports back through `tell`."""

    def __init__(self, clock: Clock, dispatcher: Dispatcher, wake: Callable[[Wake], None]) -> None:
        self._clock = clock
        self._dispatcher = dispatcher
        self._wake = wake
        self._tickets: dict[int, Ticket] = {}
        self._waiting: set[Ticket] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: Timer | None = None
        self._looks_at_ns = NEVER_NS
        self._numbers = 0
        self._closed = False

    @property
    def open_requests(self) -> int:
        """Requests waiting or leased."""
        return len(self._tickets)

    def tell(self, event: Event) -> None:
        """Something happened: let the dispatcher decide, and do it."""
        for effect in self._dispatcher.step(event, self._clock.monotonic_ns()):
            if isinstance(effect, Wake):
                self._wake(effect)
            else:
                self._answer(effect)

    def arrive(self, function: str, deadline_ns: int) -> Ticket:
        """A request for `function`. Look at the ticket's `outcome`; while it is None, `wait`."""
        self._numbers += 1
        ticket = Ticket(self._numbers, deadline_ns)
        self._tickets[ticket.number] = ticket
        self.tell(RequestArrived(ticket.number, function, deadline_ns))
        if self._closed and ticket.outcome is None:
            self._send_away(ticket)
        return ticket

    async def wait(self, ticket: Ticket) -> Dispatch | Refuse:
        """Where the request goes. Ends by the ticket's deadline with a refusal. Cancelled or not, the caller still
        has to end the ticket (`ended`, `gone`, `refused`) unless the outcome is a Refuse."""
        if ticket.outcome is None:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            ticket.waiter = self._loop.create_future()
            self._waiting.add(ticket)
            self._look_by(ticket.deadline_ns)
            try:
                return await ticket.waiter
            finally:
                self._waiting.discard(ticket)
                ticket.waiter = None
        return ticket.outcome

    def _look_by(self, at_ns: int) -> None:
        if at_ns < self._looks_at_ns:
            if self._timer is not None:
                self._timer.cancel()
            self._looks_at_ns = at_ns
            self._timer = self._clock.call_at(at_ns, self._look)

    def _look(self) -> None:
        """Whose deadline has passed?"""
        self._timer, self._looks_at_ns = None, NEVER_NS
        now = self._clock.monotonic_ns()
        for ticket in [one for one in self._waiting if one.deadline_ns <= now]:
            self.tell(DeadlinePassed(ticket.number))
        left = [one.deadline_ns for one in self._waiting if one.deadline_ns > now]
        if left:
            self._look_by(max(min(left), now + GRAIN_NS))

    def answered(self, ticket: Ticket, waited_ns: int) -> None:
        """The instance that the request woke begins to answer; the request waited there for `waited_ns`."""
        self.tell(LeaseAnswered(ticket.number, waited_ns))

    def ended(self, ticket: Ticket) -> None:
        """Its response has ended: the slot is free."""
        if self._tickets.pop(ticket.number, None) is not None:
            self.tell(LeaseEnded(ticket.number, ticket.served_by))

    def gone(self, ticket: Ticket) -> None:
        """Nobody waits for it any more, or it failed without being served."""
        if self._tickets.pop(ticket.number, None) is not None:
            self.tell(RequestGone(ticket.number))

    def abandon(self, ticket: Ticket) -> None:
        """The client left while it waited: `wait` raises ClientGoneError at once."""
        self.gone(ticket)
        if ticket.waiter is not None and not ticket.waiter.done():
            ticket.waiter.set_exception(ClientGoneError())

    def refused(self, ticket: Ticket) -> None:
        """The instance did not take it: it waits again, at the head. Look at `outcome` anew."""
        ticket.outcome = None
        self.tell(LeaseRefused(ticket.number))
        if self._closed and ticket.outcome is None:
            self._send_away(ticket)

    def close(self) -> int:
        """Nobody waits here any more: who does is refused STOPPING, now and from now on. Returns how many did."""
        self._closed = True
        waiting = [ticket for ticket in self._tickets.values() if ticket.outcome is None]
        for ticket in waiting:
            self._send_away(ticket)
        return len(waiting)

    def _send_away(self, ticket: Ticket) -> None:
        self.tell(RequestGone(ticket.number))
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
