"""Connections to an upstream: kept, retired when a freeze begins, dropped after any unexpected event."""

from __future__ import annotations

import asyncio
import os
import resource
import socket

import pytest

from agent.http.errors import ConnectFailedError, UpstreamBrokenError, UpstreamTimeoutError
from agent.http.limits import UpstreamLimits
from agent.http.pool import Pool
from agent.http.upstream import UpstreamConnection
from tests.http.rig import PATIENCE_S, Script, Wire, answering, eventually, relay, upstream
from tests.http.test_server import get

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: b\r\n\r\nok"


def pool_of(port: int, limits: UpstreamLimits | None = None) -> Pool:
    return Pool("127.0.0.1", port, limits or UpstreamLimits())


async def test_request_with_a_whole_body() -> None:
    async def script(wire: Wire) -> None:
        assert await wire.message() == (
            0,
            {b"": b"POST /initialize HTTP/1.1", b"x-a": b"1", b"host": host, b"content-length": b"0"},
            b"",
        )
        await wire.send(OK)
        _, headers, _ = await wire.message()
        assert headers == {b"": b"GET /health HTTP/1.1", b"host": b"other"}
        await wire.send(OK)

    async with upstream(script) as up:
        host = b"127.0.0.1:%d" % up.port
        pool = pool_of(up.port)
        response = await pool.request(b"POST", b"/initialize", [(b"x-a", b"1")], timeout_s=5)
        assert (response.status, response.body, response.headers[1]) == (200, b"ok", (b"x-a", b"b"))
        await pool.request(b"GET", b"/health", [(b"host", b"other")], timeout_s=5)
        assert up.connections == 1
        pool.close()


async def test_fresh_request_uses_its_own_connection() -> None:
    async with upstream(answering(OK)) as up:
        pool = pool_of(up.port)
        for _ in range(3):
            await pool.request(b"GET", b"/", [], timeout_s=5, fresh=True)
        assert up.connections == 3
        pool.close()


async def test_large_body_is_cut_where_only_the_status_counts() -> None:
    async def script(wire: Wire) -> None:
        for _ in range(2):
            await wire.message()
            await wire.send(OK)
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 5000)
        await wire.rest()

    async with upstream(script) as up:
        pool = pool_of(up.port)
        statuses = [
            (await pool.request(b"GET", b"/", [], timeout_s=5, max_body_bytes=4000, whole=False)).status
            for _ in range(3)
        ]
        assert (statuses, up.connections) == ([200, 200, 200], 1)
        await eventually(lambda: not pool.connections)  # the rest of the page could be read as the next answer
        pool.close()


async def silent(wire: Wire) -> None:
    await wire.message()
    await wire.rest()


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (silent, UpstreamTimeoutError),
        (answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no", times=1), UpstreamBrokenError),
        (answering(b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n" + b"x" * 101), UpstreamBrokenError),
        (answering(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 101), UpstreamBrokenError),
        (answering(b"nonsense\r\n\r\n"), UpstreamBrokenError),
    ],
)
async def test_requests_that_fail(script: Script, error: type[Exception]) -> None:
    async with upstream(script) as up:
        pool = pool_of(up.port)
        with pytest.raises(error, match=f"127.0.0.1:{up.port}"):
            await pool.request(b"GET", b"/", [], timeout_s=0.2, max_body_bytes=100)
        await eventually(lambda: not pool.connections)
        pool.close()


async def test_cancelled_request_closes_its_connection() -> None:
    async with upstream(silent) as up:
        pool = pool_of(up.port)
        call = asyncio.create_task(pool.request(b"GET", b"/", [], timeout_s=5))
        await eventually(lambda: up.connections == 1)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        await eventually(lambda: not pool.connections)
        pool.close()


async def test_nobody_listens() -> None:
    async with upstream(silent) as up:
        port = up.port
    pool = pool_of(port)
    with pytest.raises(ConnectFailedError, match=str(port)) as caught:
        await pool.acquire(asyncio.get_running_loop().time() + 5)
    assert caught.value.reason == "UPSTREAM_CONNECT_FAILED"
    pool.close()


async def test_connecting_has_a_deadline() -> None:
    """No host answers in 192.0.2.0/24, which is for documentation; a refusal by the network is a failure, too."""
    pool = Pool("192.0.2.1", 9, UpstreamLimits(connect_timeout_s=0.05))
    with pytest.raises(ConnectFailedError):
        await pool.acquire(asyncio.get_running_loop().time() + PATIENCE_S)
    pool.close()


async def test_the_number_of_connections_is_bounded() -> None:
    async with upstream(silent) as up:
        pool = pool_of(up.port, UpstreamLimits(max_connections=2))
        deadline = asyncio.get_running_loop().time() + 5
        first = await pool.acquire(deadline)
        await pool.acquire(deadline)
        with pytest.raises(ConnectFailedError) as caught:
            await pool.acquire(deadline)
        assert caught.value.reason == "UPSTREAM_CONNECTIONS_EXHAUSTED"
        pool.release(first)
        assert await pool.acquire(deadline) is first
        pool.close()


async def test_lack_of_descriptors_is_not_a_failed_upstream() -> None:
    async with upstream(silent) as up:
        pool = pool_of(up.port)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
        try:
            with pytest.raises(ConnectFailedError, match="Too many open files") as caught:
                await pool.acquire(asyncio.get_running_loop().time() + 5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert caught.value.reason == "UPSTREAM_CONNECTIONS_EXHAUSTED"
        pool.close()


async def test_last_used_connection_is_used_first() -> None:
    async with upstream(silent) as up:
        pool = pool_of(up.port)
        deadline = asyncio.get_running_loop().time() + 5
        first, second = await pool.acquire(deadline), await pool.acquire(deadline)
        pool.release(second)
        pool.release(first)
        assert pool.take() is first
        assert pool.take() is second
        assert pool.take() is None
        pool.close()


@pytest.mark.parametrize("farewell", [b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
async def test_idle_connection_with_any_event_is_dropped(farewell: bytes) -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(OK)
        await go.wait()
        if farewell:
            await wire.send(farewell)
            await wire.rest()

    async with upstream(script) as up:
        pool = pool_of(up.port)
        await pool.request(b"GET", b"/", [], timeout_s=5)
        assert len(pool.connections) == 1
        go.set()
        await eventually(lambda: not pool.connections)
        assert pool.take() is None
        pool.close()


async def test_idle_connections_expire() -> None:
    async with upstream(answering(OK)) as up:
        pool = pool_of(up.port, UpstreamLimits(idle_s=0.05))
        await pool.request(b"GET", b"/", [], timeout_s=5)
        await eventually(lambda: not pool.connections)
        pool.close()


async def test_retire_closes_idle_and_marks_busy_connections() -> None:
    """After a retire no connection opened before it is used."""
    go = asyncio.Event()
    closed: list[int] = []
    number = 0

    async def script(wire: Wire) -> None:
        nonlocal number
        number += 1
        me = number
        await wire.message()
        if me == 1:
            await go.wait()
        await wire.send(OK)
        await wire.rest()
        closed.append(me)

    async with upstream(script) as up, relay(up.port) as r:
        busy = await r.client()
        await busy.send(get(b"/busy"))
        await eventually(lambda: number == 1)
        idle = await r.client()
        await idle.send(get(b"/idle"))
        await idle.message()
        assert len(r.pool.connections) == 2
        r.pool.retire()
        await eventually(lambda: closed == [2])
        go.set()
        assert (await busy.message())[2] == b"ok"  # a request in flight finishes
        await eventually(lambda: closed == [2, 1])
        await idle.send(get(b"/after"))
        assert (await idle.message())[2] == b"ok"
        assert up.connections == 3


async def test_close_cuts_connections_and_notifies_sinks() -> None:
    async with upstream(silent) as up:
        pool = pool_of(up.port)
        call = asyncio.create_task(pool.request(b"GET", b"/", [], timeout_s=5))
        await eventually(lambda: up.connections == 1)
        pool.close()
        with pytest.raises(UpstreamBrokenError):
            await call
        with pytest.raises(ConnectFailedError):
            await pool.acquire(asyncio.get_running_loop().time() + 5)


async def test_connection_close_is_respected() -> None:
    closing = OK.replace(b"X-A: b", b"Connection: close")
    async with upstream(answering(closing)) as up:
        pool = pool_of(up.port)
        for _ in range(2):
            await pool.request(b"GET", b"/", [], timeout_s=5)
        assert up.connections == 2
        pool.close()


@pytest.mark.parametrize("cut", range(1, len(OK), 7))
async def test_responses_cut_anywhere(cut: int) -> None:
    async def script(wire: Wire) -> None:
        while True:
            await wire.message()
            await wire.send(OK[:cut])
            await asyncio.sleep(0)
            await wire.send(OK[cut:])

    async with upstream(script) as up:
        pool = pool_of(up.port)
        for _ in range(3):
            assert (await pool.request(b"GET", b"/", [], timeout_s=5)).body == b"ok"
        assert up.connections == 1
        pool.close()


@pytest.mark.parametrize(("host", "authority"), [("127.0.0.1", b"127.0.0.1:9000"), ("::1", b"[::1]:9000")])
async def test_authority(host: str, authority: bytes) -> None:
    assert Pool(host, 9000, UpstreamLimits()).authority == authority


async def test_prepared_connection_serves_the_first_request() -> None:
    async with upstream(answering(OK)) as up:
        pool = pool_of(up.port)
        await pool.prepare(5.0)
        await pool.prepare(5.0)  # one is enough
        await eventually(lambda: up.connections == 1)
        await pool.request(b"GET", b"/", [], timeout_s=5)
        assert up.connections == 1
        pool.retire()
        assert not [one for one in pool.connections if one.usable]
        pool.close()


def _option(connection: UpstreamConnection, option: int) -> int:
    value: int = connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, option)
    return value


def _user_timeout_ms(connection: UpstreamConnection) -> int:
    return _option(connection, socket.TCP_USER_TIMEOUT)


async def test_silence_closes_connections_except_during_a_streamed_body() -> None:
    async with upstream(answering(OK)) as up:
        pool = pool_of(up.port, UpstreamLimits(silence_s=10))
        connection = await pool.acquire(asyncio.get_running_loop().time() + PATIENCE_S)
        assert _user_timeout_ms(connection) == 10_000
        probes = [_option(connection, option) for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)]
        assert probes == [1, 1], "silence counts from the last segment: an idle peer is probed often"
        connection.allow_silence()
        assert _user_timeout_ms(connection) == 0
        assert _option(connection, socket.TCP_KEEPCNT) == 10, "tolerates an outage as long as others do"
        pool.release(connection)
        assert pool.take() is connection
        assert _user_timeout_ms(connection) == 10_000
        pool.close()


async def test_instance_may_leave_a_body_unread_until_its_timeout() -> None:
    async with upstream(answering(OK)) as up:
        pool = pool_of(up.port)
        connection = await pool.acquire(asyncio.get_running_loop().time() + PATIENCE_S)
        assert _user_timeout_ms(connection) == 0
        pool.close()
