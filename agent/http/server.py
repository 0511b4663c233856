"""Listens for connections; a close lets requests end within a grace period."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from email.utils import formatdate

from agent.http.connection import ServerConnection
from agent.http.deadlines import DeadlineTimer
from agent.http.exchange import Handler
from agent.http.limits import Limits
from agent.http.message import Header

_RESOLUTION_S = 0.25
BACKLOG = 1024
"""Connections that the kernel queues until they are accepted."""


def no_date() -> bytes:
    """For answers to a gateway, which adds the date itself."""
    return b""


class DateHeader:
    """The `date` header line of answers (RFC 9110, 6.6.1), formatted once a second. `wall_s`: Unix seconds."""

    __slots__ = ("_line", "_second", "_wall_s")

    def __init__(self, wall_s: Callable[[], int]) -> None:
        self._wall_s = wall_s
        self._second = -1
        self._line = b""

    def __call__(self) -> bytes:
        second = self._wall_s()
        if second != self._second:
            self._second = second
            self._line = b"date: %b\r\n" % formatdate(second, usegmt=True).encode()
        return self._line


class Server:
    """A listening server, made by `serve`. `port` is the bound port."""

    def __init__(
        self,
        handler: Handler,
        limits: Limits,
        request_ids: Callable[[], str],
        on_fault: Callable[[BaseException, str], None],
        date_header: Callable[[], bytes] = no_date,
        when_full: Sequence[Header] = (),
    ) -> None:
        self.date_header = date_header
        self.when_full = when_full
        self.handler = handler
        self.limits = limits
        self.request_ids = request_ids
        self.on_fault = on_fault
        self.port = 0
        self.closing = False
        self.connections: set[ServerConnection] = set()
        loop = asyncio.get_running_loop()
        shortest_s = min(
            limits.header_timeout_s, limits.keep_alive_s, limits.body_stall_s, limits.write_stall_s, limits.linger_s
        )
        self.deadlines = DeadlineTimer(loop, self.connections, min(_RESOLUTION_S, shortest_s / 4))
        self._loop = loop
        self._listener: asyncio.AbstractServer | None = None
        self._empty: asyncio.Future[None] | None = None

    async def _listen(self, host: str, port: int, inherited: socket.socket | None) -> None:
        def accepted() -> ServerConnection:
            return ServerConnection(self, self._loop)

        if inherited is not None:
            listener = await self._loop.create_server(accepted, sock=inherited, backlog=BACKLOG)
        else:
            listener = await self._loop.create_server(accepted, host, port, backlog=BACKLOG)
        self._listener = listener
        self.port = listener.sockets[0].getsockname()[1]

    async def close(self, grace_s: float) -> int:
        """Stops listening, closes idle connections, and cuts what is still in flight after `grace_s` seconds. Returns
        how many connections were cut."""
        self.closing = True
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self.connections):
            if connection.idle:
                connection.close()
        if self.connections:
            self._empty = self._loop.create_future()
            await asyncio.wait([self._empty], timeout=grace_s)
        cut = tuple(self.connections)
        for connection in cut:
            connection.cancel()
        if cut:
            self._empty = self._loop.create_future()
            await asyncio.wait([self._empty], timeout=1.0)  # connection_lost comes in the next loop iteration
        self.deadlines.stop()
        return len(cut)

    def forget(self, connection: ServerConnection) -> None:
        self.connections.discard(connection)
        if not self.connections and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)


async def serve(
    handler: Handler,
    host: str,
    port: int,
    limits: Limits,
    *,
    request_ids: Callable[[], str],
    on_fault: Callable[[BaseException, str], None],
    date_header: Callable[[], bytes] = no_date,
    inherited: socket.socket | None = None,
    when_full: Sequence[Header] = (),
) -> Server:
    """Serves HTTP/1.1 on `host`:`port` (0: any port), or on the listening socket `inherited`.

    - `handler`: gets one Exchange per request. A HibernodeError that it raises is answered by `errors.error_answer`.
    - `request_ids`: ids for the error answers that the engine itself gives.
    - `on_fault`: logs any other exception of a handler with the request id of the 500 that the client gets.
    - `date_header`: a `DateHeader`, part of every answer.
    - `when_full`: headers of the 503 for connections beyond the limit.

    Raises OSError if the address cannot be bound.
    """
    server = Server(handler, limits, request_ids, on_fault, date_header, when_full)
    await server._listen(host, port, inherited)
    return server
