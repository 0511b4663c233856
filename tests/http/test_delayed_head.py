"""An answer whose head waits for deferred headers: nothing is lost or reordered, and every wait ends."""

from __future__ import annotations

import asyncio
import json

import pytest

from agent.http.delayed_head import DeferredHeaders
from agent.http.message import Header
from agent.http.relay import RelayOutcome
from tests.http.rig import PATIENCE_S, Wire, answering, eventually, paused, relay, upstream
from tests.http.test_forward import OK
from tests.http.test_server import get, post

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LOG = (b"x-late", b"the log")


class Late:
    """Deferred headers that are returned once `go` is set."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.cancelled = False

    async def __call__(self) -> list[Header]:
        self.asked.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return [LOG]


async def at_once() -> list[Header]:
    return [LOG]


@pytest.mark.parametrize(
    ("reply", "body"),
    [
        (OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
        (CHUNKED + b"4\r\nwhol\r\n1\r\ne\r\n0\r\n\r\n", b"whole"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000, b"x" * 300_000),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
async def test_head_waits_and_the_body_is_complete(reply: bytes, body: bytes, waits: bool) -> None:
    held = Late()
    late: DeferredHeaders = held if waits else at_once
    async with upstream(answering(reply)) as up, relay(up.port, deferred_headers=late) as r:
        client = await r.client()
        for _ in range(3):  # on one connection on either side
            await client.send(post(b"/", b"hello"))
            if waits:
                await held.asked.wait()
                held.go.set()
            _, headers, got = await client.message()
            assert (headers[b"x-late"], got) == (b"the log", body)
            assert (await r.result()).outcome is RelayOutcome.COMPLETE
        assert (up.connections, len(r.last_bytes)) == (1, 3)


async def test_stream_continues_after_the_wait() -> None:
    """Bytes that the upstream sends during the wait are not read; those that came with its head are kept."""
    late = Late()
    sent = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(CHUNKED + b"3\r\none\r\n")
        await late.asked.wait()
        await wire.send(b"3\r\ntwo\r\n")
        sent.set()
        await wire.send(b"5\r\nthree\r\n0\r\n\r\n")

    async with upstream(script) as up, relay(up.port, deferred_headers=late) as r:
        client = await r.client()
        await client.send(get(b"/events"))
        await sent.wait()
        assert paused(r.pool.connections)
        late.go.set()
        assert (await client.head())[0] == 200
        assert await client.chunk() == b"one"
        assert await client.chunks() == b"twothree"
        assert (await r.result()).response_body_bytes == 11


async def test_nothing_is_sent_before_the_deferred_headers() -> None:
    late = Late()
    async with upstream(answering(OK)) as up, relay(up.port, deferred_headers=late) as r:
        client = await r.client()
        await client.send(get(b"/"))
        await late.asked.wait()
        assert not r.exchanges[0].head_sent
        late.go.set()
        assert (await client.message())[2] == b"ok"


async def test_departing_client_ends_the_wait() -> None:
    late = Late()
    async with upstream(answering(OK)) as up, relay(up.port, deferred_headers=late) as r:
        client = await r.client()
        await client.send(get(b"/"))
        await late.asked.wait()
        client.reset()
        assert (await r.result()).outcome is RelayOutcome.CLIENT_GONE
        await eventually(lambda: late.cancelled and not r.pool.connections)


async def test_deadline_during_the_wait_is_an_upstream_timeout() -> None:
    late = Late()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(CHUNKED + b"4\r\nhalf\r\n")
        await asyncio.sleep(PATIENCE_S)

    async with upstream(script) as up, relay(up.port, deferred_headers=late, deadline_s=0.05) as r:
        client = await r.client()
        await client.send(get(b"/"))
        status, _, body = await client.message()
        assert (status, json.loads(body)["Code"]) == (504, "UpstreamTimeout")
        assert (await r.result()).outcome is RelayOutcome.TIMEOUT_BEFORE_HEAD
        await eventually(lambda: late.cancelled)


async def test_upstream_failure_during_the_wait_is_reported() -> None:
    late = Late()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await late.asked.wait()
        wire.close()

    async with upstream(script) as up, relay(up.port, deferred_headers=late) as r:
        client = await r.client()
        await client.send(get(b"/"))
        await late.asked.wait()
        late.go.set()  # the upstream's close is noticed once it is read again
        with pytest.raises(asyncio.IncompleteReadError):
            await client.message()
        assert (await r.result()).outcome is RelayOutcome.UPSTREAM_FAILED_MID_BODY


async def test_pool_closed_during_the_wait_fails_before_the_head() -> None:
    late = Late()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await asyncio.sleep(PATIENCE_S)

    async with upstream(script) as up, relay(up.port, deferred_headers=late) as r:
        client = await r.client()
        await client.send(get(b"/"))
        await late.asked.wait()
        r.pool.close()
        assert (await client.message())[0] == 502
        assert (await r.result()).outcome is RelayOutcome.UPSTREAM_FAILED_BEFORE_HEAD
