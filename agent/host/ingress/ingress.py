"""The node's ingress: passes requests of the gateway, or of any holder of its tokens, on to instances.

It checks the token, finds the instance by `x-hibernode-instance`, waits at its gate, forwards, and gives the slot back
with the last byte. `x-hibernode-refused` in an answer says that no byte of the request reached the instance; without it
an answered request is never dispatched again.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Sequence

from agent.core.errors import (
    HibernodeError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from agent.core.types import MILLISECOND_NS, SECOND_NS, InstanceState
from agent.host.ingress.request import REQUEST_ID, ProxiedRequest
from agent.host.instance.actor import Actor
from agent.host.instance.waking import wake_up
from agent.host.node.node import Node
from agent.http import hop_headers
from agent.http.exchange import Exchange
from agent.http.message import RequestHead
from agent.http.request_ids import RequestIds
from agent.ports import Clock

FULL = ((hop_headers.REFUSED, b"TOO_MANY_CONNECTIONS"),)
"""Headers of the server's own answer to a connection beyond its limit: no instance has seen the request."""


class Ingress:
    """The handler of the ingress's HTTP server.

    - `tokens`: any of them is accepted (the node's own, and the credential that it shares with the scheduler).
    - `open`: False until recovery is done, and again once the agent is stopping (`leaving`).
    """

    def __init__(self, node: Node, clock: Clock, tokens: Sequence[str], request_ids: RequestIds) -> None:
        self._node = node
        self._clock = clock
        self._tokens = tuple(token.encode() for token in tokens)
        self._request_ids = request_ids
        self.open = False
        self.leaving = False

    async def __call__(self, exchange: Exchange) -> None:
        """Handle one exchange; every path ends in exactly one answer, unless the client has gone."""
        head = exchange.head
        request_id = ""
        try:
            self._authenticate(head)
            given = head.get(b"x-fc-request-id") or b""
            request_id = given.decode() if REQUEST_ID.fullmatch(given) else ""
            actor = self._find(head)
            timeout_ns = _deadline(head, actor.function.queue_timeout_ns)
            if head.target == hop_headers.WAKE_PATH and (hold_ms := head.get(hop_headers.WAKE_HOLD_MS)) is not None:
                await self._wake(exchange, actor, hold_ms, timeout_ns)
                return
        except HibernodeError as error:
            await self._refuse(exchange, error, request_id)
            return
        needs_wake = actor.state is not InstanceState.RUNNING
        runtime = self._node.context.runtime
        request = ProxiedRequest(exchange, actor, request_id or self._request_ids(), needs_wake, self._clock, runtime)
        try:
            try:
                await self._enter(exchange, request, timeout_ns)
            except HibernodeError as error:
                await self._refuse(exchange, error, request.request_id)
                return
            try:
                await request.run()
            except UnavailableError as error:
                await self._refuse(exchange, error, request.request_id)
        finally:
            request.end()

    # ---- before the grant ---------------------------------------------------------------------------------------

    def _authenticate(self, head: RequestHead) -> None:
        given = head.get(hop_headers.TOKEN)
        if given is None:
            raise UnauthenticatedError(
                "TOKEN_MISSING", f"the ingress needs the node's token in {hop_headers.TOKEN.decode()}"
            )
        if not any(hmac.compare_digest(given, token) for token in self._tokens):
            raise UnauthenticatedError("TOKEN_UNKNOWN", "this node does not know that token")

    def _find(self, head: RequestHead) -> Actor:
        if not self.open:
            if self.leaving:
                raise UnavailableError("AGENT_STOPPING", "this node's agent is stopping")
            raise UnavailableError("NODE_RECOVERING", "this node is not ready yet")
        uid = (head.get(hop_headers.INSTANCE) or b"").decode("latin-1")
        if not uid:
            raise InvalidArgumentError("INSTANCE_MISSING", f"name the instance in {hop_headers.INSTANCE.decode()}")
        actor = self._node.actors.get(uid)
        if actor is None:
            raise NotFoundError("INSTANCE_NOT_FOUND", f"no instance {uid!r} on this node")
        return actor

    async def _enter(self, exchange: Exchange, request: ProxiedRequest, timeout_ns: int) -> None:
        """Wait for a slot of the named instance. If it has none free and the request accepts any instance of its
        function (`x-hibernode-any-instance`), the first free slot of any of them will do."""
        actor = request.actor
        gate = actor.gate
        queue = gate.queue
        if queue is not None and gate.is_open and not gate.has_room and exchange.head.get(hop_headers.ANY_INSTANCE):
            sibling = queue.with_room()
            if sibling is None:
                request.serialize()
                ticket = queue.ticket(request.start)
                await self._unless_gone(exchange, ticket, queue.wait(ticket, timeout_ns / SECOND_NS))
                return
            actor = sibling
        wait = actor.gate.try_enter()
        if wait is not None:
            await self._unless_gone(exchange, wait, actor.gate.wait(wait, timeout_ns / SECOND_NS))
        request.granted(actor, waited=wait is not None)

    async def _unless_gone(self, exchange: Exchange, ticket: asyncio.Future[None], wait: Awaitable[None]) -> None:
        """Wait for the grant; fail at once if the client disconnects."""

        def gone() -> None:
            if not ticket.done():
                ticket.set_exception(UnavailableError("CLIENT_GONE", "the client disconnected while it waited"))

        exchange.on_gone(gone)
        try:
            await wait
        finally:
            exchange.off_gone(gone)

    async def _wake(self, exchange: Exchange, actor: Actor, hold_ms: bytes, timeout_ns: int) -> None:
        """The scheduler's Wake call: answers 200 once the instance is awake, else with a refusal. WakeInstance of the
        API does the same, but gRPC adds 2 ms to every wake and this call 0.5."""
        if not hold_ms.isdigit() or len(hold_ms) > 10:
            raise InvalidArgumentError(
                "HOLD_INVALID", f"{hop_headers.WAKE_HOLD_MS.decode()} must be a number of milliseconds"
            )
        free = await wake_up(actor, self._clock.monotonic_ns(), int(hold_ms) * MILLISECOND_NS, timeout_ns)
        await exchange.answer(200, [(hop_headers.FREE_SLOTS, b"%d" % free)])

    async def _refuse(self, exchange: Exchange, error: HibernodeError, request_id: str) -> None:
        """Answer that no byte reached the instance: the gateway may dispatch the request again."""
        if exchange.gone:
            return
        refused = [(hop_headers.REFUSED, error.reason.encode())]
        await exchange.fail(error, request_id or self._request_ids(), extra=refused)


def _deadline(head: RequestHead, default_ns: int) -> int:
    """What is left of the queue timeout, in ns."""
    given = head.get(hop_headers.DEADLINE_MS)
    if given is None:
        return default_ns
    if not given.isdigit() or len(given) > 10:
        raise InvalidArgumentError(
            "DEADLINE_INVALID", f"{hop_headers.DEADLINE_MS.decode()} must be a number of milliseconds"
        )
    return int(given) * MILLISECOND_NS
