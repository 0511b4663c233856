"""Callbacks between a client's connection and an upstream's while `forward` streams one exchange.

A `Relay` is the sink of both: BodySink of the client's exchange, ResponseSink of the upstream's connection. It buffers
nothing and starts no task: what arrives on one side is written to the other within the same callback. When one side's
write buffer is full, the relay pauses reading on the other side.

The relay owns the upstream connection until the answer's last byte has arrived (`_upstream_done`), and hands it back
before it forwards that byte, so that a waiting request can use connection and slot at once. Timeouts belong to the two
connections, which report them here. Every path ends in `_end`, which calls `on_done` exactly once.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from agent.core.errors import HibernodeError
from agent.http.errors import UpstreamBrokenError, UpstreamTimeoutError
from agent.http.exchange import Exchange
from agent.http.message import Header, ResponseHead
from agent.http.pool import Pool
from agent.http.upstream import BROKEN, UpstreamConnection


class RelayOutcome(enum.Enum):
    """How a forwarded exchange ended. The client's answer has begun in COMPLETE (without a `fault`) and both MID_BODY
    outcomes, may have begun in CLIENT_GONE and CLIENT_FAILED, and has not begun in the others."""

    COMPLETE = "complete"
    HELD = "held"  # `response_filter` returned None; nothing was sent to the client
    CLIENT_GONE = "client_gone"
    CLIENT_FAILED = "client_failed"  # the request's body was bad, too large or too slow; see `error`
    CONNECT_FAILED = "connect_failed"  # nothing was sent, so the request may go elsewhere
    UPSTREAM_FAILED_BEFORE_HEAD = "upstream_failed_before_head"
    UPSTREAM_FAILED_MID_BODY = "upstream_failed_mid_body"  # the client's connection was cut
    TIMEOUT_BEFORE_HEAD = "timeout_before_head"
    TIMEOUT_MID_BODY = "timeout_mid_body"  # the client's connection was cut


@dataclass(slots=True)
class ForwardResult:
    """What happened. The caller still owes an answer unless `exchange.head_sent` or `exchange.gone`."""

    outcome: RelayOutcome
    head: ResponseHead | None  # the upstream's final head, if it came
    error: HibernodeError | None  # what went wrong, for the answer (`exchange.fail`) and the log
    request_body_bytes: int
    response_body_bytes: int
    fault: Exception | None = None  # what the response filter or the deferred headers raised
    # The upstream closed the connection in order and had sent neither 100 nor 102: if it is an ingress that was asked
    # for a start notice, no byte reached an instance.
    not_started: bool = False

    @property
    def head_status(self) -> int | None:
        return None if self.head is None else self.head.status


ResponseFilter = Callable[[ResponseHead], list[Header] | None]
Hook = Callable[[], None]
Done = Callable[[ForwardResult], None]


class Relay:
    """One exchange in both directions. Made and started by `forward_now`."""

    __slots__ = (
        "_closed_in_order", "_connection", "_exchange", "_filter", "_held", "_on_done", "_on_last_byte",
        "_released", "_source", "_started", "_streams", "_unsent_body", "_waits_for_continue", "ended",
        "error", "head", "request_body_bytes", "response_body_bytes",
    )  # fmt: skip

    def __init__(
        self,
        exchange: Exchange,
        source: Pool,
        connection: UpstreamConnection,
        response_filter: ResponseFilter,
        on_done: Done,
        on_last_byte: Hook | None,
    ) -> None:
        self.head: ResponseHead | None = None
        self.error: HibernodeError | None = None
        self.request_body_bytes = 0
        self.response_body_bytes = 0
        self._exchange = exchange
        self._source = source
        self._connection = connection
        self._filter = response_filter
        self._on_done = on_done
        self._on_last_byte = on_last_byte
        self._unsent_body: bytes | None = None
        self._waits_for_continue = False
        self._streams = False  # the exchange's body comes through this relay
        self._held = False
        self._started = False  # the upstream sent 100 or 102
        self._closed_in_order = False
        self._released = False  # the connection is back in its pool
        self.ended = False

    # --- the request -----------------------------------------------------------------------

    def send(self, message: bytes, body: bytes | None, has_body: bool, expect: bool) -> None:
        """Writes the head, and as much of the body as may go now."""
        connection = self._connection
        if not has_body:
            connection.write(message)
            connection.request_done = True
            return
        self._unsent_body = body
        if expect:
            self._waits_for_continue = True
            connection.write(message)
        elif body is not None:
            connection.writelines((message, body))
            self._sent_whole(len(body))
        else:
            connection.write(message)
            self._stream()

    def _stream(self) -> None:
        self._streams = True
        self._exchange.send_continue()
        self._exchange.stream_body(self)

    def _sent_whole(self, size: int) -> None:
        self.request_body_bytes = size
        self._connection.request_done = True

    def body_data(self, data: bytes) -> None:
        if self.ended:
            return
        self.request_body_bytes += len(data)
        if self._exchange.head.chunked:
            self._connection.writelines((b"%x\r\n" % len(data), data, b"\r\n"))
        else:
            self._connection.write(data)

    def body_end(self) -> None:
        if self.ended:
            return
        if self._exchange.head.chunked:
            self._connection.write(b"0\r\n\r\n")
        self._connection.request_done = True

    def body_failed(self, error: HibernodeError) -> None:
        self.error = error
        self._break_off(RelayOutcome.CLIENT_FAILED)

    def upstream_writable(self, writable: bool) -> None:
        if not self._streams:
            return
        if writable:
            self._exchange.resume_body()
        else:
            self._exchange.pause_body()

    # --- the response ----------------------------------------------------------------------

    def response_processing(self) -> None:
        self._started = True

    def response_continue(self) -> None:
        self._started = True
        if not self._waits_for_continue:
            return
        self._waits_for_continue = False
        body = self._unsent_body
        if body is None:
            self._stream()
        else:
            self._connection.write(body)
            self._sent_whole(len(body))

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        self._upstream_done()
        self.response_head(head)
        if not self.ended:
            self.response_data(body)
            self.response_end()

    def response_head(self, head: ResponseHead) -> None:
        self.head = head
        exchange = self._exchange
        try:
            headers = self._filter(head)
            if headers is None:
                self._held = True
                return
            known = head.length if not head.chunked else None
            exchange.begin(head.status, head.reason, headers, known)
        except Exception as fault:
            self._end(RelayOutcome.COMPLETE, fault)

    def response_data(self, data: bytes) -> None:
        self.response_body_bytes += len(data)
        if not self._held:
            self._exchange.write(data)

    def response_flush(self) -> None:
        if self._held:
            self._end(RelayOutcome.HELD)  # the rest of a held answer is not needed
        else:
            self._exchange.flush()

    def response_end(self) -> None:
        self._upstream_done()
        if self._held:
            self._end(RelayOutcome.HELD)
            return
        if self._streams:
            self._exchange.stream_body(None)
        self._exchange.finish()
        self._end(RelayOutcome.COMPLETE)

    def upstream_failed(self, what: str, in_order: bool = False, reason: str = BROKEN) -> None:
        self._closed_in_order = in_order
        where = f"{self._source.host}:{self._source.port}"
        self.error = UpstreamBrokenError(reason, f"{where} {what}.")
        before_head = not self._exchange.head_sent or self._exchange.withdraw()
        self._break_off(
            RelayOutcome.UPSTREAM_FAILED_BEFORE_HEAD if before_head else RelayOutcome.UPSTREAM_FAILED_MID_BODY
        )

    def upstream_timed_out(self) -> None:
        where = f"{self._source.host}:{self._source.port}"
        self.error = UpstreamTimeoutError("UPSTREAM_TIMEOUT", f"{where} did not answer in time.")
        before_head = not self._exchange.head_sent or self._exchange.withdraw()
        self._break_off(RelayOutcome.TIMEOUT_BEFORE_HEAD if before_head else RelayOutcome.TIMEOUT_MID_BODY)

    # --- the client ------------------------------------------------------------------------

    def client_gone(self) -> None:
        self._break_off(RelayOutcome.CLIENT_GONE)

    def client_writable(self, writable: bool) -> None:
        if self._released:
            return
        if writable:
            self._connection.resume()
        else:
            self._connection.pause()

    # --- the end ---------------------------------------------------------------------------

    def cancel(self) -> None:
        """The caller was cancelled, or failed: cuts the upstream, and the client if its answer has begun."""
        self._break_off(RelayOutcome.CLIENT_GONE)

    def _break_off(self, outcome: RelayOutcome) -> None:
        """Ends without a complete answer: cuts the upstream, and the client if its answer has begun."""
        if self.ended:
            return
        if not self._released:
            self._connection.abort()
        if self._exchange.head_sent and not self._exchange.gone:
            self._exchange.abort()
        self._end(outcome)

    def _upstream_done(self) -> None:
        """Returns the connection to its pool; a waiting request may take it at once."""
        if not self._released:
            self._released = True
            self._source.release(self._connection)
        hook, self._on_last_byte = self._on_last_byte, None
        if hook is not None:
            hook()

    def _end(self, outcome: RelayOutcome, fault: Exception | None = None) -> None:
        """Detaches both sides and calls `on_done`, once. The pool closes a connection that did not end cleanly."""
        if self.ended:
            return
        self.ended = True
        exchange = self._exchange
        exchange.attach(None)
        if self._streams:
            exchange.stream_body(None)
        self._upstream_done()
        result = ForwardResult(outcome, self.head, self.error, self.request_body_bytes, self.response_body_bytes)
        result.fault, result.not_started = fault, self._closed_in_order and not self._started
        self._on_done(result)
