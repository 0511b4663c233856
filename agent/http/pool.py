"""A pool of connections to one upstream, and small whole-body calls over it."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass

from agent.core.errors import HibernodeError
from agent.core.sizes import size_text
from agent.http.deadlines import DeadlineTimer
from agent.http.errors import ConnectFailedError, UpstreamBrokenError, UpstreamTimeoutError
from agent.http.head_parser import serialise
from agent.http.limits import UpstreamLimits
from agent.http.message import Header, ResponseHead, lookup
from agent.http.upstream import BROKEN, UpstreamConnection

_RESOLUTION_S = 0.005


@dataclass(frozen=True, slots=True)
class Response:
    """What `Pool.request` returns."""

    status: int
    headers: list[Header]
    body: bytes


class Pool:
    """Keep-alive connections to one `host`:`port`, last used first. Must be made inside a running loop.

    `acquire` never waits for a connection to become free: beyond `limits.max_connections` it fails. An idle connection
    that receives bytes or a close is dropped at once.
    """

    def __init__(self, host: str, port: int, limits: UpstreamLimits) -> None:
        self.host = host
        self.port = port
        self.limits = limits
        self.generation = 0
        self.connections: set[UpstreamConnection] = set()
        self._loop = asyncio.get_running_loop()
        self.deadlines = DeadlineTimer(self._loop, self.connections, _RESOLUTION_S)
        self._idle: list[UpstreamConnection] = []
        self._connecting = 0
        self._closed = False

    @property
    def authority(self) -> bytes:
        """`host:port` as in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode()

    def take(self) -> UpstreamConnection | None:
        """An idle connection, or None. The caller returns it with `release`."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def acquire(self, deadline: float, *, fresh: bool = False) -> UpstreamConnection:
        """An idle connection, or a new one (`fresh`: always a new one) by `deadline` (loop time) and within
        `connect_timeout_s`.

        Raises ConnectFailedError: UPSTREAM_CONNECT_FAILED, or UPSTREAM_CONNECTIONS_EXHAUSTED.
        """
        connection = None if fresh else self.take()
        if connection is not None:
            return connection
        where = f"{self.host}:{self.port}"
        if self._closed or len(self.connections) + self._connecting >= self.limits.max_connections:
            raise ConnectFailedError("UPSTREAM_CONNECTIONS_EXHAUSTED", f"No further connection to {where} is allowed.")
        timeout_s = min(deadline - self._loop.time(), self.limits.connect_timeout_s)
        self._connecting += 1
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await self._loop.create_connection(
                    lambda: UpstreamConnection(self, self._loop), self.host, self.port
                )
        except TimeoutError:
            raise ConnectFailedError(
                "UPSTREAM_CONNECT_FAILED", f"No connection to {where} within {max(timeout_s, 0):.3g} seconds."
            ) from None
        except OSError as error:
            # This process or host is out of descriptors, which says nothing about the other side.
            no_descriptors = error.errno in (errno.EMFILE, errno.ENFILE)
            raise ConnectFailedError(
                "UPSTREAM_CONNECTIONS_EXHAUSTED" if no_descriptors else "UPSTREAM_CONNECT_FAILED",
                f"No connection to {where}: {error.strerror or error}.",
            ) from error
        finally:
            self._connecting -= 1
        return connection

    async def prepare(self, timeout_s: float) -> None:
        """Opens a connection for the next request unless one is idle. Raises ConnectFailedError."""
        if not any(connection.usable for connection in self._idle):
            self.release(await self.acquire(self._loop.time() + timeout_s, fresh=True))

    def release(self, connection: UpstreamConnection) -> None:
        """Returns a connection. The pool keeps it after a clean exchange, if it was not retired and there is room."""
        if (
            connection.generation == self.generation
            and not self._closed
            and len(self._idle) < self.limits.max_idle
            and connection.make_idle(self._loop.time() + self.limits.idle_s)
        ):
            self._idle.append(connection)
        else:
            connection.abort()

    def retire(self) -> None:
        """Closes idle connections now, and busy ones once their exchange ends; the next acquire opens a new one. Called
        when a freeze begins: the instance's keep-alive timers go on counting while it is frozen
        (agent/docs/facts/emulated-driver.md, pitfall 4)."""
        self.generation += 1
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()

    def close(self) -> None:
        """Cuts all connections and opens no others."""
        self._closed = True
        self.retire()
        for connection in tuple(self.connections):
            sink = connection.cut()
            if sink is not None:
                sink.upstream_failed("was removed, and its connections were closed")
        self.deadlines.stop()

    def forget(self, connection: UpstreamConnection) -> None:
        self.connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    async def request(
        self,
        method: bytes,
        target: bytes,
        headers: list[Header],
        body: bytes = b"",
        *,
        timeout_s: float,
        max_body_bytes: int = 65536,
        whole: bool = True,
        fresh: bool = False,
    ) -> Response:
        """Sends one small request and returns its response; for hooks, health checks and Wake calls. Never repeats it.

        - `headers`: framing is added, and `host` if there is none.
        - `timeout_s`: for all of it, connecting included.
        - `max_body_bytes`: a larger response body is an error; with `whole` False the response then ends there, for
          callers that need only the status.
        - `fresh`: uses a new connection and closes it afterwards.

        Raises ConnectFailedError, UpstreamTimeoutError, UpstreamBrokenError, ValueError for CR or LF in a header.
        """
        deadline = self._loop.time() + timeout_s
        framing = b"" if lookup(headers, b"host") else b"host: %b\r\n" % self.authority
        if body or method in (b"POST", b"PUT", b"PATCH"):
            framing += b"content-length: %d\r\n" % len(body)
        if fresh:
            framing += b"connection: close\r\n"
        message = serialise(b"%b %b HTTP/1.1\r\n" % (method, target), headers, framing) + body
        connection = await self.acquire(deadline, fresh=fresh)
        call = _Call(self, timeout_s, max_body_bytes, whole, self._loop.create_future())
        connection.start(call, method, deadline)
        connection.write(message)
        connection.request_done = True
        try:
            return await call.response
        except BaseException:
            connection.abort()
            raise
        finally:
            self.release(connection)


class _Call:
    """Collects one response. Unlike a `Relay` it ignores 1xx and needs no back-pressure: its body is bounded."""

    __slots__ = ("_head", "_max_body_bytes", "_pieces", "_pool", "_size", "_timeout_s", "_whole", "response")

    def __init__(
        self, pool: Pool, timeout_s: float, max_body_bytes: int, whole: bool, response: asyncio.Future[Response]
    ) -> None:
        self.response = response
        self._pool = pool
        self._timeout_s = timeout_s
        self._max_body_bytes = max_body_bytes
        self._whole = whole
        self._head: ResponseHead | None = None
        self._pieces: list[bytes] = []
        self._size = 0

    def response_processing(self) -> None:
        pass

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        self.response_head(head)
        self.response_data(body)
        self.response_end()

    def response_continue(self) -> None:
        pass

    def response_head(self, head: ResponseHead) -> None:
        self._head = head

    def response_data(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        if self._size <= self._max_body_bytes:
            return
        if not self._whole:
            self.response_end()  # `release` then closes the connection, which is within a body
        else:
            self.upstream_failed(f"sent a body of more than {size_text(self._max_body_bytes)}")

    def response_flush(self) -> None:
        pass

    def response_end(self) -> None:
        if self._head is not None and not self.response.done():
            self.response.set_result(Response(self._head.status, self._head.headers, b"".join(self._pieces)))

    def upstream_failed(self, what: str, in_order: bool = False, reason: str = BROKEN) -> None:
        where = f"{self._pool.host}:{self._pool.port}"
        self._raise(UpstreamBrokenError(reason, f"{where} {what}."))

    def upstream_timed_out(self) -> None:
        where = f"{self._pool.host}:{self._pool.port}"
        self._raise(UpstreamTimeoutError("UPSTREAM_TIMEOUT", f"{where} did not answer in {self._timeout_s:g} s."))

    def upstream_writable(self, writable: bool) -> None:
        pass  # the request is small and already written

    def _raise(self, error: HibernodeError) -> None:
        if not self.response.done():
            self.response.set_exception(error)
