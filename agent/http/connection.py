"""A client's connection: one request after another, keep-alive, timeouts, back-pressure both ways.

States: HEAD -> (BODY ->) BUSY -> HEAD, once per request; DISCARD and CLOSED end the connection. If an answer is
complete before its request's body, the connection closes. The next head is parsed when answer and handler are both
done; bytes that arrive earlier are buffered up to `buffer_bytes`, then reading pauses.

Timers: `_read_deadline` covers head, body, keep-alive and lingering, `_write_deadline` an answer that the client does
not take. `deadline` is the earlier of the two; the server's `DeadlineTimer` watches it and calls `expire`.

Back-pressure: a full write buffer (`pause_writing`) stops the parser here and, through the exchange, the upstream. A
full sink (`pause_body`) stops reading from this client, and its read deadline.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, cast

from agent.core.errors import HibernodeError
from agent.http.body_parser import ChunkedBody, LengthBody
from agent.http.deadlines import NEVER, DeadlineTimer
from agent.http.errors import HttpError, body_too_large, error_answer, too_many_connections, too_slow
from agent.http.exchange import Exchange, Handler
from agent.http.head_parser import HEAD_END, check_partial, parse_request_head, serialise
from agent.http.limits import Limits
from agent.http.message import Header, RequestHead
from agent.http.status_line import status_line

# HEAD: idle, or within a head. BODY: within a body. BUSY: the request is complete, its answer is not.
# DISCARD: input is thrown away (the body was bad, or the connection lingers before it closes).
_HEAD, _BODY, _BUSY, _DISCARD, _CLOSED = range(5)


async def _raise(error: Exception) -> None:
    raise error


class ConnectionHost(Protocol):
    """The server of a connection, as the connection sees it."""

    limits: Limits
    handler: Handler
    request_ids: Callable[[], str]
    on_fault: Callable[[BaseException, str], None]
    date_header: Callable[[], bytes]
    when_full: Sequence[Header]
    closing: bool
    connections: set[ServerConnection]
    deadlines: DeadlineTimer

    def forget(self, connection: ServerConnection) -> None:
        """`connection` is closed."""


class ServerConnection(asyncio.Protocol):
    """One client. Its callers are the event loop, its server and its current exchange."""

    __slots__ = (
        "_answer_done", "_buffer", "_close_after", "_decoder", "_drain_waiter", "_exchange", "_handler_done",
        "_head_begun", "_host", "_last_unsent", "_lingering", "_paused", "_peer", "_read_deadline", "_state",
        "_task", "_write_deadline", "date_header", "deadline", "loop", "transport", "writable",
    )  # fmt: skip

    transport: asyncio.Transport

    def __init__(self, host: ConnectionHost, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.writable = True
        self.deadline = NEVER
        self.date_header = host.date_header
        self._host = host
        self._state = _HEAD
        self._buffer = b""
        self._head_begun = False
        self._exchange: Exchange | None = None
        self._decoder: LengthBody | ChunkedBody | None = None
        self._task: asyncio.Task[None] | None = None
        self._answer_done = False
        self._handler_done = False
        self._close_after = False
        self._lingering = False
        self._paused = False
        self._peer = ""
        self._read_deadline = NEVER
        self._write_deadline = NEVER
        self._last_unsent = 0
        self._drain_waiter: asyncio.Future[None] | None = None

    @property
    def closing(self) -> bool:
        return self._host.closing

    @property
    def idle(self) -> bool:
        """No request is being served, though the head of one may have begun to arrive."""
        return self._state == _HEAD

    # --- called by the transport ------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if peer else ""
        host = self._host
        self.transport.set_write_buffer_limits(high=host.limits.write_buffer_bytes)
        full = len(host.connections) >= host.limits.max_connections
        host.connections.add(self)
        if full:
            self._refuse(too_many_connections(), 1, host.when_full)
        else:
            self._expect_input(host.limits.keep_alive_s)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == _HEAD and self.writable:
            self._feed_head(self._buffer + data if self._buffer else data)
        elif state == _BODY:
            self._feed_body(data, 0)
        elif state in (_HEAD, _BUSY):
            self._buffer_next(data)

    def eof_received(self) -> bool:
        return False  # closes the transport, which ends in connection_lost

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _CLOSED
        self.deadline = NEVER
        self._host.forget(self)
        self._release_drain()
        exchange = self._exchange
        if exchange is not None and not exchange.finished:
            exchange.lost()

    def pause_writing(self) -> None:
        self.writable = False
        self._last_unsent = self.transport.get_write_buffer_size()
        self._write_deadline = self.loop.time() + self._host.limits.write_stall_s
        self._update_deadline()
        if self._exchange is not None:
            self._exchange.writable_changed(False)

    def resume_writing(self) -> None:
        self.writable = True
        self._write_deadline = NEVER
        self.deadline = self._read_deadline
        self._release_drain()
        if self._exchange is not None:
            self._exchange.writable_changed(True)
        elif self._buffer:
            self.loop.call_soon(self._feed_buffered)

    # --- reading ---------------------------------------------------------------------------

    def _feed_head(self, data: bytes) -> None:
        limits = self._host.limits
        end = data.find(HEAD_END)
        try:
            if end < 0:
                check_partial(data, limits.header_bytes, limits.target_bytes)
                self._buffer = data
                if not self._head_begun:
                    self._head_begun = True
                    self._expect_input(limits.header_timeout_s)
                return
            head = parse_request_head(data[:end], limits.header_bytes, limits.target_bytes)
            if head.length is not None and head.length > limits.body_bytes:
                raise body_too_large(limits.body_bytes)
        except HttpError as error:
            self._refuse(error)
            return
        self._buffer = b""
        self._head_begun = False
        self._answer_done = self._handler_done = False
        self._exchange = exchange = Exchange(self, head, self._peer, limits.buffer_bytes)
        end += 4
        if not head.chunked and (head.length or 0) == len(data) - end:
            # The usual case: this read holds one complete request and nothing else.
            self._state = _BUSY
            self.deadline = self._read_deadline = NEVER
            exchange.set_body(data[end:] if head.length else b"")
        else:
            self._feed_rest(exchange, head, data, end)
        self._call_handler(exchange)

    def _feed_rest(self, exchange: Exchange, head: RequestHead, data: bytes, end: int) -> None:
        """Takes what follows a head: part of the body, or more than the body."""
        if not head.chunked and not head.length:
            self._state = _BUSY
            exchange.body_done = True
            self._expect_input(NEVER)
            self._buffer_next(data[end:])
            return
        self._state = _BODY
        self._decoder = ChunkedBody(self._host.limits.body_bytes) if head.chunked else LengthBody(head.length or 0)
        # With Expect the client waits for 100 Continue, however long that takes.
        self._expect_input(NEVER if head.expect_continue else self._host.limits.body_stall_s)
        if end < len(data):
            self._feed_body(data, end)

    def _call_handler(self, exchange: Exchange) -> None:
        """Calls the handler; a coroutine gets a task, a plain function answers by callbacks."""
        try:
            serving = self._host.handler(exchange)
        except Exception as error:
            serving = _raise(error)
        if serving is not None:
            self._task = self.loop.create_task(self._serve(exchange, serving))
            return
        self._handler_done = True
        if self._answer_done:
            self._next_request()

    def _feed_body(self, data: bytes, start: int) -> None:
        exchange, decoder = self._exchange, self._decoder
        assert exchange is not None
        assert decoder is not None
        pieces: list[bytes] = []
        try:
            end = decoder.feed(data, start, pieces)
        except HttpError as error:
            self._discard_input()
            exchange.body_failed(error)
            return
        if not decoder.done:
            self._expect_input(self._host.limits.body_stall_s)
            exchange.body_arrived(pieces)
            return
        # The state changes first: a sink may finish the exchange from inside these calls.
        self._state = _BUSY
        self._expect_input(NEVER)
        if end < len(data):
            self._buffer_next(data[end:])
        exchange.body_done = True
        exchange.body_arrived(pieces)
        exchange.body_ended()
        self._resume_reading()

    def _buffer_next(self, data: bytes) -> None:
        """Keeps bytes that follow the request being served: the beginning of the next one."""
        self._buffer += data
        if len(self._buffer) > self._host.limits.buffer_bytes:
            self._pause_reading()

    def body_expected(self) -> None:
        """100 Continue was sent: the client owes its body from now on."""
        if self._state == _BODY:
            self._expect_input(self._host.limits.body_stall_s)

    def pause_body(self) -> None:
        if self._state == _BODY:
            self._pause_reading()
            self._expect_input(NEVER)  # the client cannot send while reading is paused

    def resume_body(self) -> None:
        if self._state == _BODY and self._paused:
            self._resume_reading()
            self._expect_input(self._host.limits.body_stall_s)

    def _pause_reading(self) -> None:
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._paused and len(self._buffer) <= self._host.limits.buffer_bytes:
            self._paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def _discard_input(self) -> None:
        """Drops further input, so that the client is not reset before it has read its answer."""
        self._state = _DISCARD
        self._buffer = b""
        self._expect_input(NEVER)
        self._resume_reading()

    # --- serving ---------------------------------------------------------------------------

    async def _serve(self, exchange: Exchange, serving: Awaitable[None]) -> None:
        host = self._host
        try:
            await serving
            if not exchange.finished and not exchange.gone:
                raise RuntimeError("the handler returned before its answer was complete")
        except HibernodeError as error:
            await exchange.fail(error, host.request_ids())
        except Exception as error:
            request_id = host.request_ids()
            host.on_fault(error, request_id)
            await exchange.fail(error, request_id)
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._task = None
            self._handler_done = True
            if self._answer_done:
                self._next_request()

    def answered(self, close: bool) -> None:
        """The exchange's answer is complete; `close`: no request follows it."""
        self._close_after = close
        self._answer_done = True
        if self._handler_done:
            self._next_request()

    def _next_request(self) -> None:
        """Answer and handler are done: takes the next request, or ends the connection."""
        exchange, self._exchange = self._exchange, None
        self._decoder = None
        if self._state == _CLOSED or exchange is None:
            return
        if not exchange.body_done or (self._buffer and self._close_after):
            self._linger()
            return
        if self._close_after or self.closing:
            self.close()
            return
        self._state = _HEAD
        self._expect_input(self._host.limits.keep_alive_s)
        if self._buffer:
            # In a loop iteration of its own: immediate answers to a pipeline would recurse otherwise.
            self.loop.call_soon(self._feed_buffered)

    def _feed_buffered(self) -> None:
        """Parses pipelined bytes, unless the client does not take the answers that it already has."""
        if self._state == _HEAD and self.writable and self._buffer:
            data, self._buffer = self._buffer, b""
            self._feed_head(data)
        self._resume_reading()

    async def drained(self) -> None:
        """Returns once the client has taken enough of what was written, or is gone."""
        if self.writable or self._state == _CLOSED:
            return
        if self._drain_waiter is None:
            self._drain_waiter = self.loop.create_future()
        await asyncio.shield(self._drain_waiter)

    def _release_drain(self) -> None:
        if self._drain_waiter is not None and not self._drain_waiter.done():
            self._drain_waiter.set_result(None)
        self._drain_waiter = None

    def _refuse(self, error: HibernodeError, retry_after_s: int | None = None, extra: Sequence[Header] = ()) -> None:
        """Answers a request that never became an exchange, and closes."""
        made = error_answer(error, self._host.request_ids(), retry_after_s=retry_after_s)
        line = status_line(made.status)
        framing = b"%bcontent-length: %d\r\nconnection: close\r\n" % (self.date_header(), len(made.body))
        self.transport.write(serialise(line, [*made.headers, *extra], framing) + made.body)
        self._linger()

    # --- the end ---------------------------------------------------------------------------

    def _linger(self) -> None:
        """Half-closes, and discards input for up to `linger_s`: closing at once would reset the connection, and the
        client might never see its answer."""
        self._discard_input()
        if not self.transport.is_closing():
            self.transport.write_eof()
        self._wait_for_peer()

    def close(self) -> None:
        """Closes once what was written has been sent, or the client has taken nothing of it for too long."""
        self._state = _DISCARD
        self._wait_for_peer()
        self.transport.close()

    def _wait_for_peer(self) -> None:
        self._lingering = True
        self._last_unsent = self.transport.get_write_buffer_size()
        self._expect_input(self._host.limits.linger_s)

    def abort(self, *, reset: bool = False) -> None:
        """Cuts the connection now, by a reset if asked."""
        if reset and not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def cancel(self) -> None:
        """Cuts the connection and cancels its handler: the server's grace period is over."""
        if self._task is not None:
            self._task.cancel()
        self.abort()

    # --- timeouts --------------------------------------------------------------------------

    def _expect_input(self, seconds: float) -> None:
        self._read_deadline = self.loop.time() + seconds if seconds != NEVER else NEVER
        self._update_deadline()

    def _update_deadline(self) -> None:
        self.deadline = deadline = min(self._read_deadline, self._write_deadline)
        if deadline != NEVER:
            self._host.deadlines.schedule(deadline)

    def expire(self, now: float) -> None:
        """A deadline passed. Called by the `DeadlineTimer`."""
        limits = self._host.limits
        if now >= self._write_deadline or (self._lingering and self.transport.get_write_buffer_size()):
            self._write_stalled(now)
        elif self._state == _HEAD and self._head_begun:
            self._refuse(too_slow("The head of the request", limits.header_timeout_s))
        elif self._state == _BODY and self._exchange is not None:
            self._discard_input()
            self._exchange.body_failed(too_slow("The next part of the body", limits.body_stall_s))
        elif self._state == _HEAD:
            self.close()
        else:
            self.abort()

    def _write_stalled(self, now: float) -> None:
        """Aborts unless the client has taken something since the last check; a slow client is allowed."""
        before, self._last_unsent = self._last_unsent, self.transport.get_write_buffer_size()
        if self._last_unsent >= before:
            self.abort()
            return
        stall_s = self._host.limits.write_stall_s
        if self._write_deadline != NEVER:
            self._write_deadline = now + stall_s
        if self._read_deadline <= now:
            self._read_deadline = now + stall_s
        self._update_deadline()
