"""One request and its answer, as a handler sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from agent.core.errors import HibernodeError
from agent.http.errors import ClientGoneError, error_answer
from agent.http.head_parser import serialise
from agent.http.message import Header, RequestHead
from agent.http.status_line import status_line
from agent.http.tcp_options import cork

_JOIN_BYTES = 16384  # up to here copying is cheaper than a gathering write
_NOTHING, _LENGTH, _CHUNKED, _UNTIL_CLOSE = range(4)  # how an answer's body is framed


class BodySink(Protocol):
    """Takes a request's body as it arrives, up to `body_end` or `body_failed`; neither comes if the client leaves."""

    def body_data(self, data: bytes) -> None: ...
    def body_end(self) -> None: ...
    def body_failed(self, error: HibernodeError) -> None: ...


class Streamer(Protocol):
    """Streams an answer at the client's pace."""

    def client_gone(self) -> None:
        """The client left before its answer was complete."""

    def client_writable(self, writable: bool) -> None:
        """The client's write buffer is full, or has room again."""


def bodyless(method: bytes, status: int) -> bool:
    """True if a response to `method` with `status` ends with its head, whatever its headers say (RFC 9112, 6.3)."""
    return method == b"HEAD" or status in (204, 304) or status < 200


class ClientConnection(Protocol):
    """The client's connection, as its exchange sees it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    writable: bool
    date_header: Callable[[], bytes]

    @property
    def closing(self) -> bool:
        """The server is closing: this answer is the connection's last."""

    def body_expected(self) -> None:
        """100 Continue was sent: the client owes its body from now on."""

    def pause_body(self) -> None: ...
    def resume_body(self) -> None: ...

    async def drained(self) -> None:
        """Returns once the client has taken enough of what was written, or is gone."""

    def answered(self, close: bool) -> None:
        """The answer is complete; `close`: no request follows it."""

    def abort(self, *, reset: bool = False) -> None:
        """Cuts the connection, by a reset if asked."""


class Exchange:
    """One request and its answer. Single use; a connection has one exchange at a time.

    A client that half-closes its connection counts as gone, as with nginx: it looks like one that leaves. While reading
    is paused (more than `Limits.buffer_bytes` of a body that no handler takes yet) a departure goes unnoticed.

    For handlers: `head`, `peer`, `gone`, `on_gone`, `buffer_body`, `answer`, `fail`. For streaming (see forward.py):
    `stream_body`, `pause_body`, `resume_body`, `begin`, `write`, `flush`, `finish`, `abort`, `attach`.
    """

    __slots__ = (
        "_body", "_body_waiter", "_buffered", "_close", "_connection", "_continued", "_corked", "_flushed",
        "_gone_callbacks", "_out", "_out_framing", "_sink", "_sink_full", "_streamer", "_want", "body_done",
        "body_error", "finished", "gone", "head", "head_sent", "peer",
    )  # fmt: skip

    def __init__(self, connection: ClientConnection, head: RequestHead, peer: str, want_bytes: int) -> None:
        self.head = head
        self.peer = peer  # the client's address, without port
        self.gone = False  # the client left; writes go nowhere
        self.head_sent = False  # an answer has begun; no other can be given
        self.finished = False  # the answer is complete
        self.body_done = False  # the request's last byte has arrived
        self.body_error: HibernodeError | None = None
        self._connection = connection
        self._corked = False
        self._body: list[bytes] = []
        self._buffered = 0
        self._want = want_bytes  # buffered bytes above which reading pauses
        self._sink: BodySink | None = None
        self._sink_full = False
        self._body_waiter: asyncio.Future[None] | None = None
        self._continued = not head.expect_continue
        self._gone_callbacks: list[Callable[[], None]] = []
        self._streamer: Streamer | None = None
        self._out: list[bytes] = []
        self._flushed = False
        self._out_framing = _NOTHING
        self._close = not head.keep_alive

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The connection's loop. Asking asyncio for the running loop would cost a system call (getpid)."""
        return self._connection.loop

    @property
    def writable(self) -> bool:
        """The client's write buffer has room."""
        return self._connection.writable

    # --- the client ------------------------------------------------------------------------

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once when the client leaves before its answer is complete; at once if it has left."""
        if self.gone:
            callback()
        else:
            self._gone_callbacks.append(callback)

    def off_gone(self, callback: Callable[[], None]) -> None:
        """Removes a callback of `on_gone`."""
        if callback in self._gone_callbacks:
            self._gone_callbacks.remove(callback)

    def send_continue(self) -> None:
        """Sends `100 Continue` if the client asked for it, has not got it, and no answer has begun."""
        if not self._continued and not self.head_sent and not self.gone:
            self._continued = True
            self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._uncork()
            self._connection.body_expected()

    def send_processing(self) -> None:
        """Sends `102 Processing`: the request is acted on from now on. Only for a gateway that asked for it.

        The message is with the kernel when this returns. The kernel sends it with the answer, after 0.2 s
        (`tcp_options.cork`), or when it closes the connection of a killed process; it matters only then. Sending it at
        once would delay the request and wake the gateway for nothing.
        """
        if not self.head_sent and not self.gone:
            self._corked = True
            cork(self._connection.transport, True)
            self._connection.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")

    # --- the request's body ----------------------------------------------------------------

    async def buffer_body(self, limit_bytes: int) -> bytes | None:
        """The whole body if it ends within `limit_bytes`, else None; `forward` then still streams all of it.

        Sends 100 Continue if asked. Raises HttpError 400 (bad framing), 408 (stalled), 413 (over the server's limit),
        ClientGoneError.
        """
        self.send_continue()
        self._want = max(self._want, limit_bytes)
        self._connection.resume_body()
        while not self.body_done and self._buffered <= limit_bytes:
            if self.body_error is not None:
                raise self.body_error
            if self.gone:
                raise ClientGoneError
            self._body_waiter = self._connection.loop.create_future()
            try:
                await self._body_waiter
            finally:
                self._body_waiter = None
        if self._buffered > limit_bytes:
            return None
        self._body = [b"".join(self._body)]
        return self._body[0]

    def stream_body(self, sink: BodySink | None) -> None:
        """Passes what has arrived to `sink`, then all further input as it comes; None: buffers it again. After a
        `pause_body` of the sink one more socket read may follow."""
        self._sink = sink
        self._sink_full = False
        if sink is None:
            return
        pieces, self._body, self._buffered = self._body, [], 0
        for piece in pieces:
            if piece:
                sink.body_data(piece)
        if self.body_error is not None:
            sink.body_failed(self.body_error)
        elif self.body_done:
            sink.body_end()
        elif not self._sink_full:
            self._connection.resume_body()

    def pause_body(self) -> None:
        """The sink is full: stops reading from the client."""
        self._sink_full = True
        if not self.body_done:
            self._connection.pause_body()

    def resume_body(self) -> None:
        """The sink has room again."""
        self._sink_full = False
        if not self.body_done:
            self._connection.resume_body()

    # --- the answer ------------------------------------------------------------------------

    async def answer(self, status: int, headers: list[Header], body: bytes = b"", *, close: bool = False) -> None:
        """Answers with a complete body; adds `content-length` where HTTP allows it.

        Waits for a slow client only while its write buffer is over the limit. Does nothing if the client is gone. If
        the request's body is incomplete, the connection closes afterwards, and the answer says so. Raises RuntimeError
        if an answer has begun, ValueError for CR or LF in a header.
        """
        if self.gone:
            return
        if close or not self.body_done:
            self._close = True
        self.begin(status, None, headers, len(body))
        if self._out_framing == _LENGTH and body:
            self._out.append(body)
        self.finish()
        await self._connection.drained()

    async def fail(self, error: BaseException, request_id: str, *, extra: list[Header] | None = None) -> None:
        """Answers with `errors.error_answer` and `extra` headers; cuts the connection if an answer has begun."""
        if self.head_sent:
            if not self.finished:
                self.abort()
            return
        made = error_answer(error, request_id)
        await self.answer(made.status, made.headers + (extra or []), made.body)

    def begin(self, status: int, reason: bytes | None, headers: list[Header], length: int | None) -> None:
        """Begins an answer whose body of `length` bytes (None: unknown) is added by `write`. Sends nothing yet.

        Chooses the framing: length, else chunks, else (HTTP/1.0) until close. `headers` have none.
        """
        if self.head_sent:
            raise RuntimeError("an answer has begun already")
        if not self._continued and not self.body_done:
            self._close = True  # whether the client still sends its body is unknown
        framing = self._connection.date_header()
        if bodyless(self.head.method, status):
            if length is not None and status != 204 and status >= 200:
                framing += b"content-length: %d\r\n" % length
        elif length is not None:
            self._out_framing = _LENGTH
            framing += b"content-length: %d\r\n" % length
        elif self.head.http10:
            self._out_framing = _UNTIL_CLOSE
            self._close = True
        else:
            self._out_framing = _CHUNKED
            framing += b"transfer-encoding: chunked\r\n"
        if self._connection.closing:
            self._close = True
        if self._close:
            framing += b"connection: close\r\n"
        line = status_line(status) if reason is None else b"HTTP/1.1 %d %b\r\n" % (status, reason)
        self._out.append(serialise(line, headers, framing))
        self.head_sent = True

    def write(self, data: bytes) -> None:
        """Adds body bytes; they leave with the next `flush` or `finish`."""
        if self._out_framing == _CHUNKED:
            self._out += (b"%x\r\n" % len(data), data, b"\r\n")
        elif self._out_framing != _NOTHING:
            self._out.append(data)

    def flush(self) -> None:
        """Passes everything pending to the transport in one call."""
        out = self._out
        if out:
            self._flushed = True
            if not self.gone:
                if len(out) > 1 and sum(map(len, out)) > _JOIN_BYTES:
                    self._connection.transport.writelines(out)
                else:
                    self._connection.transport.write(b"".join(out))
                self._uncork()
            self._out = []

    def _uncork(self) -> None:
        if self._corked:
            self._corked = False
            cork(self._connection.transport, False)

    def finish(self) -> None:
        """The answer is complete: flushes it and lets the connection take its next request."""
        if self._out_framing == _CHUNKED:
            self._out.append(b"0\r\n\r\n")
        self.flush()
        self.finished = True
        self._connection.answered(self._close)

    def abort(self) -> None:
        """Cuts the connection, so that the client does not take half an answer for a whole one. A body that only the
        close would have ended (HTTP/1.0) is cut by a reset."""
        self._out = []
        self._connection.abort(reset=self._out_framing == _UNTIL_CLOSE)

    def withdraw(self) -> bool:
        """Takes back an answer of which nothing has been flushed, so that another can be given; False if too late."""
        if self._flushed:
            return False
        self._out = []
        self._out_framing = _NOTHING
        self.head_sent = False
        return True

    def attach(self, streamer: Streamer | None) -> None:
        """Reports the client's pace and departure to `streamer` from now on; None ends that."""
        self._streamer = streamer
        if streamer is not None:
            if self.gone:
                streamer.client_gone()
            elif not self._connection.writable:
                streamer.client_writable(False)

    # --- called by the connection ----------------------------------------------------------

    def set_body(self, body: bytes) -> None:
        """The whole body, which came with its head."""
        if body:
            self._body.append(body)
            self._buffered = len(body)
        self.body_done = True

    def body_arrived(self, pieces: list[bytes]) -> None:
        """More of the body, decoded. The chunks of one read are joined: a client that sends one-byte chunks must not
        cause one-byte writes, nor fill memory with small objects."""
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        sink = self._sink
        if sink is not None:
            if data:
                sink.body_data(data)
            return
        if data:
            self._body.append(data)
            self._buffered += len(data)
        if self._buffered > self._want:
            self._connection.pause_body()
        self._wake_reader()

    def body_ended(self) -> None:
        """The body is complete."""
        self.body_done = True
        if self._sink is not None:
            self._sink.body_end()
        self._wake_reader()

    def body_failed(self, error: HibernodeError) -> None:
        """The rest of the body cannot be read; the connection serves no other request."""
        self.body_error = error
        self._close = True
        if self._sink is not None:
            self._sink.body_failed(error)
        self._wake_reader()

    def writable_changed(self, writable: bool) -> None:
        if self._streamer is not None:
            self._streamer.client_writable(writable)

    def lost(self) -> None:
        """The connection was lost before the answer was complete."""
        self.gone = True
        self._wake_reader()
        if self._streamer is not None:
            self._streamer.client_gone()
        callbacks, self._gone_callbacks = self._gone_callbacks, []
        for callback in callbacks:
            callback()

    def _wake_reader(self) -> None:
        if self._body_waiter is not None and not self._body_waiter.done():
            self._body_waiter.set_result(None)


Handler = Callable[[Exchange], Awaitable[None] | None]
"""Answers an exchange. A coroutine function runs in a task of its own. A plain function that returns None has taken the
exchange over and answers it by callbacks, at once or later (see `forward.forward_now`), which is faster."""
