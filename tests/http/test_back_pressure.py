"""Back-pressure: a slow side pauses the other, and buffers between them stay bounded."""

from __future__ import annotations

import asyncio

from tests.http.rig import Wire, answering, connect, eventually, paused, relay, upstream
from tests.http.test_forward import OK
from tests.http.test_server import HOST, get


async def test_slow_client_pauses_the_upstream() -> None:
    size = 64 << 20
    sent = 0

    async def script(wire: Wire) -> None:
        nonlocal sent
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            await wire.send(b"x" * 65536)
            sent += 65536

    async with upstream(script) as up, relay(up.port) as r:
        client = await connect(r.server.port, buffer_bytes=1024)
        await client.send(get(b"/"))
        await client.head()
        await eventually(lambda: paused(r.pool.connections))
        (connection,) = r.server.connections
        high = 65536 + 2 * 2**18  # the limit, and two more reads before the pause takes effect
        assert connection.transport.get_write_buffer_size() < high
        assert sent < size  # the rest is still at its source
        taken = 0
        while taken < size:
            taken += len(await client.exactly(min(1 << 20, size - taken)))
            assert connection.transport.get_write_buffer_size() < high
        assert (await r.result()).response_body_bytes == size


async def test_slow_upstream_pauses_the_client() -> None:
    size = 30 << 20
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await go.wait()
        taken = 0
        while taken < size:
            taken += len(await wire.exactly(min(1 << 20, size - taken)))
        await wire.send(OK)

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        client.send_nowait(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)
        await eventually(lambda: any(not connection.writable for connection in r.pool.connections))
        assert paused(r.server.connections)
        (connection,) = r.pool.connections
        assert connection.transport.get_write_buffer_size() < 65536 + 2 * 2**18
        go.set()
        assert (await client.message())[2] == b"ok"
        assert (await r.result()).request_body_bytes == size


async def test_body_without_a_sink_is_buffered_up_to_the_limit() -> None:
    size = 8 << 20
    async with upstream(answering(OK)) as up, relay(up.port) as r:
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        acquire = r.pool.acquire

        async def slow(deadline: float, *, fresh: bool = False):  # type: ignore[no-untyped-def]
            await gate
            return await acquire(deadline, fresh=fresh)

        r.pool.acquire = slow  # type: ignore[method-assign]
        client = await r.client()
        client.send_nowait(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)
        await eventually(lambda: paused(r.server.connections))
        assert r.exchanges[0]._buffered < 65536 + 2 * 2**18
        gate.set_result(None)
        assert (await client.message())[2] == b"ok"
