"""A connection to an upstream: an instance, or an ingress."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from agent.http import tcp_options
from agent.http.body_parser import BodyDecoder, ChunkedBody, CloseBody, LengthBody
from agent.http.deadlines import NEVER, DeadlineTimer
from agent.http.errors import HttpError
from agent.http.exchange import bodyless
from agent.http.head_parser import HEAD_END, parse_response_head
from agent.http.limits import UpstreamLimits
from agent.http.message import ResponseHead

# IDLE: in the pool. HEAD, BODY: within a response. DONE: the response is complete, the connection not yet released.
_IDLE, _HEAD, _BODY, _DONE, _CLOSED = range(5)
BROKEN, NOT_HTTP = "UPSTREAM_BROKEN", "UPSTREAM_NOT_HTTP"
_MAX_INTERIM = 16  # 1xx responses before a final one


class ResponseSink(Protocol):
    """Takes a response as it arrives. The last call is exactly one of `response_whole`, `response_end`,
    `upstream_failed` and `upstream_timed_out`."""

    def response_continue(self) -> None:
        """100 Continue. 1xx other than 100 and 102 are dropped."""

    def response_processing(self) -> None:
        """102 Processing: the request is being acted on from now on."""

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        """Head and body came in one read; the connection may be released at once. No other call follows."""

    def response_head(self, head: ResponseHead) -> None:
        """The final head."""

    def response_data(self, data: bytes) -> None:
        """Bytes of the body."""

    def response_flush(self) -> None:
        """One socket read has been passed on, and the response goes on. Not called after `response_end`."""

    def response_end(self) -> None:
        """The body is complete."""

    def upstream_failed(self, what: str, in_order: bool = False, reason: str = BROKEN) -> None:
        """The connection broke before the response was complete, or the response is not HTTP/1.1 (`reason` NOT_HTTP).
        `in_order`: the other side closed it, and everything that it sent has been read."""

    def upstream_timed_out(self) -> None:
        """The deadline passed; the connection is closed."""

    def upstream_writable(self, writable: bool) -> None:
        """The connection's write buffer is full, or has room again."""


class ConnectionOwner(Protocol):
    """The pool of a connection, as the connection sees it."""

    limits: UpstreamLimits
    generation: int
    connections: set[UpstreamConnection]
    deadlines: DeadlineTimer

    def forget(self, connection: UpstreamConnection) -> None:
        """`connection` is closed."""


class UpstreamConnection(asyncio.Protocol):
    """One keep-alive connection; belongs to one sink between `start` and `Pool.release`."""

    __slots__ = (
        "_buffer", "_decoder", "_interim", "_loop", "_method", "_owner", "_paused", "_reusable",
        "_silence_allowed", "_sink", "_state", "deadline", "generation", "request_done", "transport",
        "writable",
    )  # fmt: skip

    transport: asyncio.Transport

    def __init__(self, owner: ConnectionOwner, loop: asyncio.AbstractEventLoop) -> None:
        self.deadline = NEVER
        self.generation = owner.generation
        self.request_done = True  # the whole request is written; set by its writer
        self.writable = True
        self._owner = owner
        self._loop = loop
        self._sink: ResponseSink | None = None
        self._method = b""
        self._state = _IDLE
        self._buffer = b""
        self._decoder: BodyDecoder | None = None
        self._interim = 0
        self._reusable = True
        self._paused = False
        self._silence_allowed = False

    # --- called by the owner ---------------------------------------------------------------

    def start(self, sink: ResponseSink, method: bytes, deadline: float) -> None:
        """Begins an exchange. `method` decides whether the response has a body; the connection is closed at `deadline`
        (loop time)."""
        self._sink = sink
        self._method = method
        self._state = _HEAD
        self._interim = 0
        self.request_done = False
        self.deadline = deadline
        self._owner.deadlines.schedule(deadline)

    def allow_silence(self) -> None:
        """Lifts `silence_s` for this exchange. It streams a body, which the other side may leave unread for as long as
        it likes, and to the kernel a full window is silence (tcp(7), TCP_USER_TIMEOUT)."""
        if self._owner.limits.silence_s and not self._silence_allowed:
            self._silence_allowed = True
            tcp_options.bound_silence(self.transport, 0)

    def write(self, data: bytes) -> None:
        """Writes bytes of the request; nothing once the connection is closed."""
        if self._state != _CLOSED:
            self.transport.write(data)

    def writelines(self, data: tuple[bytes, ...]) -> None:
        """Writes pieces of the request in one call."""
        if self._state != _CLOSED:
            self.transport.writelines(data)

    def pause(self) -> None:
        """The sink is full: stops reading."""
        if not self._paused and self._state != _CLOSED and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """The sink has room again."""
        if self._paused:
            self._paused = False
            if self._state != _CLOSED and not self.transport.is_closing():
                self.transport.resume_reading()

    def abort(self) -> None:
        """Closes the connection now, without a further call to its sink."""
        self._sink = None
        if self._state != _CLOSED:
            self._state = _CLOSED
            self.deadline = NEVER
            self.transport.abort()

    def cut(self) -> ResponseSink | None:
        """As `abort`; returns the sink that still waited for an answer, for the caller to notify."""
        sink = self._sink if self._state in (_HEAD, _BODY) else None
        self.abort()
        return sink

    def make_idle(self, deadline: float) -> bool:
        """Makes the connection idle until `deadline`; False if it cannot serve again."""
        self._sink = None
        if self._state not in (_IDLE, _DONE) or not (self._reusable and self.request_done and self.writable):
            return False
        if self.transport.is_closing():
            return False
        self._state = _IDLE
        self.resume()
        if self._silence_allowed:
            self._silence_allowed = False
            tcp_options.bound_silence(self.transport, self._owner.limits.silence_s)
        self.deadline = deadline
        self._owner.deadlines.schedule(deadline)
        return True

    @property
    def usable(self) -> bool:
        """Idle, and not known to be closed by the other side."""
        return self._state == _IDLE and not self.transport.is_closing()

    # --- called by the transport -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=self._owner.limits.write_buffer_bytes)
        tcp_options.watch_peer(self.transport, self._owner.limits.silence_s)
        self._owner.connections.add(self)
        # Closes the connection should its connecting task be cancelled right now.
        self.deadline = self._loop.time() + self._owner.limits.idle_s
        self._owner.deadlines.schedule(self.deadline)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == _HEAD:
            self._feed_head(self._buffer + data if self._buffer else data)
        elif state == _BODY:
            self._feed_body(data, 0)
        elif state == _DONE:
            self._reusable = False  # bytes after a complete response belong to no request
        else:
            self.abort()  # bytes on an idle connection: unasked, or the last words of a server that closes it

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        state, sink = self._state, self._sink
        self._state = _CLOSED
        self._sink = None
        self.deadline = NEVER
        self._owner.forget(self)
        if sink is None or state in (_IDLE, _DONE, _CLOSED):
            return
        if state == _BODY and exc is None and isinstance(self._decoder, CloseBody):
            sink.response_end()
        elif state == _BODY:
            sink.upstream_failed("closed the connection before its answer was whole")
        elif exc is not None:
            sink.upstream_failed(f"broke the connection before it answered ({type(exc).__name__})")
        else:
            sink.upstream_failed("closed the connection without an answer", in_order=True)

    def pause_writing(self) -> None:
        self.writable = False
        if self._sink is not None:
            self._sink.upstream_writable(False)

    def resume_writing(self) -> None:
        self.writable = True
        if self._sink is not None:
            self._sink.upstream_writable(True)

    def expire(self, now: float) -> None:
        """The deadline passed: idle for too long, or an answer too late. Called by the `DeadlineTimer`."""
        sink = self.cut()
        if sink is not None:
            sink.upstream_timed_out()

    # --- reading ---------------------------------------------------------------------------

    def _feed_head(self, data: bytes) -> None:
        sink = self._sink
        assert sink is not None
        start = 0
        while True:
            end = data.find(HEAD_END, start)
            if end < 0:
                self._keep_partial(data[start:] if start else data)
                return
            if end - start > self._owner.limits.header_bytes:
                self._fail("sent a head that is too large")
                return
            try:
                head = parse_response_head(data[start:end])
            except HttpError as error:
                self._fail(f"sent an answer that is not HTTP/1.1 ({error.message})")
                return
            start = end + 4
            if head.status >= 200:
                break
            self._interim += 1
            if head.status == 101 or self._interim > _MAX_INTERIM:
                self._fail("sent an unasked 101, or too many 1xx")
                return
            if head.status in (100, 102):
                (sink.response_continue if head.status == 100 else sink.response_processing)()
                if self._sink is not sink:
                    return
        self._buffer = b""
        self._begin(sink, head, data, start)

    def _begin(self, sink: ResponseSink, head: ResponseHead, data: bytes, start: int) -> None:
        self._reusable = head.keep_alive
        if bodyless(self._method, head.status) or head.length == 0:
            self._state = _DONE
            # Simple servers send a body for HEAD, too, which could then be read as the next response.
            announced = self._method == b"HEAD" and (head.chunked or bool(head.length))
            self._reusable = self._reusable and start == len(data) and not announced
            self.deadline = NEVER
            sink.response_head(head)
            if self._sink is sink:
                sink.response_end()
            return
        if head.length == len(data) - start and not head.chunked:
            # The whole body came with its head, as small bodies do: no decoder needed.
            self._state = _DONE
            self.deadline = NEVER
            sink.response_whole(head, data[start:])
            return
        self._state = _BODY
        if head.chunked:
            self._decoder = ChunkedBody()
        elif head.length is not None:
            self._decoder = LengthBody(head.length)
        else:
            self._decoder = CloseBody()
            self._reusable = False
        sink.response_head(head)
        if self._sink is sink:
            if start < len(data):
                self._feed_body(data, start)
            else:
                sink.response_flush()

    def _feed_body(self, data: bytes, start: int) -> None:
        sink, decoder = self._sink, self._decoder
        assert sink is not None
        assert decoder is not None
        pieces: list[bytes] = []
        try:
            end = decoder.feed(data, start, pieces)
        except HttpError as error:
            self._fail(f"sent a broken body ({error.message})")
            return
        if pieces:
            # The chunks of one read are joined: chunk borders carry no meaning.
            sink.response_data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._sink is not sink:
            return
        if decoder.done:
            self._state = _DONE
            self._reusable = self._reusable and end == len(data)
            self.deadline = NEVER
            sink.response_end()
        else:
            sink.response_flush()

    def _keep_partial(self, data: bytes) -> None:
        """Keeps the beginning of a head; refuses one that is too large or does not begin like HTTP/1.x."""
        begins = data[:7]
        if len(data) > self._owner.limits.header_bytes or not b"HTTP/1.".startswith(begins):
            self._fail("sent an answer that does not begin like HTTP/1.1")
        else:
            self._buffer = data

    def _fail(self, what: str) -> None:
        sink = self.cut()
        if sink is not None:
            sink.upstream_failed(what, reason=NOT_HTTP)
