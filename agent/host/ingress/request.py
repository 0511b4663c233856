"""Proxies one request to an instance: from the grant of a slot to the last byte of the answer.

A request in a `FunctionQueue` is serialized in advance where possible, and then written to the instance in the loop
iteration that completes the previous answer (`start`).
"""

from __future__ import annotations

import asyncio
import re

from agent.core.errors import DeadlineError, HibernodeError, InstanceError, UnavailableError
from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.host.ingress.invoke_log import END_WAIT_S, log_result
from agent.host.instance.actor import Actor
from agent.http import header_filter as rules
from agent.http import hop_headers
from agent.http.exchange import Exchange
from agent.http.forward import ForwardResult, forward, forward_now, prepare
from agent.http.message import Header, ResponseHead
from agent.http.relay import Relay, RelayOutcome
from agent.ports import Clock, Runtime

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_CONTROL_PATHS = (b"/http-invoke", b"/invoke")


class ProxiedRequest:
    """One request. Call `granted` (or `start`) once, then `run`; always call `end`."""

    __slots__ = (
        "_began_ns", "_clock", "_done", "_exchange", "_headers", "_inside", "_prepared", "_relay", "_reports_start",
        "_runtime", "actor", "needs_wake", "request_id", "waited_ns", "wants_log",
    )  # fmt: skip

    def __init__(
        self, exchange: Exchange, actor: Actor, request_id: str, needs_wake: bool, clock: Clock, runtime: Runtime
    ) -> None:
        """`actor`: the instance that the gateway named. `needs_wake`: it was not RUNNING when the request arrived."""
        self.actor = actor
        self.request_id = request_id
        self.needs_wake = needs_wake
        self.waited_ns = 0
        self.wants_log = False
        self._exchange = exchange
        self._clock = clock
        self._runtime = runtime
        self._began_ns = clock.monotonic_ns()
        self._inside = False
        self._reports_start = False
        self._prepared: bytes | None = None
        self._relay: Relay | None = None
        self._done: asyncio.Future[ForwardResult] | None = None
        self._headers = self._with_context()

    def _with_context(self) -> list[Header]:
        """The request's own headers and the `x-fc-*` context, of which only the first three differ between requests.
        One loop, because every request pays for it."""
        control, client = _CONTROL_PATHS[0], b""
        given = self._exchange.head.headers
        for name, value in given:
            if name == hop_headers.CONTROL_PATH:
                control = value if value in _CONTROL_PATHS else control
            elif name == hop_headers.CLIENT_IP:
                client = value
            elif name == hop_headers.STARTED:
                self._reports_start = True
            elif name == b"x-fc-log-type":
                self.wants_log = value == b"Tail"
        return [
            *rules.request_headers(given),
            (b"x-fc-request-id", self.request_id.encode("latin-1")),
            (b"x-fc-control-path", control),
            (b"x-fc-client-ip", client or self._exchange.peer.encode()),
            *self.actor.context_headers,
        ]

    # ---- the grant ----------------------------------------------------------------------------------------------

    def serialize(self) -> None:
        """Serialize it before it waits for the first free slot of its function, unless it wants its log."""
        head, pool = self._exchange.head, self.actor.pool
        if pool is not None and not self.wants_log:
            self._prepared = prepare(self._exchange, pool, head.method, head.target, self._headers)

    def granted(self, actor: Actor, waited: bool) -> None:
        """`actor` has granted a slot."""
        self._inside = True
        if actor is not self.actor:
            if actor.context_headers != self.actor.context_headers:  # it runs another revision
                self._headers[len(self._headers) - len(self.actor.context_headers) :] = actor.context_headers
                self._prepared = None
            self.actor = actor
        if waited:
            self.waited_ns = self._clock.monotonic_ns() - self._began_ns
        if self._reports_start:
            # Until this arrives the gateway knows that no byte reached an instance, even if this agent is killed.
            self._exchange.send_processing()

    def start(self, actor: Actor) -> None:
        """`actor` has granted a slot that another request gave back: send the bytes now if a connection is free, else
        leave that to `run`."""
        self.granted(actor, waited=True)
        exchange, pool = self._exchange, actor.pool
        ready = self._prepared is not None and not exchange.gone and exchange.body_error is None
        connection = pool.take() if ready and pool is not None else None
        if pool is None or connection is None:
            return
        loop = exchange.loop
        self._done = loop.create_future()
        self._relay = forward_now(
            exchange,
            pool,
            connection,
            exchange.head.method,
            exchange.head.target,
            self._headers,
            deadline=loop.time() + actor.function.timeout_ns / SECOND_NS,
            response_filter=self._answer_headers,
            on_done=self._over,
            on_last_byte=self.leave,
            prepared=self._prepared,
        )

    def _over(self, result: ForwardResult) -> None:
        assert self._done is not None
        if not self._done.done():  # else `run` was cancelled
            self._done.set_result(result)

    def leave(self) -> None:
        """Give the slot back. Called when the answer's last byte has come, and before it goes to the gateway, so that
        the next request does not wait for the sending."""
        if self._inside:
            self._inside = False
            self.actor.gate.leave()

    def end(self) -> None:
        """Stop all that is under way, and give the slot back."""
        if self._relay is not None:
            self._relay.cancel()
        self.leave()

    # ---- inside -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Proxy until the answer is complete. Raises UnavailableError INSTANCE_GONE if it has no container now."""
        result = await (self._forwarded() if self._done is None else self._done)
        if result is None:
            return
        if result.fault is not None:
            raise result.fault
        if result.outcome is not RelayOutcome.COMPLETE:
            await self._failed(result)

    async def _forwarded(self) -> ForwardResult | None:
        exchange, actor = self._exchange, self.actor
        if exchange.gone:
            return None
        if actor.pool is None:
            raise UnavailableError("INSTANCE_GONE", "the instance has no container")
        return await forward(
            exchange,
            actor.pool,
            exchange.head.method,
            exchange.head.target,
            self._headers,
            deadline=exchange.loop.time() + actor.function.timeout_ns / SECOND_NS,
            response_filter=self._answer_headers,
            deferred_headers=(lambda: self._log_headers(END_WAIT_S)) if self.wants_log else None,
            on_last_byte=self.leave,
        )

    async def _log_headers(self, end_wait_s: float) -> list[Header]:
        handle = self.actor.handle_of_container
        if handle is None:
            return []
        return [(b"x-fc-log-result", await log_result(self._runtime, handle, self.request_id, end_wait_s))]

    def _answer_headers(self, answer: ResponseHead) -> list[Header]:
        self.actor.note_answer()
        kept = rules.instance_answer_headers(answer.headers)
        kept.extend(self._own_headers())
        if self.waited_ns:
            name = hop_headers.WAKE_MS if self.needs_wake else hop_headers.QUEUE_MS
            kept.append((name, b"%.3f" % (self.waited_ns / MILLISECOND_NS)))
        return kept

    def _own_headers(self) -> list[Header]:
        return [(b"x-fc-request-id", self.request_id.encode("latin-1")), (b"x-fc-instance-id", self.actor.uid.encode())]

    async def _failed(self, result: ForwardResult) -> None:
        exchange, actor = self._exchange, self.actor
        own = self._own_headers()[1:]  # `fail` adds the request id itself
        error: HibernodeError | None = None
        match result.outcome:
            case RelayOutcome.CONNECT_FAILED:
                error = InstanceError("INSTANCE_CRASHED", "the instance does not accept connections")
                own.append((hop_headers.REFUSED, b"CONNECT_FAILED"))
            case RelayOutcome.UPSTREAM_FAILED_BEFORE_HEAD:
                error = InstanceError("INSTANCE_CRASHED", "the instance closed the connection without an answer")
            case RelayOutcome.TIMEOUT_BEFORE_HEAD:
                actor.note_timeout()
                error = DeadlineError(
                    "FUNCTION_TIMEOUT",
                    f"the function did not answer within its timeout of {actor.function.timeout_ns / SECOND_NS:g} s",
                )
            case RelayOutcome.CLIENT_FAILED:
                error = result.error
            case _:
                return  # the client disconnected, or an answer that had begun was cut
        if error is not None and not exchange.head_sent and not exchange.gone:
            if self.wants_log:
                own += await self._log_headers(0.0)  # no End marker will come; what led to the failure may be there
            await exchange.fail(error, self.request_id, extra=own)
