"""Where requests wait that any instance of a function on this node may serve: they go to whichever frees first.

The gateway sends some of the requests that wait there ahead, so that the next one is here when an instance ends one
(`x-hibernode-any`). An instance's own gate comes first: who waits there was bound to it. Nobody waits here while no
instance of the function is open: they are refused, and the gateway queues them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from agent.core.errors import DeadlineError, ExhaustedError, HibernodeError, UnavailableError

if TYPE_CHECKING:
    from agent.host.instance.actor import Actor
    from agent.host.instance.gate import AdmissionGate

Start = Callable[["Actor"], None]
"""Called in the turn in which the slot is granted, once it is counted and metered."""


class FunctionQueue:
    """See the module: one per function. Gates call `next` and `look`."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._actors: dict[AdmissionGate, Actor] = {}
        self._tickets: dict[asyncio.Future[None], Start] = {}

    @property
    def waiting(self) -> int:
        """Requests in it."""
        return len(self._tickets)

    def join(self, actor: Actor) -> None:
        """An instance of the function begins."""
        self._actors[actor.gate] = actor
        actor.gate.line = self

    def part(self, actor: Actor) -> bool:
        """It has ended. True if it was the last."""
        self._actors.pop(actor.gate, None)
        actor.gate.line = None
        self.look()
        return not self._actors

    def with_room(self) -> Actor | None:
        """An instance that takes a request now; the caller enters its gate at once."""
        for gate, actor in self._actors.items():
            if gate.has_room and not gate.shunned:
                return actor
        return None

    async def wait(self, ticket: asyncio.Future[None], timeout_s: float) -> None:
        """Wait until an instance has granted a slot of its (`start` has been called). Raises DeadlineError
        QUEUE_TIMEOUT, or what the ticket was failed with."""
        handle = ticket.get_loop().call_later(max(timeout_s, 0.0), _expire, ticket)
        try:
            await ticket
        except BaseException:
            self._tickets.pop(ticket, None)
            raise
        finally:
            handle.cancel()

    def ticket(self, start: Start) -> asyncio.Future[None]:
        """A place at the end. `start` is called with the instance that grants a slot, in the turn of the loop in which
        it does; from then on who took the ticket has to `leave` that instance's gate. Raises ExhaustedError
        QUEUE_FULL."""
        if len(self._tickets) >= self._max_waiting:
            raise ExhaustedError("QUEUE_FULL", f"{len(self._tickets)} requests wait for this function here already")
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = start
        self.look()
        return ticket

    def next(self) -> Start | None:
        """The oldest who is still there, to be called with the instance that has a slot for it; None if there is
        nobody."""
        while self._tickets:
            ticket = next(iter(self._tickets))
            start = self._tickets.pop(ticket)
            if not ticket.done():  # else it was cancelled, and its waiter has not run yet
                ticket.set_result(None)
                return start
        return None

    def actor(self, gate: AdmissionGate) -> Actor:
        """Whose gate it is."""
        return self._actors[gate]

    def look(self) -> None:
        """A gate has closed, or gone, or is shunned: where none may grant nobody may go on waiting."""
        if self._tickets and not any(gate.is_open and not gate.shunned for gate in self._actors):
            self.refuse_all(UnavailableError("NO_INSTANCE_AWAKE", "no instance of the function is awake on this node"))

    def refuse_all(self, error: HibernodeError) -> None:
        """Turn everybody away."""
        tickets = list(self._tickets)
        self._tickets.clear()
        for ticket in tickets:
            if not ticket.done():
                ticket.set_exception(error)


def _expire(ticket: asyncio.Future[None]) -> None:
    if not ticket.done():
        ticket.set_exception(
            DeadlineError("QUEUE_TIMEOUT", "no instance became free before the request's queue timeout")
        )
