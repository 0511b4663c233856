"""A connection to a server behind us: an instance, or an ingress."""

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

# IDLE: nothing asked. HEAD, BODY: in a response. DONE: the response is whole, not yet released.
_IDLE, _HEAD, _BODY, _DONE, _CLOSED = range(5)
BROKEN, NOT_HTTP = "UPSTREAM_BROKEN", "UPSTREAM_NOT_HTTP"
_MOST_INTERIM = 16  # 1xx responses before a final one; more is not an answer but a flood


class ResponseSink(Protocol):
    """Who takes a response while it arrives. Exactly one of `response_end`, `upstream_failed` and
    `upstream_timed_out` comes last."""

    def response_continue(self) -> None:
        """100 Continue. Other 1xx but 102 are dropped."""

    def response_processing(self) -> None:
        """102 Processing: the request is being acted on from now on."""

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        """All of it came in one piece; the connection may be released at once. Nothing else is called then."""

    def response_head(self, head: ResponseHead) -> None:
        """The final head."""

    def response_data(self, data: bytes) -> None:
        """Bytes of the body."""

    def response_flush(self) -> None:
        """One read is dealt with: pass on what it gave. Also the last call of a read after `response_end`."""

    def response_end(self) -> None:
        """The body is whole."""

    def upstream_failed(self, what: str, in_order: bool = False, reason: str = BROKEN) -> None:
        """The connection broke, or the response is not HTTP/1.1 (`reason` NOT_HTTP), before it was whole. `in_order`:
        the other side closed it, and all that it ever sent has been read."""

    def upstream_timed_out(self) -> None:
        """The deadline passed; the connection is closed."""

    def upstream_writable(self, writable: bool) -> None:
        """The upstream takes no more of the request for now, or does again."""


class ConnectionOwner(Protocol):
    """The pool of a connection, as the connection sees it."""

    limits: UpstreamLimits
    generation: int
    connections: set[UpstreamConnection]
    deadlines: DeadlineTimer

    def forget(self, connection: UpstreamConnection) -> None:
        """`connection` is closed."""


class UpstreamConnection(asyncio.Protocol):
    """One keep-alive connection. Between `start` and `Pool.release` it belongs to one sink."""

    __slots__ = (
        "_buffer", "_decoder", "_interim", "_keep", "_loop", "_method", "_owner", "_patient", "_paused", "_sink",
        "_state", "deadline", "generation", "request_done", "transport", "writable",
    )  # fmt: skip

    transport: asyncio.Transport

    def __init__(self, owner: ConnectionOwner, loop: asyncio.AbstractEventLoop) -> None:
        self.deadline = NEVER
        self.generation = owner.generation
        self.request_done = True  # the request is written whole; set by whoever writes it
        self.writable = True
        self._owner = owner
        self._loop = loop
        self._sink: ResponseSink | None = None
        self._method = b""
        self._state = _IDLE
        self._buffer = b""
        self._decoder: BodyDecoder | None = None
        self._interim = 0
        self._keep = True
        self._paused = False
        self._patient = False

    # --- for whoever has it ----------------------------------------------------------------

    def start(self, sink: ResponseSink, method: bytes, deadline: float) -> None:
        """Begins an exchange. `method` decides whether its response has a body; at `deadline` (loop time) the
        connection is closed."""
        self._sink = sink
        self._method = method
        self._state = _HEAD
        self._interim = 0
        self.request_done = False
        self.deadline = deadline
        self._owner.deadlines.schedule(deadline)

    def be_patient(self) -> None:
        """This exchange streams a body, which the other side may leave unread for as long as it likes: to the kernel a
        full window is silence, too (tcp(7), TCP_USER_TIMEOUT)."""
        if self._owner.limits.silence_s and not self._patient:
            self._patient = True
            tcp_options.bound_silence(self.transport, 0)

    def write(self, data: bytes) -> None:
        """Writes bytes of the request; nothing once the connection is closed."""
        if self._state != _CLOSED:
            self.transport.write(data)

    def writelines(self, data: tuple[bytes, ...]) -> None:
        """Writes pieces of the request in one go."""
        if self._state != _CLOSED:
            self.transport.writelines(data)

    def pause(self) -> None:
        """The taker of the response is full: stop reading."""
        if not self._paused and self._state != _CLOSED and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """The taker has room again."""
        if self._paused:
            self._paused = False
            if self._state != _CLOSED and not self.transport.is_closing():
                self.transport.resume_reading()

    def abort(self) -> None:
        """Closes the connection now. Its sink hears nothing more."""
        self._sink = None
        if self._state != _CLOSED:
            self._state = _CLOSED
            self.deadline = NEVER
            self.transport.abort()

    def cut(self) -> ResponseSink | None:
        """As `abort`; returns the sink that still waited for an answer, which its caller must tell."""
        sink = self._sink if self._state in (_HEAD, _BODY) else None
        self.abort()
        return sink

    def rest(self, deadline: float) -> bool:
        """Makes the connection idle until `deadline`; False if it can't serve again."""
        self._sink = None
        if self._state not in (_IDLE, _DONE) or not (self._keep and self.request_done and self.writable):
            return False
        if self.transport.is_closing():
            return False
        self._state = _IDLE
        self.resume()
        if self._patient:
            self._patient = False
            tcp_options.bound_silence(self.transport, self._owner.limits.silence_s)
        self.deadline = deadline
        self._owner.deadlines.schedule(deadline)
        return True

    @property
    def usable(self) -> bool:
        """Idle, and not seen to be closed by the other side."""
        return self._state == _IDLE and not self.transport.is_closing()

    # --- the transport's side --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=self._owner.limits.write_buffer_bytes)
        tcp_options.watch_peer(self.transport, self._owner.limits.silence_s)
        self._owner.connections.add(self)
        # Should whoever connects be cancelled right now, the connection still ends.
        self.deadline = self._loop.time() + self._owner.limits.idle_s
        self._owner.deadlines.schedule(self.deadline)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == _HEAD:
            self._feed_head(self._buffer + data if self._buffer else data)
        elif state == _BODY:
            self._feed_body(data, 0)
        elif state == _DONE:
            self._keep = False  # bytes behind a whole response: whose they are nobody can tell
        else:
            self.abort()  # unasked: the same, or the farewell of a server that closes

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
        """The deadline passed (called by the timer): idle for too long, or an answer too late."""
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
                self._fail(f"sent what is not HTTP/1.1 ({error.message})")
                return
            start = end + 4
            if head.status >= 200:
                break
            self._interim += 1
            if head.status == 101 or self._interim > _MOST_INTERIM:
                self._fail("sent an unasked 101, or too many 1xx")
                return
            if head.status in (100, 102):
                (sink.response_continue if head.status == 100 else sink.response_processing)()
                if self._sink is not sink:
                    return
        self._buffer = b""
        self._begin(sink, head, data, start)

    def _begin(self, sink: ResponseSink, head: ResponseHead, data: bytes, start: int) -> None:
        self._keep = head.keep_alive
        if bodyless(self._method, head.status) or head.length == 0:
            self._state = _DONE
            # Simple servers answer HEAD with the body, too, and late enough to be taken for the next answer.
            announced = self._method == b"HEAD" and (head.chunked or bool(head.length))
            self._keep = self._keep and start == len(data) and not announced
            self.deadline = NEVER
            sink.response_head(head)
            if self._sink is sink:
                sink.response_end()
            return
        if head.length == len(data) - start and not head.chunked:
            # The whole body came with its head, as small ones do: no decoder needed.
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
            self._keep = False
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
            # Several chunks of one read become one: their borders mean nothing, their arrival does.
            sink.response_data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._sink is not sink:
            return
        if decoder.done:
            self._state = _DONE
            self._keep = self._keep and end == len(data)
            self.deadline = NEVER
            sink.response_end()
        else:
            sink.response_flush()

    def _keep_partial(self, data: bytes) -> None:
        """The beginning of a head. Refused as soon as it can't become one."""
        begins = data[:7]
        if len(data) > self._owner.limits.header_bytes or not b"HTTP/1.".startswith(begins):
            self._fail("sent what is not the head of an HTTP/1.1 response")
        else:
            self._buffer = data

    def _fail(self, what: str) -> None:
        sink = self.cut()
        if sink is not None:
            sink.upstream_failed(what, reason=NOT_HTTP)
