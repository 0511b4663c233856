"""Failures between client and upstream: each has its outcome, and no client takes part of an answer for all of it."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import pytest

from agent.http.limits import Limits
from agent.http.message import Header, ResponseHead
from agent.http.relay import RelayOutcome
from tests.http.rig import PATIENCE_S, Wire, answering, eventually, relay, upstream
from tests.http.test_forward import CHUNKED_POST, OK
from tests.http.test_server import HOST, get, post


async def test_nobody_listens() -> None:
    async with upstream(answering(OK)) as up:
        port = up.port
    async with relay(port) as r:
        client = await r.client()
        await client.send(post(b"/", b"hello"))
        status, _, body = await client.message()
        assert (status, json.loads(body)["Code"]) == (503, "UpstreamConnectFailed")
        result = await r.result()
        assert result.outcome is RelayOutcome.CONNECT_FAILED
        assert r.last_bytes == []
        await client.send(get(b"/"))  # the client's connection still serves
        assert (await client.message())[0] == 503


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"garbage\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n",  # broken in the first read
    ],
)
async def test_upstream_without_a_valid_answer(reply: bytes) -> None:
    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(reply)

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(get(b"/"))
        status, _, body = await client.message()
        closed = reply in (b"", b"HTTP/1.1 200 OK\r\nContent-")
        assert (status, json.loads(body)["Code"]) == (502, "UpstreamBroken" if closed else "UpstreamNotHttp")
        result = await r.result()
        assert result.outcome is RelayOutcome.UPSTREAM_FAILED_BEFORE_HEAD
        assert len(r.last_bytes) == 1
        await eventually(lambda: not r.pool.connections)


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n6\r\nha",
    ],
)
async def test_upstream_failure_within_a_body(reply: bytes) -> None:
    """The client gets too few bytes, or no last chunk."""

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(reply)

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(get(b"/"))
        _, headers = await client.head()
        rest = await client.rest()
        if b"content-length" in headers:
            assert len(rest) < 10
        else:
            assert not rest.endswith(b"0\r\n\r\n")
        result = await r.result()
        assert (result.outcome, result.head_status) == (RelayOutcome.UPSTREAM_FAILED_MID_BODY, 200)
        assert len(r.last_bytes) == 1


async def test_http10_client_gets_a_reset_instead_of_half_a_body() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await go.wait()

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        await client.until(b"half")
        go.set()
        with pytest.raises(ConnectionResetError):
            await client.exactly(1)


async def test_upstream_reset_does_not_end_a_body_without_framing() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await go.wait()
        linger_zero(wire)

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(get(b"/"))
        await client.until(b"half")
        go.set()
        assert not (await client.rest()).endswith(b"0\r\n\r\n")
        assert (await r.result()).outcome is RelayOutcome.UPSTREAM_FAILED_MID_BODY


def linger_zero(wire: Wire) -> None:
    """Resets the connection, as a killed process with unread input does."""
    sock = wire._writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.reset()


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (b"", RelayOutcome.TIMEOUT_BEFORE_HEAD),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", RelayOutcome.TIMEOUT_MID_BODY),
    ],
)
async def test_the_deadline_closes_the_upstream(reply: bytes, outcome: RelayOutcome) -> None:
    closed = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(reply)
        assert await wire.rest() == b""
        closed.set()

    async with upstream(script) as up, relay(up.port, deadline_s=0.1) as r:
        client = await r.client()
        await client.send(get(b"/"))
        if reply:
            assert (await client.rest()).endswith(b"half")
        else:
            status, _, body = await client.message()
            assert (status, json.loads(body)["Code"]) == (504, "UpstreamTimeout")
        assert (await r.result()).outcome is outcome
        assert len(r.last_bytes) == 1
        async with asyncio.timeout(PATIENCE_S):
            await closed.wait()


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"])
async def test_departing_client_cancels_the_upstream(reply: bytes) -> None:
    began, closed = asyncio.Event(), asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(reply)
        began.set()
        assert await wire.rest() == b""
        closed.set()

    async with upstream(script) as up, relay(up.port) as r, asyncio.timeout(PATIENCE_S):
        client = await r.client()
        await client.send(get(b"/"))
        await began.wait()
        if reply:
            await client.until(b"hi")
        client.close()
        await closed.wait()
        assert (await r.result()).outcome is RelayOutcome.CLIENT_GONE
        assert len(r.last_bytes) == 1


async def test_client_departs_within_its_upload() -> None:
    began, closed = asyncio.Event(), asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        began.set()
        assert await wire.rest() == b"half"
        closed.set()

    async with upstream(script) as up, relay(up.port) as r, asyncio.timeout(PATIENCE_S):
        client = await r.client()
        await client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\nhalf")
        await began.wait()
        client.close()
        await closed.wait()
        assert (await r.result()).outcome is RelayOutcome.CLIENT_GONE


@pytest.mark.parametrize(
    ("rest", "limits", "status"),
    [
        (b"zz\r\n", Limits(), 400),
        (b"fff\r\n", Limits(body_bytes=1000), 413),
        (b"5\r\nhe", Limits(body_stall_s=0.05), 408),
    ],
)
async def test_invalid_or_stalled_request_body(rest: bytes, limits: Limits, status: int) -> None:
    upstream_saw: asyncio.Queue[bytes] = asyncio.Queue()
    began = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        began.set()
        upstream_saw.put_nowait(await wire.rest())

    async with upstream(script) as up, relay(up.port, limits=limits) as r, asyncio.timeout(PATIENCE_S):
        client = await r.client()
        await client.send(CHUNKED_POST + b"4\r\ngood\r\n")
        await began.wait()
        await client.send(rest)
        answer, headers, _ = await client.message()
        assert (answer, headers[b"connection"]) == (status, b"close")
        assert (await r.result()).outcome is RelayOutcome.CLIENT_FAILED
        assert not (await upstream_saw.get()).endswith(b"0\r\n\r\n")


async def test_bytes_after_a_response_close_the_connection() -> None:
    async with upstream(answering(OK + b"HTTP/1.1 200 OK\r\n\r\npoison")) as up, relay(up.port) as r:
        client = await r.client()
        for _ in range(3):
            await client.send(get(b"/"))
            assert (await client.message())[2] == b"ok"
        assert up.connections == 3


async def test_exception_of_the_filter_reaches_the_caller() -> None:
    def broken(head: ResponseHead) -> list[Header] | None:
        return [(b"x", b"a\r\nb: c")]

    faults: list[BaseException] = []
    async with upstream(answering(OK)) as up, relay(up.port, response_filter=broken) as r:
        r.server.on_fault = lambda error, _: faults.append(error)
        client = await r.client()
        await client.send(get(b"/"))
        assert (await client.message())[0] == 500
        assert isinstance(faults[0], ValueError)
        assert len(r.last_bytes) == 1
