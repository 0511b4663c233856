"""The node's ingress: one request, from the gateway (or anyone with the node's token) into one instance.

It checks the token, finds the instance by `x-hibernode-instance`, waits at its gate, forwards, and gives the slot
back with the last byte. An answer that carries `x-hibernode-refused` says that no byte of the request reached the
instance: only then may the gateway dispatch it again.

The token travels in `x-hibernode-token`, not in `Authorization`: that header is the client's own and goes through.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from agent.core.errors import (
    DeadlineError,
    HibernodeError,
    InstanceError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from agent.core.lifecycle_events import StopAsked
from agent.core.types import MILLISECOND_NS, SECOND_NS, InstanceState
from agent.host.actor import Actor
from agent.host.invoke_log import END_WAIT_S, log_result
from agent.host.node import Node
from agent.host.waking import wake_up
from agent.http import headers as rules
from agent.http.errors import RequestIds
from agent.http.exchange import Exchange
from agent.http.forward import ForwardResult, Outcome, forward
from agent.http.message import Header, RequestHead, ResponseHead
from agent.ports import Clock

T = TypeVar("T")

MAX_TIMEOUTS_IN_A_ROW = 2
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
WAKE_TARGET = b"/hibernode/wake"
"""With `x-hibernode-wake-hold-ms` (which no client can send) the scheduler's Wake: answered 200 once the instance is
awake, else as a refusal. WakeInstance of the API does the same; a gRPC call costs 2 ms of every wake, this 0.5."""
_CONTROL_PATHS = (b"/http-invoke", b"/invoke")


class Ingress:
    """The handler of the ingress's HTTP server. `open` is False until recovery is done, and again once the agent
    leaves (`leaving`). `tokens`: each of them opens it (the node's own, and the credential it shares with the
    scheduler)."""

    def __init__(self, node: Node, clock: Clock, tokens: Sequence[str], request_ids: RequestIds) -> None:
        self._node = node
        self._clock = clock
        self._tokens = tuple(token.encode() for token in tokens)
        self._request_ids = request_ids
        self.open = False
        self.leaving = False

    async def __call__(self, exchange: Exchange) -> None:
        """Handle one exchange; every path ends in exactly one answer."""
        head = exchange.head
        request_id = ""
        try:
            self._authenticate(head)
            given = head.get(b"x-fc-request-id") or b""
            request_id = given.decode() if _REQUEST_ID.fullmatch(given) else ""
            actor = self._find(head)
            timeout_ns = _deadline(head, actor.function.queue_timeout_ns)
            if head.target == WAKE_TARGET and (hold_ms := head.get(b"x-hibernode-wake-hold-ms")) is not None:
                await self._wake(exchange, actor, hold_ms, timeout_ns)
                return
        except HibernodeError as error:
            await self._refuse(exchange, error, request_id)
            return
        request_id = request_id or self._request_ids()
        began = self._clock.monotonic_ns()
        asleep = actor.state is not InstanceState.RUNNING
        try:
            actor, waited = await self._enter(exchange, actor, timeout_ns)
        except HibernodeError as error:
            await self._refuse(exchange, error, request_id)
            return
        waited_ns = self._clock.monotonic_ns() - began if waited else 0
        if head.get(b"x-hibernode-notice"):
            # Whoever sent it has no other way to know that no byte reached an instance, should this agent be killed.
            exchange.send_processing()
        inside = True

        def leave() -> None:
            nonlocal inside
            if inside:
                inside = False
                actor.gate.leave()

        try:
            await self._forward(exchange, actor, request_id, waited_ns, asleep, leave)
        finally:
            leave()

    # ---- before the grant ---------------------------------------------------------------------------------------

    def _authenticate(self, head: RequestHead) -> None:
        given = head.get(b"x-hibernode-token")
        if given is None:
            raise UnauthenticatedError("TOKEN_MISSING", "the ingress needs the node's token in x-hibernode-token")
        if not any(hmac.compare_digest(given, token) for token in self._tokens):
            raise UnauthenticatedError("TOKEN_UNKNOWN", "this node does not know that token")

    def _find(self, head: RequestHead) -> Actor:
        if not self.open:
            if self.leaving:
                raise UnavailableError("AGENT_STOPPING", "this node's agent is going away")
            raise UnavailableError("NODE_RECOVERING", "this node is not ready yet")
        uid = (head.get(b"x-hibernode-instance") or b"").decode("latin-1")
        if not uid:
            raise InvalidArgumentError("INSTANCE_MISSING", "name the instance in x-hibernode-instance")
        actor = self._node.actors.get(uid)
        if actor is None:
            raise NotFoundError("INSTANCE_NOT_FOUND", f"no instance {uid!r} on this node")
        return actor

    async def _enter(self, exchange: Exchange, actor: Actor, timeout_ns: int) -> tuple[Actor, bool]:
        """A slot of `actor`; where that is busy and the request may go to any instance of the function
        (`x-hibernode-any`), of whichever has one first. Who granted it, and whether it was waited for."""
        gate = actor.gate
        line = gate.line
        if line is not None and gate.is_open and not gate.has_room and exchange.head.get(b"x-hibernode-any"):
            sibling = line.with_room()
            if sibling is None:
                place = line.ticket()
                return await self._unless_gone(exchange, place, line.wait(place, timeout_ns / SECOND_NS)), True
            actor = sibling
        ticket = actor.gate.try_enter()
        if ticket is None:
            return actor, False
        await self._unless_gone(exchange, ticket, actor.gate.wait(ticket, timeout_ns / SECOND_NS))
        return actor, True

    async def _unless_gone(self, exchange: Exchange, ticket: asyncio.Future[Any], wait: Awaitable[T]) -> T:
        """Wait for the grant; a caller that goes away is dropped at once."""

        def gone() -> None:
            if not ticket.done():
                ticket.set_exception(UnavailableError("CLIENT_GONE", "the client left while it waited"))

        exchange.on_gone(gone)
        try:
            return await wait
        finally:
            exchange.off_gone(gone)

    async def _wake(self, exchange: Exchange, actor: Actor, hold_ms: bytes, timeout_ns: int) -> None:
        """Not a request but the scheduler's wish that the instance be awake: see `WAKE_TARGET`."""
        if not hold_ms.isdigit() or len(hold_ms) > 10:
            raise InvalidArgumentError("HOLD_INVALID", "x-hibernode-wake-hold-ms must be a number of milliseconds")
        free = await wake_up(actor, self._clock.monotonic_ns(), int(hold_ms) * MILLISECOND_NS, timeout_ns)
        await exchange.answer(200, [(b"x-hibernode-free-slots", b"%d" % free)])

    async def _refuse(self, exchange: Exchange, error: HibernodeError, request_id: str) -> None:
        """No byte reached the instance: say so, the gateway may try elsewhere."""
        if exchange.gone:
            return
        refused = [(b"x-hibernode-refused", error.reason.encode())]
        await exchange.fail(error, request_id or self._request_ids(), extra=refused)

    # ---- inside the instance ------------------------------------------------------------------------------------

    async def _forward(
        self,
        exchange: Exchange,
        actor: Actor,
        request_id: str,
        waited_ns: int,
        asleep: bool,
        leave: Callable[[], None],
    ) -> None:
        """`leave` gives the slot back: with the answer's last byte, before that goes on to the gateway, so that who
        waits for the slot is not kept waiting by it."""
        pool = actor.pool
        if exchange.gone:
            return
        if pool is None:
            error = UnavailableError("INSTANCE_GONE", "the instance has no container")
            await self._refuse(exchange, error, request_id)
            return
        head = exchange.head
        ours, wants_log = self._ours(exchange, actor, request_id)

        def answer_headers(answer: ResponseHead) -> list[Header]:
            actor.figures.timeouts_in_a_row = 0
            kept = rules.instance_answer_headers(answer.headers)
            kept.extend(_own_answer_headers(actor, request_id, waited_ns, asleep))
            return kept

        result = await forward(
            exchange,
            pool,
            head.method,
            head.target,
            rules.request_headers(head.headers) + ours,
            deadline=asyncio.get_running_loop().time() + actor.function.timeout_ns / SECOND_NS,
            response_filter=answer_headers,
            late_headers=(lambda: self._log_headers(actor, request_id, END_WAIT_S)) if wants_log else None,
            on_last_byte=leave,
        )
        if result.outcome is not Outcome.COMPLETE:
            await self._unhappy(exchange, actor, request_id, result, wants_log)

    async def _log_headers(self, actor: Actor, request_id: str, end_wait_s: float) -> list[Header]:
        handle = actor.handle_of_container
        if handle is None:
            return []
        return [(b"x-fc-log-result", await log_result(self._node.shell.runtime, handle, request_id, end_wait_s))]

    def _ours(self, exchange: Exchange, actor: Actor, request_id: str) -> tuple[list[Header], bool]:
        """The `x-fc-*` context, of which only the first three differ between requests; and whether the client asks for
        the log. One loop, for every request pays for it."""
        control, client, wants_log = _CONTROL_PATHS[0], b"", False
        for name, value in exchange.head.headers:
            if name == b"x-hibernode-control-path":
                control = value if value in _CONTROL_PATHS else control
            elif name == b"x-hibernode-client-ip":
                client = value
            elif name == b"x-fc-log-type":
                wants_log = value == b"Tail"
        ours = [
            (b"x-fc-request-id", request_id.encode("latin-1")),
            (b"x-fc-control-path", control),
            (b"x-fc-client-ip", client or exchange.peer.encode()),
            *actor.context_headers,
        ]
        return ours, wants_log

    async def _unhappy(
        self, exchange: Exchange, actor: Actor, request_id: str, result: ForwardResult, wants_log: bool
    ) -> None:
        own = _own_answer_headers(actor, request_id, 0, False)[1:]  # `fail` says the request id itself
        error: HibernodeError | None = None
        match result.outcome:
            case Outcome.CONNECT_FAILED:
                error = InstanceError("INSTANCE_CRASHED", "the instance does not accept connections")
                own.append((b"x-hibernode-refused", b"CONNECT_FAILED"))
            case Outcome.UPSTREAM_FAILED_BEFORE_HEAD:
                error = InstanceError("INSTANCE_CRASHED", "the instance closed the connection without an answer")
            case Outcome.TIMEOUT_BEFORE_HEAD:
                self._count_timeout(actor)
                error = DeadlineError(
                    "FUNCTION_TIMEOUT",
                    f"the function did not answer within its timeout of {actor.function.timeout_ns / SECOND_NS:g} s",
                )
            case Outcome.CLIENT_FAILED:
                error = result.error
            case _:
                return  # the client left, or its answer had begun and was cut
        if error is not None and not exchange.head_sent and not exchange.gone:
            if wants_log:
                own += await self._log_headers(actor, request_id, 0.0)  # no End will come; what led to this is there
            await exchange.fail(error, request_id, extra=own)

    def _count_timeout(self, actor: Actor) -> None:
        """One slow request is the request's fault; two in a row without a byte are the instance's."""
        actor.figures.timeouts_in_a_row += 1
        if actor.figures.timeouts_in_a_row >= MAX_TIMEOUTS_IN_A_ROW:
            message = f"{MAX_TIMEOUTS_IN_A_ROW} requests in a row timed out without a byte of an answer"
            actor.handle(StopAsked(0, force=True, reason="INSTANCE_UNRESPONSIVE", message=message))


def _own_answer_headers(actor: Actor, request_id: str, waited_ns: int, asleep: bool) -> list[Header]:
    gate = actor.gate
    load = f"{gate.in_flight - 1 + gate.waiting}/{gate.concurrency};{actor.state.value}"
    own = [
        (b"x-fc-request-id", request_id.encode("latin-1")),
        (b"x-fc-instance-id", actor.uid.encode()),
        (b"x-hibernode-load", load.encode()),
    ]
    if waited_ns:
        name = b"x-hibernode-wake-ms" if asleep else b"x-hibernode-queue-ms"
        own.append((name, f"{waited_ns / MILLISECOND_NS:.3f}".encode()))
    return own


def _deadline(head: RequestHead, default_ns: int) -> int:
    """The rest of the queue timeout that the gateway grants, in ns."""
    given = head.get(b"x-hibernode-deadline-ms")
    if given is None:
        return default_ns
    if not given.isdigit() or len(given) > 10:
        raise InvalidArgumentError("DEADLINE_INVALID", "x-hibernode-deadline-ms must be a number of milliseconds")
    return int(given) * MILLISECOND_NS
