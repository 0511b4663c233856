"""A client's connection: keep-alive, pipelining, 100-continue, timeouts and a graceful close."""

from __future__ import annotations

import asyncio
import json
from itertools import count

import pytest

from agent.core.errors import ExhaustedError
from agent.http.errors import ClientGoneError
from agent.http.exchange import Exchange
from agent.http.limits import Limits
from agent.http.server import DateHeader, serve
from tests.http.rig import PATIENCE_S, Wire, connect, eventually, paused, serving

HOST = b"Host: f\r\n"


def get(target: bytes, *lines: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\n%b%b\r\n" % (target, HOST, b"".join(line + b"\r\n" for line in lines))


def post(target: bytes, body: bytes, *lines: bytes) -> bytes:
    head = b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n" % (target, HOST, len(body))
    return head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


async def echo(exchange: Exchange) -> None:
    body = await exchange.buffer_body(1 << 20)
    assert body is not None
    await exchange.answer(200, [(b"content-type", b"text/plain")], exchange.head.target + b" " + body)


async def test_requests_cut_at_every_byte() -> None:
    raw = post(b"/a", b"hello") + get(b"/b")
    async with serving(echo) as server:
        for cut in range(1, len(raw)):
            wire = await connect(server.port)
            await wire.send(raw[:cut])
            await asyncio.sleep(0)  # usually sends the first part on its own
            await wire.send(raw[cut:])
            assert (await wire.message())[2] == b"/a hello"
            assert (await wire.message())[2] == b"/b "


async def test_pipelined_requests_are_served_in_order_one_at_a_time() -> None:
    running = 0
    most = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(5):
            await asyncio.sleep(0)
        await echo(exchange)
        running -= 1

    async with serving(handler) as server:
        wire = await connect(server.port)
        await wire.send(b"".join(post(b"/%d" % n, b"b%d" % n) + get(b"/g%d" % n) for n in range(20)))
        for n in range(20):
            assert (await wire.message())[2] == b"/%d b%d" % (n, n)
            assert (await wire.message())[2] == b"/g%d " % n
    assert most == 1


async def test_pipelined_bytes_are_bounded() -> None:
    """While one request is served, bytes after it are read only up to the limit."""
    go = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await go.wait()
        await exchange.answer(200, [])

    async with serving(handler, Limits(buffer_bytes=4096)) as server:
        wire = await connect(server.port)
        count = 3000
        wire.send_nowait(get(b"/") * count)
        await eventually(lambda: paused(server.connections))
        (connection,) = server.connections
        assert len(connection._buffer) < 4096 + 2**18 + 1
        go.set()
        for _ in range(count):
            assert (await wire.message())[0] == 200


async def test_http10_is_answered_without_chunks_and_closed() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.begin(200, None, [], None)
        exchange.write(b"one ")
        exchange.write(b"two")
        exchange.finish()

    async with serving(handler) as server:
        wire = await connect(server.port)
        await wire.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert await wire.rest() == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\none two"


async def test_connection_close_closes_the_connection() -> None:
    async with serving(echo) as server:
        wire = await connect(server.port)
        await wire.send(get(b"/", b"Connection: close"))
        _, headers, _ = await wire.message()
        assert headers[b"connection"] == b"close"
        assert await wire.rest() == b""


@pytest.mark.parametrize(("status", "length"), [(200, b"5"), (304, b"5"), (204, None)])
async def test_answers_without_a_body(status: int, length: bytes | None) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(status, [], b"hello")

    async with serving(handler) as server:
        wire = await connect(server.port)
        await wire.send(b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n" + get(b"/next"))
        _, headers = await wire.head()
        assert headers.get(b"content-length") == length
        assert (await wire.head())[0] == status  # no body between the heads


async def test_100_continue_is_sent_when_the_body_is_read() -> None:
    async with serving(echo) as server:
        wire = await connect(server.port)
        await wire.send(b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert await wire.head() == (100, {b"": b"HTTP/1.1 100 Continue"})
        await wire.send(b"hello" + get(b"/b"))
        assert (await wire.message())[2] == b"/a hello"
        assert (await wire.message())[2] == b"/b "


async def test_an_answer_instead_of_100_closes() -> None:
    """Whether the client still sends its body is unknown, so the next bytes cannot be interpreted."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(401, [])

    async with serving(handler) as server:
        wire = await connect(server.port)
        await wire.send(b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        status, headers, _ = await wire.message()
        assert (status, headers[b"connection"]) == (401, b"close")
        await wire.send(b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n")
        assert await wire.rest() == b""


async def test_small_unread_body_keeps_the_connection() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(404, [])

    async with serving(handler) as server:
        wire = await connect(server.port)
        await wire.send(post(b"/a", b"hello") + post(b"/b", b"hello"))
        assert b"connection" not in (await wire.message())[1]
        assert (await wire.message())[0] == 404


async def test_an_early_answer_survives_a_large_upload() -> None:
    """Closing at once would reset the connection before the client has read its answer."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(403, [], b"no")

    async with serving(handler) as server:
        wire = await connect(server.port)
        size = 8 << 20
        await wire.send(b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 20):
            await wire.send(b"x" * (1 << 20))
        status, headers, body = await wire.message()
        assert (status, body, headers[b"connection"]) == (403, b"no", b"close")
        assert await wire.rest() == b""


async def test_buffer_body_larger_than_the_servers_buffer() -> None:
    async def handler(exchange: Exchange) -> None:
        body = await exchange.buffer_body(100_000)
        await exchange.answer(200, [], b"None" if body is None else b"%d" % len(body))

    async with serving(handler, Limits(buffer_bytes=1000)) as server:
        for size, seen in ((100_000, b"100000"), (100_001, b"None")):
            wire = await connect(server.port)
            wire.send_nowait(post(b"/", b"x" * size))
            assert (await wire.message())[2] == seen


async def test_departing_client_is_noticed() -> None:
    events: asyncio.Queue[str] = asyncio.Queue()

    async def handler(exchange: Exchange) -> None:
        exchange.on_gone(lambda: events.put_nowait("gone"))
        exchange.on_gone(forgotten := lambda: events.put_nowait("forgotten"))
        exchange.off_gone(forgotten)
        events.put_nowait("waits")
        try:
            await exchange.buffer_body(100)
        except ClientGoneError:
            exchange.on_gone(lambda: events.put_nowait("at once"))
            await exchange.answer(200, [])  # does nothing
            events.put_nowait("error")

    async with serving(handler) as server, asyncio.timeout(PATIENCE_S):
        wire = await connect(server.port)
        await wire.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhel")
        assert await events.get() == "waits"
        wire.reset()
        assert [await events.get() for _ in range(3)] == ["gone", "at once", "error"]


async def test_exceptions_of_handlers() -> None:
    faults: list[BaseException] = []

    async def handler(exchange: Exchange) -> None:
        match exchange.head.target:
            case b"/known":
                raise ExhaustedError("QUEUE_FULL", "The queue is full.")
            case b"/bug":
                raise LookupError("secret detail")
            case b"/mid":
                exchange.begin(200, None, [], 10)
                exchange.write(b"half")
                exchange.flush()
                raise LookupError("secret detail")
            case _:
                pass  # returns without an answer

    logged: list[str] = []

    def on_fault(error: BaseException, request_id: str) -> None:
        faults.append(error)
        logged.append(request_id)

    ids = map("1-0-0-{}".format, count())
    server = await serve(handler, "127.0.0.1", 0, Limits(), request_ids=lambda: next(ids), on_fault=on_fault)
    wires: list[Wire] = []

    async def ask(target: bytes) -> Wire:
        wires.append(await connect(server.port))
        await wires[-1].send(get(target))
        return wires[-1]

    status, headers, body = await (await ask(b"/known")).message()
    assert (status, headers[b"retry-after"], json.loads(body)["Code"]) == (429, b"1", "ResourceExhausted")
    for target in (b"/bug", b"/silent"):
        status, headers, body = await (await ask(target)).message()
        assert (status, json.loads(body)["Code"]) == (500, "InternalServerError")
        assert b"secret" not in body
        assert logged[-1] == json.loads(body)["RequestId"] == headers[b"x-fc-request-id"].decode()
    assert (await (await ask(b"/mid")).rest()).endswith(b"half")
    assert [type(fault) for fault in faults] == [LookupError, RuntimeError, LookupError]
    for wire in wires:
        await wire.closed()
    await server.close(0.0)


async def test_a_slow_head_is_408() -> None:
    async with serving(echo, Limits(header_timeout_s=0.05)) as server:
        wire = await connect(server.port)
        await wire.send(b"GET / HT")
        status, headers, _ = await wire.message()
        assert (status, headers[b"connection"]) == (408, b"close")
        assert await wire.rest() == b""


async def test_a_stalled_body_is_408() -> None:
    async with serving(echo, Limits(body_stall_s=0.05)) as server:
        wire = await connect(server.port)
        await wire.send(post(b"/", b"hello")[:-1])
        status, headers, _ = await wire.message()
        assert (status, headers[b"connection"]) == (408, b"close")


async def test_body_without_100_continue_cannot_stall() -> None:
    """With Expect the client waits for 100 Continue: a queued request is not a slow client."""
    go = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await go.wait()
        await echo(exchange)

    async with serving(handler, Limits(body_stall_s=0.02)) as server:
        wire = await connect(server.port)
        await wire.send(b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        await asyncio.sleep(0.1)  # five stall limits pass
        go.set()
        assert (await wire.head())[0] == 100
        await wire.send(b"hello")
        assert (await wire.message())[2] == b"/a hello"


async def test_idle_connections_are_closed() -> None:
    async with serving(echo, Limits(keep_alive_s=0.05)) as server:
        silent = await connect(server.port)
        used = await connect(server.port)
        await used.send(get(b"/"))
        await used.message()
        assert await silent.rest() == b""
        assert await used.rest() == b""
        await eventually(lambda: not server.connections)


async def test_client_that_reads_nothing_is_cut() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(200, [], b"x" * (32 << 20))

    async with serving(handler, Limits(write_stall_s=0.05, keep_alive_s=0.05)) as server:
        await (await connect(server.port, buffer_bytes=1024)).send(get(b"/"))
        await eventually(lambda: len(server.connections) == 1)
        await eventually(lambda: not server.connections)


async def test_too_many_connections() -> None:
    async with serving(echo, Limits(max_connections=2)) as server:
        server.when_full = [(b"x-told", b"full")]
        first, second = await connect(server.port), await connect(server.port)
        await eventually(lambda: len(server.connections) == 2)
        status, headers, body = await (await connect(server.port)).message()
        assert (status, json.loads(body)["Code"]) == (503, "TooManyConnections")
        assert headers[b"x-told"] == b"full"
        await first.closed()
        await eventually(lambda: len(server.connections) <= 2)
        await second.send(get(b"/"))
        assert (await second.message())[0] == 200


async def test_close_lets_requests_finish() -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        began.set()
        await go.wait()
        await echo(exchange)

    async with serving(handler) as server:
        idle, busy = await connect(server.port), await connect(server.port)
        await busy.send(get(b"/busy"))
        await began.wait()
        closing = asyncio.create_task(server.close(PATIENCE_S))
        assert await idle.rest() == b""
        with pytest.raises(OSError, match=r"refused|reset|Connect"):
            await (await connect(server.port)).exactly(1)
        go.set()
        _, headers, body = await busy.message()
        assert (headers[b"connection"], body) == (b"close", b"/busy ")
        assert await closing == 0


async def test_close_cuts_requests_beyond_the_grace_period() -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with serving(handler) as server:
        wire = await connect(server.port)
        await wire.send(get(b"/"))
        await began.wait()
        assert await server.close(0.01) == 1
        assert cancelled.is_set()
        assert await wire.rest() == b""


def test_the_date_header_follows_the_second() -> None:
    seconds = iter([784_111_777, 784_111_777, 784_111_778])
    line = DateHeader(lambda: next(seconds))
    first = line()
    assert first == b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
    assert line() is first
    assert line() == b"date: Sun, 06 Nov 1994 08:49:38 GMT\r\n"
