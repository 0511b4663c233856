"""A client and an upstream of raw bytes with the engine between them, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from agent.http.connection import ServerConnection
from agent.http.delayed_head import DeferredHeaders
from agent.http.exchange import Exchange, Handler
from agent.http.forward import ForwardResult, forward
from agent.http.header_filter import instance_answer_headers, request_headers
from agent.http.limits import Limits, UpstreamLimits
from agent.http.message import Header, ResponseHead
from agent.http.pool import Pool
from agent.http.relay import RelayOutcome
from agent.http.server import Server, serve
from agent.http.upstream import UpstreamConnection

REQUEST_ID = "1-67a59f35-150c1267-f381ba1c085c"
PATIENCE_S = 10.0


class Wire:
    """One end of a connection. Everything waits at most PATIENCE_S."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        async with asyncio.timeout(PATIENCE_S):
            await self._writer.drain()

    def send_nowait(self, data: bytes) -> None:
        """Sends without waiting for the other side to read."""
        self._writer.write(data)

    async def until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readuntil(mark)

    async def exactly(self, count: int) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readexactly(count)

    async def rest(self) -> bytes:
        """Everything until the other side closes, a reset included."""
        data = b""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                while piece := await self._reader.read(65536):
                    data += piece
        return data

    async def head(self) -> tuple[int, dict[bytes, bytes]]:
        """The next head: status (or 0 for a request) and headers; `b""` is the start line."""
        lines = (await self.until(b"\r\n\r\n"))[:-4].split(b"\r\n")
        headers = {b"": lines[0]}
        for line in lines[1:]:
            name, _, value = line.partition(b": ")
            assert name not in headers, f"sent twice: {name!r}"
            headers[name] = value
        status = int(lines[0].split(b" ")[1]) if lines[0].startswith(b"HTTP/") else 0
        return status, headers

    async def message(self, *, bodyless: bool = False) -> tuple[int, dict[bytes, bytes], bytes]:
        """The next whole message, framed by length or chunks."""
        status, headers = await self.head()
        if bodyless:
            return status, headers, b""
        if headers.get(b"transfer-encoding") == b"chunked":
            return status, headers, await self.chunks()
        return status, headers, await self.exactly(int(headers.get(b"content-length", b"0")))

    async def chunk(self) -> bytes:
        size = int((await self.until(b"\r\n"))[:-2], 16)
        data = await self.exactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def chunks(self) -> bytes:
        body = b""
        while piece := await self.chunk():
            body += piece
        return body

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        self._writer.transport.abort()

    async def closed(self) -> None:
        self._writer.transport.abort()
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._writer.wait_closed()


_clients: list[Wire] = []


async def connect(port: int, *, buffer_bytes: int = 2**16) -> Wire:
    async with asyncio.timeout(PATIENCE_S):
        wire = Wire(*await asyncio.open_connection("127.0.0.1", port, limit=buffer_bytes))
    _clients.append(wire)
    return wire


async def close_clients() -> None:
    """Closes the clients that `connect` opened in this test."""
    while _clients:
        await _clients.pop().closed()


Script = Callable[[Wire], Awaitable[None]]


def answering(response: bytes, *, times: int = 1000) -> Script:
    """A script that answers every request with the same bytes."""

    async def script(wire: Wire) -> None:
        for _ in range(times):
            await wire.message()
            await wire.send(response)

    return script


@dataclass
class Upstream:
    """A scripted upstream: `script` runs once per connection; its failures fail the test."""

    port: int = 0
    connections: int = 0
    failures: list[BaseException] = field(default_factory=list)


@contextlib.asynccontextmanager
async def upstream(script: Script) -> AsyncIterator[Upstream]:
    up = Upstream()
    tasks: set[asyncio.Task[None]] = set()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up.connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(Wire(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the engine closed the connection, or the test is over
        except Exception as error:
            up.failures.append(error)
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    up.port = server.sockets[0].getsockname()[1]
    try:
        yield up
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tuple(tasks), timeout=PATIENCE_S)
    assert not up.failures, up.failures


@contextlib.asynccontextmanager
async def serving(handler: Handler, limits: Limits | None = None) -> AsyncIterator[Server]:
    """The engine's server with a handler; an exception of the handler fails the test."""
    faults: list[BaseException] = []
    server = await serve(
        handler,
        "127.0.0.1",
        0,
        limits or Limits(),
        request_ids=lambda: REQUEST_ID,
        on_fault=lambda error, _: faults.append(error),
    )
    try:
        yield server
    finally:
        await close_clients()
        await server.close(0.0)
    assert not faults, faults


@dataclass
class RelayRig:
    """The engine between a client and a scripted upstream, as an ingress would use it."""

    server: Server
    pool: Pool
    results: asyncio.Queue[ForwardResult]
    last_bytes: list[float]  # one entry per call of `on_last_byte`
    exchanges: list[Exchange]

    async def result(self) -> ForwardResult:
        async with asyncio.timeout(PATIENCE_S):
            return await self.results.get()

    async def client(self) -> Wire:
        return await connect(self.server.port)


@contextlib.asynccontextmanager
async def relay(
    port: int,
    *,
    limits: Limits | None = None,
    upstream_limits: UpstreamLimits | None = None,
    deadline_s: float = PATIENCE_S,
    response_filter: Callable[[ResponseHead], list[Header] | None] | None = None,
    expect: bool = False,
    keep_body_bytes: int | None = None,
    deferred_headers: DeferredHeaders | None = None,
) -> AsyncIterator[RelayRig]:
    loop = asyncio.get_running_loop()
    pool = Pool("127.0.0.1", port, upstream_limits or UpstreamLimits())
    results: asyncio.Queue[ForwardResult] = asyncio.Queue()
    last_bytes: list[float] = []
    exchanges: list[Exchange] = []

    async def handler(exchange: Exchange) -> None:
        exchanges.append(exchange)
        body = None if keep_body_bytes is None else await exchange.buffer_body(keep_body_bytes)
        result = await forward(
            exchange,
            pool,
            exchange.head.method,
            exchange.head.target,
            request_headers(exchange.head.headers),
            deadline=loop.time() + deadline_s,
            response_filter=response_filter or (lambda head: instance_answer_headers(head.headers)),
            body=body,
            expect=expect,
            deferred_headers=deferred_headers,
            on_last_byte=lambda: last_bytes.append(loop.time()),
        )
        results.put_nowait(result)
        if result.outcome is RelayOutcome.HELD:
            await exchange.answer(503, [], b"held")
        elif result.error is not None:
            await exchange.fail(result.error, REQUEST_ID)

    async with serving(handler, limits) as server:
        try:
            yield RelayRig(server, pool, results, last_bytes, exchanges)
        finally:
            pool.close()


def paused(connections: Iterable[ServerConnection | UpstreamConnection]) -> bool:
    """True if the engine has stopped reading at least one of them."""
    return any(not connection.transport.is_reading() for connection in connections)


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits until `condition` holds, at most PATIENCE_S."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - conditions of sockets have no event
            await asyncio.sleep(0.001)
